"""The models: one file for each, and the parts they share; their sizes live with the converter, torch-free.

Importing this package does not import torch; building a model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milepost.interop.names.model_sizes import MODEL_NAMES, ModelArgs, model_args, model_flavors

if TYPE_CHECKING:
    from milepost.train.models.decoder import Decoder

__all__ = ["MODEL_NAMES", "ModelArgs", "build_model", "make_model", "model_args", "model_flavors"]


def build_model(name: str, flavor: str, *, vocab_size: int | None, seq_len: int) -> Decoder:
    """Build model ``name`` in size ``flavor`` on torch's current default device (``meta`` allocates nothing).

    ``vocab_size`` None means the flavor's; ``seq_len`` is the longest sequence the model will see.

    Raises:
        ConfigError: no such model or flavor.
    """
    return make_model(name, model_args(name, flavor, vocab_size=vocab_size), seq_len)


def make_model(name: str, sizes: ModelArgs, seq_len: int) -> Decoder:
    """Build model ``name`` (one of ``MODEL_NAMES``) in ``sizes`` on torch's current default device."""
    from milepost.train.models.llama3 import Llama3
    from milepost.train.models.qwen3 import Qwen3

    classes: dict[str, type[Decoder]] = {"llama3": Llama3, "qwen3": Qwen3}
    return classes[name](sizes, seq_len)
