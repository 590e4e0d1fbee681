"""How a model is spread over ranks: one module per mechanism, ``model`` puts them together."""

from __future__ import annotations

from milepost.train.parallel.meshes import Meshes
from milepost.train.parallel.model import ParallelModel, parallelize

__all__ = ["Meshes", "ParallelModel", "parallelize"]
