"""Loading the state of a run's optimizers: as saved by ``optimizers``, by older versions, or by stock PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from milepost.errors import StateMismatchError
from milepost.format.manifest import TensorEntry
from milepost.loading.names import longest_prefix
from milepost.loading.optimizer import each_parameter, hand_over, indexed, state_tensor, want_state
from milepost.loading.parts import want_node
from milepost.loading.target import Target
from milepost.tensors.layout import torch_dtype
from milepost.tensors.state import LAZY
from milepost.tensors.tree import Node, child, rebuild
from milepost.tensors.value_writer import encode_object
from milepost.training.foreign_forms import by_parameter, wrapped_names
from milepost.training.optimizers import EMPTY_GROUPS, NAMES, PART, group_options, local_optimizer

SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
"""Options set by a schedule."""
_CYCLED = ("momentum", "betas")
"""Also options for which a schedule stored bounds."""

COUNTER = "step"
"""First entry of a parameter's state in torch's optimizers. Older checkpoints don't record the order."""


@dataclass(frozen=True, slots=True)
class _Saved:
    """The optimizer state of a checkpoint, by FQN: nodes of its tree."""

    state: dict[str, Node]
    """The state of each parameter: usually a mapping; for some optimizers a tensor or a list."""
    options: Mapping[str, Mapping[str, Node]]
    extra: Node
    keys: Mapping[str, Node]
    """The part unchanged, for optimizers with their own form."""

    def under(self, renamed: Mapping[str, str]) -> _Saved:
        """Under this run's names, of which ``renamed`` gives the saved ones where they differ."""
        here = {saved: name for name, saved in renamed.items()}
        state = {here.get(name, name): node for name, node in self.state.items()}
        return replace(self, state=state, options={here.get(name, name): o for name, o in self.options.items()})


def saved_optimizers(node: Node, names: Sequence[str], *, has_order: bool) -> _Saved:
    """Sort the entries below ``optimizer`` by this run's parameter names.

    Keys of stock PyTorch and of older checkpoints join the name and the rest in one text: the longest matching name is
    the right one.
    """
    part = node if isinstance(node, Mapping) else {}
    by_name: dict[str, dict[str, Any]] = {"state": {}, "param_groups": {}}
    known = set(names)
    for key, value in part.items():
        kind, dot, rest = str(key).partition(".")
        if dot and kind in by_name and rest in known:
            by_name[kind][rest] = dict(value) if isinstance(value, Mapping) else value
        elif dot and kind in by_name and (name := longest_prefix(rest, known)) is not None:
            _put(by_name[kind].setdefault(name, {}), rest[len(name) + 1 :].split("."), value)
    for name, entry in by_name["state"].items() if not has_order else ():
        if isinstance(entry, dict):
            by_name["state"][name] = dict(sorted(entry.items(), key=lambda item: item[0] != COUNTER))
    return _Saved(by_name["state"], by_name["param_groups"], part.get("extra"), part)


def _put(root: dict[str, Node], path: Sequence[str], value: Node) -> None:
    for element in path[:-1]:
        root = root.setdefault(element, {})
    root[path[-1]] = value


class OptimizersOwner:
    """All optimizers of a run, to load from the output of :func:`optimizer_state`, or of stock PyTorch."""

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        names: Mapping[nn.Parameter, str],
        own_form: Collection[Optimizer],
        *,
        keeps_rates: bool = False,
    ):
        self._optimizers = optimizers
        self._names = names
        self._saved = _Saved({}, {}, None, {})
        self._own_form = {number for number, optimizer in enumerate(optimizers) if optimizer in own_form}
        self._keeps_dtype: dict[str, bool] = {}
        self._keeps_rates = keeps_rates
        self._renamed: dict[str, str] = {}
        self._notes: dict[str, dict[str, None]] = {}
        self._excluded: dict[str, dict[str, Any]] = {}  # by parameter: state that stays as it is here

    def find_under(self, renamed: Mapping[str, str]) -> None:
        """Find the state of these parameters under the names from which the model's hooks take their weights."""
        self._renamed = {name: renamed[name] for name in self._names.values() if name in renamed}

    def prepare(self, target: Target) -> None:
        node = by_parameter(target, target.at((PART,)), self._names_by_group())
        renamed = self._renamed or wrapped_names(node, self._names.values())
        names = [renamed.get(name, name) for name in self._names.values()]
        self._saved = saved_optimizers(node, names, has_order=target.has_order).under(renamed)
        for number, optimizer in enumerate(self._optimizers):
            if number in self._own_form:
                want_node(target, self._saved.keys, partial(self._make_by_name, target), self._parameter_of)
                continue
            for group, parameter in each_parameter(optimizer):
                self._want(target, optimizer, group, parameter)
            want_node(target, child(self._saved.extra, str(number)))
        self._leave_frozen(target)
        self._keep_excluded(target)
        for what, keys in self._notes.items():
            target.note(what, list(keys))
        for parameter, name in self._names.items():
            entry = target.entry(name)
            self._keeps_dtype[name] = entry is None or torch_dtype(entry.dtype) == parameter.dtype

    def _names_by_group(self) -> list[list[str]]:
        """Return the names of each group's parameters, in their order; none for several optimizers."""
        if len(self._optimizers) != 1 or self._own_form:
            return []
        return [[self._names[parameter] for parameter in group["params"]] for group in self._optimizers[0].param_groups]

    def _want(self, target: Target, optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> None:
        name = self._names[parameter]
        if self._has_any and name not in self._saved.state and name not in self._saved.options:
            self._note("parameters new to the optimizer, with fresh state", name)
            return
        shape = target.stored_shape(self._renamed.get(name, name))
        is_resized = shape is not None and not isinstance(parameter, LAZY) and shape != tuple(parameter.shape)
        if is_resized or _steps_elsewhere(optimizer, parameter):
            target.leave(self._saved.state.pop(name, {}))
            if is_resized:
                self._note("parameters of another shape in the checkpoint, with fresh optimizer state", name)
        else:
            want_state(target, parameter, optimizer.state.get(parameter, {}), self._saved.state.get(name, {}))
        saved = self._saved.options.get(name, {})
        for option in group_options(group):
            if option in saved and not self._is_kept(option, saved, group):
                want_node(target, saved[option])
            elif option in saved or target.is_excluded(key := f"{PART}.param_groups.{name}.{option}"):
                target.leave(saved.get(option))
            elif option not in optimizer.defaults or group[option] is None or isinstance(group[option], bool):
                self._note("optimizer options missing from the checkpoint, kept as in this run", option)
            else:
                target.want_missing([key])
        for option in [option for option in saved if option not in group]:
            value = target.value_of(saved[option])
            if option in (NAMES, *SCHEDULED) or value is None or isinstance(value, bool):
                target.leave(saved[option])
            if option != NAMES and (option in SCHEDULED or value is None or isinstance(value, bool)):
                self._note("optimizer options of the checkpoint that this run does not have, ignored", option)

    def _is_kept(self, option: str, saved: Mapping[str, Node], group: Mapping[str, Any]) -> bool:
        """Return whether an option keeps this run's value: it is set by the schedule, which is not loaded."""
        is_cycled = option in _CYCLED and ("max_momentum" in saved or "max_momentum" in group)
        return self._keeps_rates and (option in SCHEDULED or is_cycled)

    def _note(self, what: str, key: str) -> None:
        self._notes.setdefault(what, {})[key] = None

    def _leave_frozen(self, target: Target) -> None:
        """Ignore state of model parameters that no optimizer steps any more."""
        stepped = {self._names[p] for optimizer in self._optimizers for _, p in each_parameter(optimizer)}
        known = set(self._names.values()) - stepped if not self._own_form else set[str]()
        for name in sorted(known & (self._saved.state.keys() | self._saved.options.keys())):
            target.leave(self._saved.state.get(name, {}))
            target.leave(self._saved.options.get(name, {}))
            self._note("parameters that no optimizer steps any more, state ignored", name)

    def _keep_excluded(self, target: Target) -> None:
        """Keep this run's values of the elements of parameters' state that the user excluded from loading."""
        start = f"{PART}.state."
        excluded: dict[str, set[str]] = {}
        for key in target.excluded_keys:
            name = longest_prefix(key.removeprefix(start), self._names.values()) if key.startswith(start) else None
            if name is not None:
                element = key.removeprefix(f"{start}{name}.").partition(".")[0]
                excluded.setdefault(name, set()).add(element)
        for optimizer in self._optimizers:
            for _, parameter in each_parameter(optimizer) if not self._own_form else ():
                name = self._names[parameter]
                here = optimizer.state.get(parameter, {})
                elements = excluded.get(name, set())
                self._excluded[name] = {key: here[key] for key in here if key in elements} if elements else {}
                lacking = sorted(elements - self._excluded[name].keys())
                if lacking and self._saved.state.get(name):
                    target.mismatched.append(
                        f"{start}{name}: {', '.join(lacking)} excluded, and this run has none yet (exclude "
                        f"{start}{name}.*, or take none of it out)"
                    )

    def _make_by_name(self, target: Target, key: str, entry: TensorEntry) -> torch.Tensor:
        parameter = self._parameter_of(key)
        if parameter is None:
            return target.new_tensor(key, entry)
        return state_tensor(parameter, entry, target.placement_of(key))

    def _parameter_of(self, key: str) -> nn.Parameter | None:
        """Return the parameter whose state is under a key of the checkpoint."""
        name = longest_prefix(key.removeprefix(f"{PART}.state."), set(self._names.values()))
        return next((parameter for parameter, known in self._names.items() if known == name), None)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise StateMismatchError if parameters of one group were saved with different options."""
        for number, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups if number not in self._own_form else ():
                self._check_group(group, values)

    def _check_group(self, group: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        names = self._known(group)
        for option in group_options(group):
            if names and self._is_kept(option, self._saved.options[names[0]], group):
                continue
            first: Any = None
            for name in names:
                node = self._saved.options.get(name, {}).get(option)
                value = rebuild(node, values)
                if name == names[0]:
                    first = value
                elif _differs(value, first):
                    raise StateMismatchError(
                        f"the optimizer puts {name} in one group with {names[0]}, but they were saved with different "
                        f"values of {option} ({value} and {first}); group them as in the saved run. Nothing was "
                        f"changed",
                    )

    def _known(self, group: Mapping[str, Any]) -> list[str]:
        """Return the names of a group's parameters with options in the checkpoint."""
        names = [self._names[parameter] for parameter in group["params"]]
        return [name for name in names if name in self._saved.options]

    @property
    def _has_any(self) -> bool:
        return bool(self._saved.state or self._saved.options)

    def adopt(self, replaced: Mapping[Any, Any]) -> None:
        """Switch to parameters that replaced others (see ``ModuleOwner.replaced``)."""
        self._names = {replaced.get(parameter, parameter): name for parameter, name in self._names.items()}
        take_place(self._optimizers, replaced)

    def restore(self, values: Mapping[str, Any]) -> None:
        for number, optimizer in enumerate(self._optimizers):
            if number in self._own_form:
                optimizer.load_state_dict(rebuild(self._saved.keys, values))
                continue
            indices = indexed(optimizer)
            names = {index: self._names[parameter] for parameter, index in indices.items()}
            state = {
                i: rebuild(self._saved.state[name], values) for i, name in names.items() if name in self._saved.state
            }
            for i, name in names.items():
                if self._excluded.get(name):
                    state[i] = {**state.get(i, {}), **self._excluded[name]}
            extra = rebuild(child(self._saved.extra, str(number)), values) or {}
            shared, empty = extra.pop("state", {}), extra.pop(EMPTY_GROUPS, {})
            groups = [
                {
                    **(self._group(group, values) if group["params"] else self._empty_group(group, empty.get(str(n)))),
                    "params": [indices[parameter] for parameter in group["params"]],
                }
                for n, group in enumerate(optimizer.param_groups)
            ]
            hand_over(
                optimizer,
                {"state": {**state, **shared}, "param_groups": groups, **extra},
                keeps_dtype={index: self._keeps_dtype[name] for index, name in names.items()},
            )

    def _empty_group(self, group: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the options of a group without parameters, like :meth:`_group`."""
        found = {option: group[option] for option in group if option != "params"}
        taken = saved if saved is not None else {}
        return found | {o: taken[o] for o in group_options(group) if o in taken and not self._is_kept(o, taken, group)}

    def _group(self, group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group's options: the saved ones, and this run's where the checkpoint has none."""
        found = {option: group[option] for option in group if option != "params"}
        known = self._known(group)
        saved = self._saved.options[known[0]] if known else {}
        for option in group_options(group):
            if option in saved and not self._is_kept(option, saved, group):
                value = rebuild(saved[option], values)
                here = group[option]
                if isinstance(value, torch.Tensor) and isinstance(here, torch.Tensor):
                    value = value.to(here.device)
                found[option] = value
        return found


def _steps_elsewhere(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Return whether another rank has the state of a parameter (see :func:`state_dict_of`)."""
    local = local_optimizer(optimizer)
    return local is not None and all(parameter is not p for group in local.param_groups for p in group["params"])


def take_place(optimizers: Sequence[Optimizer], replaced: Mapping[Any, Any]) -> None:
    """Let optimizers created for parameters on the meta device step the loaded ones."""
    for optimizer in optimizers if replaced else ():
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
        for old in [parameter for parameter in optimizer.state if parameter in replaced]:
            optimizer.state[replaced[old]] = optimizer.state.pop(old)


def _differs(one: Any, other: Any) -> bool:
    try:
        if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
            equal = torch.equal(torch.as_tensor(one, device="cpu"), torch.as_tensor(other, device="cpu"))
        else:
            equal = bool(one == other)
    except (RuntimeError, TypeError, ValueError):  # an array or nested tensors: comparison is not a single bool
        equal = False
    return not equal and encode_object("", one) != encode_object("", other)  # in which NaN equals NaN
