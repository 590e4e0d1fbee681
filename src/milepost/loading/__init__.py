"""From a committed step into the tensors that are there.

In reading order::

    load    ``load()``: read the record, compare, plan, read, restore
    reader  ranged reads, checked block by block, straight into the tensors
"""

from __future__ import annotations
