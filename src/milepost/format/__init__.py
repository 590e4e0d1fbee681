"""Every byte on disk: files read and written without torch, and checked as hostile input.

In reading order::

    box               regions of tensors, and the check that they tile a tensor; dtype: the table of dtypes
    record            the ``torch.save`` zip record of a tensor or value, written; record_reader: read
    zip_directory     the directory of a zip archive, read
    pickle_dialect    what a pickle may contain; pickle_reader: a pickle machine that can only build data
    plain_pickle      plain values <-> pickle; value_names: the globals allowed in the pickle of a value
    torch_file        a ``.pt`` file of many tensors
    dcp_metadata      DCP's ``.metadata``, read; dcp_writer: written
    manifest          ``milepost.json``, the commit record: its types
    manifest_json     its format 2; manifest_1: format 1, read for ever
    manifest_check    the checks of every manifest
    typed_json        JSON into typed values; file_rows: lists of files
    columns           the table of shards in columns, in memory; columns_check: its checks
    shards_file       the table as the file ``milepost.shards``
    segments          one rank's part of the table; segment_merger: all ranks' segments into one table
    remembered        the last result of a pure function, kept for the next save
    digest            CRC-32s of items and blocks; shard_crcs: of shards, from those of their blocks
    shares            digests of files written by several ranks
    tags              file names with the id of their save
    summary           totals for listings
    nan               a count of NaN in raw bytes
    safetensors       the safetensors file; huggingface: the other files of a Hugging Face folder
    kinds             files of other formats, identified for helpful errors
"""
