"""``merge``: several weights of one model into one, streaming, in memory that grows neither with the model nor with
their number. Torch-free.

In reading order::

    options  what can be asked of a merge; light to import
    inputs   sources under the names of the first, each tensor checked against it
    methods  arithmetic: what becomes of the values of one tensor
    measure  passes over whole tensors: angles, thresholds
    merged   a source whose tensors are computed when they are read
    merge    doing it
"""

from __future__ import annotations
