"""Check that the bytes of a checkpoint are those that were saved. Torch-free.

In reading order::

    verify         ``verify()``: sizes, records, digests; one report of all problems
    checkpoint     a committed step: its small files, and every record
    extents        the byte ranges of a file and their digests
    block_reader   one item's data, read in any parts and checked; also for loads and conversions
    external       locating the data in other programs' records
    extent_reader  reading and checking extents
    hf_step        a step of Hugging Face files: its digests, and checks of its files against them
    weights        Hugging Face folders, safetensors and ``torch.save`` files, checked as far as possible
"""

from __future__ import annotations
