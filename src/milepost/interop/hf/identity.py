"""The model that a source of weights says it holds. Torch-free."""

from __future__ import annotations

from milepost.interop.hf.config import identity_of
from milepost.interop.names.identity import ModelIdentity
from milepost.interop.weights.open import Weights


def recorded_identity(weights: Weights) -> ModelIdentity | None:
    """The model that its manifest or config names, if it is one that there are tables for."""
    recorded = ModelIdentity.recorded(weights.manifest.extra) if weights.manifest is not None else None
    return recorded or (identity_of(weights.config) if weights.config is not None else None)
