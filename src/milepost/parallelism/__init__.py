"""Degrees of parallelism and what they place where: one set of rules for the trainer and for plans. Torch-free.

In reading order::

    degrees    the six degrees, how they fill a world, and the meshes they make of its ranks
    placement  which box of a parameter each rank holds, and which layers each pipeline stage
    fit        which models can be spread under which degrees
"""

from __future__ import annotations
