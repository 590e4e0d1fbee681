"""Modules, optimizers and random generators as state dicts whose keys depend on no layout.

Model keys are fully qualified names (FQNs) without the traces of wrappers; optimizer keys are
``state.<fqn>.<name>`` and ``param_groups.<fqn>.<option>``, the flattened form of stock PyTorch, so that pipeline
stages never collide and parameters may move between ranks.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from milepost.errors import ConfigError, SaveError, StateMismatchError

_WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module", "_orig_mod")
"""Names under which activation checkpointing and ``torch.compile`` hold the module that they wrap."""


def fqn(root: nn.Module, name: str) -> str:
    """The name of a parameter or buffer of ``root`` as the unwrapped model would have it."""
    kept = []
    module: Any = root
    for segment in name.split("."):
        wraps = segment in _WRAPPER_SEGMENTS or (segment == "module" and isinstance(module, DistributedDataParallel))
        if not wraps:
            kept.append(segment)
        module = getattr(module, segment, None)
    return ".".join(kept)


def model_state(parts: Sequence[nn.Module]) -> dict[str, Any]:
    """The parameters and persistent buffers of all ``parts`` (pipeline stages of this rank) by FQN.

    Tensors share memory with the modules: loading into them loads the model.

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


def load_extra_state(parts: Sequence[nn.Module], state: Mapping[str, Any]) -> None:
    """Give modules that keep ``_extra_state`` what was loaded for them; tensors are in place already."""
    for part in parts:
        own = part.state_dict()
        extra = {name: state[fqn(part, name)] for name in own if name.rsplit(".", 1)[-1] == "_extra_state"}
        if extra:
            part.load_state_dict(extra, strict=False)


def parameter_names(parts: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    """The FQN of every parameter; of a tied one, the first of its names."""
    return {
        parameter: fqn(part, name)
        for part in reversed(parts)
        for name, parameter in reversed(list(part.named_parameters()))
    }


def optimizer_state(optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """All optimizers' state and options, flattened and keyed by FQN. Tensors share memory with the optimizers.

    Raises:
        SaveError: an optimizer steps a parameter that no model part holds.
    """
    flat: dict[str, Any] = {}
    for optimizer, group, parameter in _grouped(optimizers):
        name = names.get(parameter)
        if name is None:
            raise SaveError(
                f"{type(optimizer).__name__} steps a parameter of shape {list(parameter.shape)} that is in no model "
                "part given to the CheckpointManager; its state could not be found again"
            )
        flat.update(_flat_items(f"state.{name}", optimizer.state.get(parameter, {})))
        flat.update({f"param_groups.{name}.{k}": v for k, v in group.items() if k != "params"})
    return flat


def load_optimizer_options(
    optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str], flat: Mapping[str, Any]
) -> None:
    """Put loaded values that are not tensors back: counters in the state, and each group's options.

    Raises:
        StateMismatchError: parameters of one group were saved with different options.
    """
    for optimizer, group, parameter in _grouped(optimizers):
        name = names[parameter]
        state = optimizer.state.get(parameter, {})
        _put_values_back(state, f"state.{name}", flat)
        for option in [k for k in group if k != "params"]:
            value = flat[f"param_groups.{name}.{option}"]
            if parameter is not group["params"][0] and _differs(value, group[option]):
                raise StateMismatchError(
                    f"the optimizer puts {name} in one group with {names[group['params'][0]]}, but they were saved "
                    f"with different values of {option} ({value} and {group[option]}); group them as they were",
                )
            group[option] = value


def _put_values_back(state: MutableMapping[Any, Any], prefix: str, flat: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, MutableMapping):
            _put_values_back(value, f"{prefix}.{key}", flat)
        elif not isinstance(value, torch.Tensor):
            state[key] = flat[f"{prefix}.{key}"]


def forget_unsaved_state(
    optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str], keys: Iterable[str]
) -> None:
    """Drop the state of parameters that had none when ``keys`` (of a flattened optimizer) were saved.

    A parameter without gradients so far, of an expert that nothing was sent to for instance, has none.
    """
    with_state = set()
    for key in keys:
        while "." in key:  # the name of a parameter is some part of the key from its start
            key = key.rpartition(".")[0]
            with_state.add(key)
    for optimizer, _, parameter in _grouped(optimizers):
        if f"state.{names.get(parameter)}" not in with_state:
            optimizer.state.pop(parameter, None)


def materialise_optimizer_state(optimizer: Optimizer) -> None:
    """Make a fresh optimizer allocate its state, to have something to load into; parameters stay as they are.

    Does what stock PyTorch does for ``set_optimizer_state_dict``: one step with zero gradients and zero learning
    rate. An optimizer that has state already is left alone.
    """
    if any(optimizer.state.values()):  # merely asking for a parameter's state leaves an empty one behind
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = [p.grad for p in parameters]
    rates = [group.get("lr") for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    try:
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _grouped(optimizers: Sequence[Optimizer]) -> Iterator[tuple[Optimizer, dict[str, Any], nn.Parameter]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, group, parameter


def _flat_items(prefix: str, nested: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat_items(f"{prefix}.{key}", value)
        else:
            yield f"{prefix}.{key}", value


def _differs(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return not torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    return bool(one != other)


def rng_state() -> dict[str, Any]:
    """The state of this process's random generators: torch (and the current CUDA device), numpy and Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def derive_rng_state(origin: torch.Tensor, rank: int) -> None:
    """Seed this process's generators from a saved state and the rank: alike on every run, different on every rank."""
    digest = hashlib.blake2b(origin.numpy().tobytes() + rank.to_bytes(8, "little"), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
