"""A trial of a module's own ``load_state_dict()``: which stored value goes where, before any is read.

Hooks and overrides rename keys of old checkpoints, fuse, split and reshape tensors, and add new entries. They are run
on a clone of the module with all tensors, also the stored ones, on the meta device. The clone shares the module's other
attributes; the module is not changed.
"""

from __future__ import annotations

import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class Trial:
    """The effect of a module's ``load_state_dict()`` on values of given names."""

    places: Mapping[str, str]
    """Names whose value is copied as it is, and the one parameter or buffer that it is copied to."""
    filled: frozenset[str]
    """Parameters and buffers that are copied to."""
    missing: frozenset[str]
    """Names of the module without a value, given or made by it."""
    unexpected: frozenset[str]
    """Names that the module does not have."""
    refusal: str = ""
    """The text of the error, if it raised one."""


def has_users_way(module: nn.Module) -> bool:
    """Return whether code other than PyTorch's runs when a module is loaded, before its tensors are copied."""
    return any(_has_users_way(part) for part in module.modules())


def _has_users_way(module: nn.Module) -> bool:
    kind = type(module)
    ways: list[Any] = [kind.load_state_dict, kind._load_from_state_dict]
    ways += [module.__dict__[name] for name in ("load_state_dict", "_load_from_state_dict") if name in module.__dict__]
    ways += [_function_of(hook) for hook in module._load_state_dict_pre_hooks.values()]
    return not all(_is_of_torch(way) for way in ways)


def _function_of(hook: Any) -> Any:
    hook = getattr(hook, "hook", hook)  # registered with or without the module as an argument
    return getattr(hook, "func", hook)  # of a partial


def _is_of_torch(way: Any) -> bool:
    module = getattr(way, "__module__", None) or ""
    return module == "torch" or module.startswith("torch.")


def try_loading(module: nn.Module, given: Mapping[str, Any], *, metadata: Any) -> Trial:
    """Load ``given`` into a clone of ``module``; with its post-hooks only where they may excuse missing names."""
    trial = _try(module, given, metadata, has_post_hooks=False)
    if not (trial.missing or trial.unexpected) or not any(m._load_state_dict_post_hooks for m in module.modules()):
        return trial
    second = _try(module, given, metadata, has_post_hooks=True)
    return trial if second.refusal else second


def _try(module: nn.Module, given: Mapping[str, Any], metadata: Any, *, has_post_hooks: bool) -> Trial:
    clones: dict[int, nn.Module] = {}
    state: OrderedDict[str, Any] = OrderedDict(given)
    state._metadata = metadata  # type: ignore[attr-defined]
    try:
        clone = _clone(module, clones, has_post_hooks=has_post_hooks)
        held = {id(tensor): name for name, tensor in _held(clone)}
        with _Copies(held) as copies, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # errors of the hooks' own values combined with meta tensors
            result = clone.load_state_dict(state, strict=False)
    except Exception as error:  # noqa: BLE001 - hooks may raise anything
        return Trial({}, frozenset(), frozenset(), frozenset(), refusal=f"{type(error).__name__}: {error}")
    names = {id(value): name for name, value in given.items()}
    found: dict[str, list[str]] = {}
    for place, sources in copies.sources.items():
        for source in sources:
            if (name := names.get(id(source))) is not None:
                found.setdefault(name, []).append(place)
    places = {name: at[0] for name, at in found.items() if len(at) == 1 and len(copies.sources[at[0]]) == 1}
    return Trial(
        places,
        frozenset(copies.sources),
        frozenset(getattr(result, "missing_keys", ())),
        frozenset(getattr(result, "unexpected_keys", ())),
    )


@dataclass(frozen=True, slots=True)
class WrapperNames:
    """Map the names of modules without wrappers to those with wrappers."""

    names: Mapping[str, str]

    def name_of(self, bare: str) -> str:
        """Return the name in the wrapped module of an entry of the unwrapped one, which need not exist."""
        parent, _, rest = bare.rpartition(".")
        while parent and parent not in self.names:
            parent, _, more = parent.rpartition(".")
            rest = f"{more}.{rest}"
        found = self.names.get(parent, parent)
        return f"{found}.{rest}" if found else rest


def names_of_wrappers(names: Mapping[str, str]) -> WrapperNames:
    """``names`` maps names in the unwrapped module to those of its state dict, which contain wrappers' names."""
    found: dict[str, str] = {}
    for bare, name in names.items():
        one, other = bare.split("."), name.split(".")
        for count in range(len(one)):  # the common beginning
            if one[:count] != other[:count]:
                break
            found.setdefault(".".join(one[:count]), ".".join(other[:count]))
        for count in range(1, min(len(one), len(other)) + 1):  # the common end; wrappers are in between
            if one[-count:] != other[-count:]:
                break
            found[".".join(one[:-count])] = ".".join(other[:-count])
    return WrapperNames(found)


class _Copies(TorchFunctionMode):
    """Records copies to some tensors, by their ids, instead of doing them."""

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self._names = names
        self.sources: dict[str, list[Any]] = {}

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and id(args[0]) in self._names:
            self.sources.setdefault(self._names[id(args[0])], []).append(args[1])
            return args[0]
        return func(*args, **(kwargs or {}))


def _held(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _clone(module: nn.Module, clones: dict[int, nn.Module], *, has_post_hooks: bool) -> nn.Module:
    """Clone a module: same class and attributes, tensors on the meta device, submodules cloned."""
    if id(module) in clones:
        return clones[id(module)]
    clone: nn.Module = object.__new__(type(module))
    clones[id(module)] = clone
    attributes = {name: _container(value) for name, value in vars(module).items()}
    attributes["_parameters"] = {name: _on_meta(tensor) for name, tensor in module._parameters.items()}
    attributes["_buffers"] = {name: _on_meta(tensor) for name, tensor in module._buffers.items()}
    attributes["_modules"] = {
        name: part if part is None else _clone(part, clones, has_post_hooks=has_post_hooks)
        for name, part in module._modules.items()
    }
    vars(clone).update(attributes)
    hooks = module._load_state_dict_pre_hooks.items()
    vars(clone)["_load_state_dict_pre_hooks"] = OrderedDict((key, _hook_on(hook, clones)) for key, hook in hooks)
    if not has_post_hooks:
        vars(clone)["_load_state_dict_post_hooks"] = OrderedDict()  # those that act on a load
    return clone


def _container(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set, OrderedDict) else value


def _on_meta(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    if isinstance(tensor, UninitializedBuffer):
        return UninitializedBuffer(device="meta")  # type: ignore[call-arg]
    if isinstance(tensor, UninitializedParameter):
        return UninitializedParameter(device="meta")  # type: ignore[call-arg]
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _hook_on(hook: Any, clones: Mapping[int, nn.Module]) -> Any:
    """Rebind a hook of the module to its clone."""
    wrapped = getattr(hook, "hook", None)
    if wrapped is None:
        return _method_on(hook, clones)
    module = hook.module() if getattr(hook, "with_module", False) else None
    clone = clones.get(id(module)) if module is not None else None
    return type(hook)(_method_on(wrapped, clones), clone if clone is not None else module)


def _method_on(function: Callable[..., Any], clones: Mapping[int, nn.Module]) -> Callable[..., Any]:
    if not isinstance(function, types.MethodType) or (clone := clones.get(id(function.__self__))) is None:
        return function
    return types.MethodType(function.__func__, clone)
