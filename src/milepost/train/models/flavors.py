"""The sizes of every model the trainer knows. They live with the converter, which must not import the trainer."""

from __future__ import annotations

from milepost.interop.names.model_sizes import MODEL_NAMES, ModelArgs, MoEArgs, RopeScaling, model_args, model_flavors

__all__ = ["MODEL_NAMES", "MoEArgs", "ModelArgs", "RopeScaling", "model_args", "model_flavors"]
