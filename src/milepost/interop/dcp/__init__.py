"""One-line adoption for anyone who calls stock ``torch.distributed.checkpoint`` (DCP)::

    dcp.save(state_dict, storage_writer=milepost.StorageWriter(path))
    dcp.load(state_dict, storage_reader=milepost.StorageReader(path))

DCP's planner decides who writes what; files, digests and the commit are Milepost's. The reader takes folders that
either wrote, and never unpickles a byte that came from one.

In reading order::

    arguments  those of stock's writer and reader: taken, noted or refused
    write      ``StorageWriter``
    read       ``StorageReader``
"""

from __future__ import annotations
