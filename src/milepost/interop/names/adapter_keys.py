"""Keys of the tensors that adapters of PEFT add to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

ADAPTER_KEY = re.compile(r"(.*\.|)((?:lora|vera|ia3)_[A-Za-z_]+|modules_to_save)\.([^.]+)((?:\..+)?)")
"""A tensor of an adapter: (module) (what) (the adapter's name) (the rest)."""


def first_of_adapter(keys: Iterable[str]) -> str | None:
    """The first key that an adapter has added; None without any."""
    return next((key for key in keys if ADAPTER_KEY.fullmatch(key)), None)
