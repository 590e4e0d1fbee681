"""Keys of the tensors that PEFT's adapters add to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

_KINDS = (
    r"(?:lora|vera|ia3)_[A-Za-z_]+",
    r"hada_(?:w[12]_[ab]|t[12])",  # LoHa
    r"lokr_(?:w[12](?:_[ab])?|t2)",
    r"oft_(?:embedding_)?R",
    r"boft_[Rs]",
    r"randlora_(?:lambda|gamma|A|B)",
    r"(?:fourierft|waveft)_spectrum",
    r"hra_u",
    r"ln_tuning_layers",
    r"c3a_kernel",
    r"miss_block",
    r"shira_weight",
    r"road_(?:theta|alpha)",
    r"gralora_[AB](?:_general)?",
    r"hira_(?:embedding_)?[AB]",
    r"trainable_tokens_delta",
    r"modules_to_save",
)
"""Names of PEFT 0.21 that its files have as they are, but for the adapter's name."""
ADAPTER_KEY = re.compile(rf"(.*\.|)({'|'.join(_KINDS)})\.([^.]+)((?:\..+)?)")
"""An adapter's tensor: (module) (kind) (adapter name) (rest)."""
_PROMPT_KEY = re.compile(r"prompt_encoder\.[^.]+\.(embedding|transform|mlp_head|lstm_head|prefix_task_\w+)(\.|$)")
"""A tensor of PEFT's prompts: other models (SAM) have a ``prompt_encoder`` of their own."""


def first_of_adapter(keys: Iterable[str]) -> str | None:
    """Return the first key added by an adapter; None if there is none."""
    return next((key for key in keys if _is_of_adapter(key)), None)


def _is_of_adapter(key: str) -> bool:
    """Return whether an adapter of any kind has added the key, or renamed it: what it is over is a ``base_layer``."""
    return ADAPTER_KEY.fullmatch(key) is not None or ".base_layer." in key or _PROMPT_KEY.match(key) is not None
