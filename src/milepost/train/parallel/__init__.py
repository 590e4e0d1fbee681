"""Parallelism of the model: one module per mechanism, ``model`` combines them."""

from __future__ import annotations

from milepost.train.parallel.meshes import Meshes
from milepost.train.parallel.model import ParallelModel, parallelize

__all__ = ["Meshes", "ParallelModel", "parallelize"]
