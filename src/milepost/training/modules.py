"""The modules of a run: wrapper-independent keys, their state, and loading.

Keys are fully qualified names (FQNs) in the unwrapped model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from milepost.errors import ConfigError, SaveError
from milepost.tensors.tree import ALL_MODULES

_WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module", "_orig_mod")
"""Attribute names of the module wrapped by activation checkpointing or ``torch.compile``."""


def fqn(root: nn.Module, name: str) -> str:
    """Return the name of a parameter or buffer of ``root`` in the unwrapped model."""
    if "module" not in name and "_orig_mod" not in name:
        return name  # no segment of it can be a wrapper's; most names are such
    kept = []
    module: Any = root
    for segment in name.split("."):
        module = _inside(module, segment)
        wraps = segment in _WRAPPER_SEGMENTS or (segment == "module" and isinstance(module, DistributedDataParallel))
        if not wraps:
            kept.append(segment)
        module = getattr(module, segment, None)
    return ".".join(kept)


def _inside(module: Any, segment: str) -> Any:
    """Return the module that has ``segment``: a wrapper may omit itself from the names in its ``state_dict()``."""
    while isinstance(module, nn.Module) and segment not in module._modules:
        inner = next((module._modules[name] for name in _WRAPPER_SEGMENTS if name in module._modules), None)
        if inner is None:
            break
        module = inner
    return module


def model_state(parts: Sequence[nn.Module]) -> dict[str, Any]:
    """Return the parameters and persistent buffers of all ``parts`` (pipeline stages of this rank) by FQN.

    Tensors share memory with the modules, unless a module's ``state_dict()`` creates new ones.

    Raises:
        ConfigError: FSDP1 (``FullyShardedDataParallel``), which flattens parameters; use ``fully_shard``.
        SaveError: two parts have different tensors with the same name.
    """
    state: dict[str, Any] = {}
    for part in parts:
        for module in part.modules():
            if isinstance(module, FullyShardedDataParallel):
                raise ConfigError(
                    "FullyShardedDataParallel (FSDP1) flattens parameters and can't be saved by name; "
                    "use torch.distributed.fsdp.fully_shard"
                )
        for name, value in part.state_dict().items():
            key = fqn(part, name)
            if key in state and state[key] is not value:
                raise SaveError(
                    f"two model parts on this rank both hold '{key}': give several models as one, "
                    'model=nn.ModuleDict({"generator": ..., "critic": ...}), or all but one in states={"critic": ...}',
                    key=key,
                )
            state[key] = value
    return state


def module_versions(parts: Sequence[nn.Module]) -> dict[str, int]:
    """Return the versions of modules' states by FQN, where they are not 1, the usual one."""
    found = {ALL_MODULES: 1}
    for part in parts:
        for name, module in part.named_modules():
            version = getattr(module, "_version", 1)
            if isinstance(version, int) and version != 1:
                found[fqn(part, name)] = version
    return found


def parameter_names(parts: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    """Return the FQN of every parameter; for a tied one, the first of its names."""
    return {
        parameter: fqn(part, name)
        for part in reversed(parts)
        for name, parameter in reversed(list(part.named_parameters()))
    }
