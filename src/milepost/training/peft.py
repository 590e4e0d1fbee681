"""The configuration of a model's PEFT adapters, saved with each step: it does not follow from the weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

CONFIG_NAME = "adapter_config.json"


def adapter_files(models: Sequence[nn.Module]) -> dict[str, bytes]:
    """Return the configuration file of each adapter in ``models``, in PEFT's form; empty without adapters.

    A single adapter's file has PEFT's name; with several, each file name contains the adapter's name.
    """
    configs = next((found for model in models if (found := _configs(model))), {})
    if len(configs) == 1:
        return {CONFIG_NAME: _content(next(iter(configs.values())))}
    return {f"adapter_config.{name}.json": _content(config) for name, config in configs.items()}


def _configs(model: nn.Module) -> Mapping[str, Any]:
    """Return configurations by adapter name, of a PEFT model or a transformers model with adapters."""
    for module in model.modules():
        found = getattr(module, "peft_config", None)
        if isinstance(found, Mapping) and all(hasattr(config, "save_pretrained") for config in found.values()):
            return found
    return {}


def _content(config: Any) -> bytes:
    stored = copy.deepcopy(config)
    stored.inference_mode = True  # like PEFT's save
    with tempfile.TemporaryDirectory(prefix="milepost-") as folder:
        stored.save_pretrained(folder)
        return (Path(folder) / CONFIG_NAME).read_bytes()
