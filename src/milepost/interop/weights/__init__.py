"""Tensors from any format and into any, in boxes, streaming. Torch-free.

In reading order::

    boxes   a source: which tensors there are, and any box of one
    open    path -> source, whatever format lies there
    stream  source -> sink in bounded memory
"""

from __future__ import annotations
