"""Tensors from any format and into any, in boxes, streaming. Torch-free.

In reading order::

    boxes   a source: which tensors there are, and any box of one
    dequantized  fp8 and MXFP4 as if they were not quantized
    open    path -> source, whatever format lies there
    stream  source -> sink in bounded memory
    base_samples  a sample of weights that a step leaves out, to be compared with those it is put over
    noted   what was read, to be compared with what was written
"""

from __future__ import annotations
