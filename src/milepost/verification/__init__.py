"""Proof that the bytes of a checkpoint are those that were saved. Torch-free.

In reading order::

    verify         ``verify()``: sizes, records, digests; one report of all that is wrong
    extents        which byte ranges of a file have which digest
    block_reader   one item's data, read in any parts and checked: for loads and conversions too
    external       where the data lies in records of other programs
    extent_reader  reads and checks them
    hf_step        a step of Hugging Face files: its digests, its files checked against them
    weights        Hugging Face folders, safetensors and ``torch.save`` files, as far as they can be checked
"""

from __future__ import annotations
