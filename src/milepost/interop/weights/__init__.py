"""Tensors from and to any format, in boxes, streaming. Torch-free.

In reading order::

    boxes   a source: its tensors, and any box of them
    dequantized  fp8 and MXFP4 weights, dequantized while reading
    open    path -> source, for any format
    stream  source -> sink in bounded memory
    base_samples  samples of the weights that a step leaves out, to compare with those of its base
    noted   digests of tensors read, to compare with the written ones
"""

from __future__ import annotations
