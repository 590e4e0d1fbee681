"""Degrees of parallelism and placement rules, shared by the trainer and by plans. Torch-free.

In reading order::

    degrees    the six degrees, how they fill a world, and the meshes they make of its ranks
    placement  the box of a parameter on each rank, and the layers of each pipeline stage
    fit        checks that a model can be sharded under given degrees
"""

from __future__ import annotations
