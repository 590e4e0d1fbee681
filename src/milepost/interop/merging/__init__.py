"""``merge``: merge several weights of one model, streaming, in constant memory. Torch-free.

In reading order::

    options  the options of a merge; light to import
    inputs   sources under the names of the first, each tensor checked against it
    methods  the arithmetic on one tensor's values
    measure  passes over complete tensors: angles, thresholds
    merged   a source whose tensors are computed when they are read
    merge    running it
"""

from __future__ import annotations
