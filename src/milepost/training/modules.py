"""The modules of a run: keys that depend on no wrapper, their state, and loading them.

Keys are fully qualified names (FQNs) as the unwrapped model would have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from milepost.errors import ConfigError, SaveError

_WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module", "_orig_mod")
"""Names under which activation checkpointing and ``torch.compile`` hold the module that they wrap."""


def fqn(root: nn.Module, name: str) -> str:
    """The name of a parameter or buffer of ``root`` as the unwrapped model would have it."""
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
    """The module that has ``segment``: a wrapper may leave itself out of the names of its ``state_dict()``."""
    while isinstance(module, nn.Module) and segment not in module._modules:
        inner = next((module._modules[name] for name in _WRAPPER_SEGMENTS if name in module._modules), None)
        if inner is None:
            break
        module = inner
    return module


def model_state(parts: Sequence[nn.Module]) -> dict[str, Any]:
    """The parameters and persistent buffers of all ``parts`` (pipeline stages of this rank) by FQN.

    Tensors share memory with the modules, unless a module's ``state_dict()`` makes new ones.

    Raises:
        ConfigError: FSDP1 (``FullyShardedDataParallel``), which flattens parameters; use ``fully_shard``.
        SaveError: two parts have a tensor of the same name that is not the same tensor.
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
                raise SaveError(f"two model parts on this rank both hold '{key}'", key=key)
            state[key] = value
    return state


def parameter_names(parts: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    """The FQN of every parameter; of a tied one, the first of its names."""
    return {
        parameter: fqn(part, name)
        for part in reversed(parts)
        for name, parameter in reversed(list(part.named_parameters()))
    }
