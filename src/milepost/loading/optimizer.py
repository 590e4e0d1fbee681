"""Load an optimizer through its own ``load_state_dict()``, without a step, and without loss of types or precision.

The state of a parameter is created from the checkpoint, not from the state that a fresh optimizer would create. Stock
``load_state_dict()`` casts floating-point state to the parameter's dtype and rebuilds any iterable; that is undone, so
that text, named tuples and fp32 state of bf16 parameters are restored exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from milepost.errors import StateMismatchError
from milepost.format.manifest import TensorEntry
from milepost.loading.parts import want_node, want_parts
from milepost.loading.target import Target, fresh_like, is_place_for, item, local_tensor
from milepost.tensors.layout import torch_dtype
from milepost.tensors.parts import TensorParts
from milepost.tensors.placements import PLAIN, make_sharded
from milepost.tensors.tree import Node, child, rebuild, refs

Index = int


def indexed(optimizer: Optimizer) -> dict[nn.Parameter, Index]:
    """The number of each parameter in the optimizer's ``state_dict()``."""
    numbers: dict[nn.Parameter, Index] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            numbers.setdefault(parameter, len(numbers))
    return numbers


def want_state(target: Target, parameter: torch.Tensor, live: Any, node: Node) -> None:
    """Request the state of a parameter, read into existing tensors of the optimizer if they fit."""
    if isinstance(node, TensorParts):
        want_parts(target, node, live=live if isinstance(live, torch.Tensor) else None, like=parameter)
        return
    if isinstance(node, Mapping | list | tuple):
        for name in node if isinstance(node, Mapping) else range(len(node)):
            want_state(target, parameter, item(live, name), child(node, name))
        return
    for key in refs(node):
        entry = target.entry(key)
        if entry is None:
            want_node(target, node)
        elif _is_alike(live, parameter, entry, is_plain=target.placement_of(key) == PLAIN):
            target.want(key, live, live=True)
        else:
            target.want(key, state_tensor(parameter, entry, target.placement_of(key)), live=False)


def _is_alike(live: Any, parameter: torch.Tensor, entry: TensorEntry, *, is_plain: bool) -> bool:
    """Return whether a tensor of the optimizer has the dtype and shape of the stored one."""
    is_alike = isinstance(live, torch.Tensor) and live.dtype == torch_dtype(entry.dtype) and is_place_for(live, entry)
    return is_alike and (isinstance(live, DTensor) or not isinstance(parameter, DTensor) or is_plain or not entry.shape)


def state_tensor(parameter: torch.Tensor, entry: TensorEntry, placement: str | None) -> torch.Tensor:
    """Create a tensor for a stored one of a parameter's state, on the parameter's device and with its sharding.

    ``placement`` is what the checkpoint records where the sharding does not follow from the parameter.
    """
    dtype = torch_dtype(entry.dtype)
    if entry.shape == tuple(parameter.shape) and entry.shape and placement != PLAIN:
        return fresh_like(parameter, dtype=dtype)
    if not entry.shape:  # counters: `load_state_dict()` moves them to the device if necessary
        return torch.empty((), dtype=dtype, device="cpu")
    local = local_tensor(parameter)
    plain = torch.empty(entry.shape, dtype=dtype, device="cpu" if local.is_meta else local.device)
    if isinstance(parameter, DTensor) and placement != PLAIN:
        mesh = parameter.device_mesh
        if placement is not None and (made := make_sharded(placement, [mesh], entry.shape, dtype)) is not None:
            return made
        return DTensor.from_local(plain, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return plain


def hand_over(optimizer: Optimizer, state_dict: dict[str, Any], *, keeps_dtype: Mapping[Index, bool]) -> None:
    """Call ``optimizer.load_state_dict(state_dict)`` with all its hooks, but keep the types of values.

    ``keeps_dtype`` maps each parameter to whether its state keeps its dtype: not if the model is loaded into another
    dtype than it was saved in.
    """
    parameters = {number: parameter for parameter, number in indexed(optimizer).items()}
    has_kept = False

    def keep(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        nonlocal has_kept
        has_kept = True
        state = {
            number: _kept(entry, parameters[number], keeps_dtype.get(number, True)) if number in parameters else entry
            for number, entry in given["state"].items()
        }
        return {**given, "state": state}

    def release(loaded: Optimizer) -> None:
        for parameter, entry in loaded.state.items():
            loaded.state[parameter] = _release(entry)

    # After the user's pre-hooks, before the user's post-hooks.
    hooks = []
    if isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        hooks.append(optimizer.register_load_state_dict_pre_hook(keep))
        hooks.append(optimizer.register_load_state_dict_post_hook(release, prepend=True))
    entries = state_dict["state"]
    given = {n: dict(entries[n]) for n in parameters if isinstance(entries.get(n), Mapping)}
    try:
        optimizer.load_state_dict(state_dict)
    finally:
        for hook in hooks:
            hook.remove()
    if not has_kept:  # a wrapper that delegates to another optimizer
        for number, parameter in parameters.items():
            loaded = optimizer.state.get(parameter, {})
            for name in loaded.keys() & given[number].keys() if number in given else ():
                loaded[name] = _put_back(
                    loaded[name], given[number][name], parameter, keeps_dtype.get(number, True), name
                )


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """An opaque container of a value, which ``load_state_dict()`` leaves unchanged."""

    value: Any


def _kept(value: Any, parameter: torch.Tensor, keeps_dtype: bool, name: Any = None) -> Any:
    if isinstance(value, torch.Tensor):
        would_cast = parameter.is_floating_point() and value.dtype != parameter.dtype
        if would_cast and name != "step" and (keeps_dtype or not value.is_floating_point()):
            return _Kept(value.to(device=local_tensor(parameter).device))
        return value
    if type(value) is dict:
        return {key: _kept(item, parameter, keeps_dtype, key) for key, item in value.items()}
    if type(value) is list:
        return [_kept(item, parameter, keeps_dtype) for item in value]
    if type(value) is tuple:
        return tuple(_kept(item, parameter, keeps_dtype) for item in value)
    return _Kept(value) if isinstance(value, Iterable) else value


def _put_back(loaded: Any, given: Any, parameter: torch.Tensor, keeps_dtype: bool, name: Any) -> Any:
    """Return the loaded value, or the original if stock ``load_state_dict()`` changed its type."""
    kept = _kept(given, parameter, keeps_dtype, name)
    return kept.value if isinstance(kept, _Kept) else loaded


def _release(container: Any) -> Any:
    """Replace the opaque containers by their values; returns the container."""
    if isinstance(container, _Kept):
        return container.value
    if isinstance(container, MutableMapping):
        for key, value in container.items():
            container[key] = _release(value)
    elif type(container) is list:
        container[:] = map(_release, container)
    elif type(container) is tuple:
        return tuple(map(_release, container))
    return container


class OptimizerOwner:
    """An optimizer whose ``state_dict()``, with numbered parameters, was saved below ``path``."""

    def __init__(self, optimizer: Optimizer, path: tuple[str, ...]):
        self._optimizer = optimizer
        self._path = path
        self._node: Node = None

    def prepare(self, target: Target) -> None:
        node = target.at(self._path)
        state, groups = child(node, "state"), child(node, "param_groups")
        if node is None or groups is None:
            target.want_missing([".".join((*self._path, "param_groups"))])
            return
        self._node = node
        numbers = {number: parameter for parameter, number in indexed(self._optimizer).items()}
        for name, entry in state.items() if isinstance(state, Mapping) else ():
            number = int(name) if str(name).isdecimal() else -1
            if number in numbers:
                want_state(target, numbers[number], self._optimizer.state.get(numbers[number], {}), entry)
            else:
                want_node(target, entry)
        for name, rest in node.items():
            if name != "state":
                want_node(target, rest)

    def check(self, values: Mapping[str, Any]) -> None:
        if self._node is None:
            return
        groups = child(self._node, "param_groups")
        saved = [_length(rebuild(child(group, "params"), values)) for group in groups or ()]
        here = [len(group["params"]) for group in self._optimizer.param_groups]
        if saved != here:
            where = ".".join(self._path)
            raise StateMismatchError(
                f"'{where}' was saved with groups of {saved} parameters, but the {type(self._optimizer).__name__} that "
                f"it is loaded into has groups of {here}; nothing was changed",
                mismatched=[f"{where}: groups of {saved} parameters in the checkpoint, {here} here"],
            )

    def restore(self, values: Mapping[str, Any]) -> None:
        if self._node is None:
            return
        state_dict = rebuild(self._node, values)
        state = state_dict.get("state") or {}
        state_dict["state"] = {_number(name): entry for name, entry in state.items()}
        hand_over(self._optimizer, state_dict, keeps_dtype={})


def _length(values: Any) -> int:
    return len(values) if isinstance(values, list | tuple) else -1


def _number(name: Any) -> Any:
    """Convert the keys of checkpoints by older versions, which stored numbers as text."""
    return int(name) if isinstance(name, str) and name.isdecimal() else name


def each_parameter(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    """Yield each parameter of an optimizer with its group."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter
