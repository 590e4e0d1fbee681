"""The model recorded in a source of weights. Torch-free."""

from __future__ import annotations

from milepost.interop.hf.config import identity_of
from milepost.interop.names.identity import ModelIdentity
from milepost.interop.weights.open import Weights


def recorded_identity(weights: Weights) -> ModelIdentity | None:
    """Return the model in the source's manifest or config, if there are tables for it."""
    recorded = ModelIdentity.recorded(weights.manifest.extra) if weights.manifest is not None else None
    return recorded or (identity_of(weights.config) if weights.config is not None else None)
