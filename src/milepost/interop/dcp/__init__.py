"""One-line adoption for users of stock ``torch.distributed.checkpoint`` (DCP)::

    dcp.save(state_dict, storage_writer=milepost.StorageWriter(path))
    dcp.load(state_dict, storage_reader=milepost.StorageReader(path))

DCP's planner assigns writes to ranks; files, digests and the commit are Milepost's. The reader accepts folders written
by either, and never unpickles their bytes.

In reading order::

    arguments  the arguments of stock's writer and reader: accepted, ignored with a log line, or refused
    write      ``StorageWriter``
    read       ``StorageReader``
"""

from __future__ import annotations
