"""The configuration of a model's PEFT adapters travels with each step: weights alone don't tell what they are."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

CONFIG_NAME = "adapter_config.json"


def adapter_files(models: Sequence[nn.Module]) -> dict[str, bytes]:
    """The file with the configuration of each adapter in ``models``, as PEFT writes it; none without adapters.

    That of a single one is called as PEFT calls it; of several each has its adapter's name in its own.
    """
    configs = next((found for model in models if (found := _configs(model))), {})
    if len(configs) == 1:
        return {CONFIG_NAME: _content(next(iter(configs.values())))}
    return {f"adapter_config.{name}.json": _content(config) for name, config in configs.items()}


def _configs(model: nn.Module) -> Mapping[str, Any]:
    """By adapter's name, of a model of PEFT or one that transformers has put an adapter into."""
    for module in model.modules():
        found = getattr(module, "peft_config", None)
        if isinstance(found, Mapping) and all(hasattr(config, "save_pretrained") for config in found.values()):
            return found
    return {}


def _content(config: Any) -> bytes:
    stored = copy.deepcopy(config)
    stored.inference_mode = True  # as PEFT does when it saves
    with tempfile.TemporaryDirectory(prefix="milepost-") as folder:
        stored.save_pretrained(folder)
        return (Path(folder) / CONFIG_NAME).read_bytes()
