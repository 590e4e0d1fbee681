"""The optimizers of a run: state keyed by parameter name, so that it can be loaded into other groups, ranks and stages.

Keys are those of stock PyTorch's flattened form: ``state.<fqn>.<name>`` and ``param_groups.<fqn>.<option>``. State
outside parameters is stored below ``extra.<number of the optimizer>``. An optimizer whose ``state_dict()`` has its own
form (usually a container of others) is saved and loaded in that form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from milepost.errors import ConfigError, SaveError
from milepost.loading.optimizer import each_parameter, indexed
from milepost.tensors.state import ByName

PART = "optimizer"
NAMES = "param_names"
"""An option of groups created from named parameters. It repeats the keys, so it is not stored."""

EMPTY_GROUPS = "empty_groups"
"""Key, beside the state outside parameters, of the options of groups without parameters, by index."""


def unfold(optimizers: Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    """Return the optimizers that hold state: instead of a container without its own state, those that it contains."""
    found: list[Optimizer] = []
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizers", None)
        is_container = (
            isinstance(inner, list | tuple)
            and bool(inner)
            and all(isinstance(item, Optimizer) for item in inner)
            and getattr(type(optimizer), "state_dict", None) is Optimizer.state_dict
            and not optimizer.state
        )
        found += unfold(inner) if is_container and inner is not None else (optimizer,)
    return tuple(found)


def check_parameters(optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str]) -> None:
    """Refuse parameters whose state could not be restored.

    Raises:
        ConfigError: an optimizer steps a parameter outside all model parts, or two step the same one.
    """
    owner_of: dict[nn.Parameter, Optimizer] = {}
    for optimizer in optimizers:
        for _, parameter in each_parameter(optimizer) if isinstance(optimizer, Optimizer) else ():
            if owner_of.setdefault(parameter, optimizer) is not optimizer and parameter in names:
                raise ConfigError(
                    f"{type(owner_of[parameter]).__name__} and {type(optimizer).__name__} both step "
                    f"'{names[parameter]}': each parameter may be in one optimizer"
                )
            if parameter not in names:
                raise ConfigError(
                    f"{type(optimizer).__name__} steps a parameter of shape {list(parameter.shape)} that is in no "
                    f"model part given to the CheckpointManager, so that its state could not be stored by its name: "
                    f"register it in the model, or give the optimizer as one of the states, numbered by its groups: "
                    f'states={{"optimizer": optimizer}}, and its parameters in train_state'
                )


def check_still_there(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Refuse an optimizer whose parameters the model no longer has.

    Raises:
        ConfigError: the model was wrapped, moved or changed since the manager was created.
    """
    gone = [parameter for _, parameter in each_parameter(optimizer) if parameter not in names]
    if gone:
        raise ConfigError(
            f"{type(optimizer).__name__} steps {len(gone)} parameters that are not in the model (the first has shape "
            f"{list(gone[0].shape)}): the model was wrapped (FSDP, tensor parallel, adapters) or changed after "
            "its optimizer or the CheckpointManager was created. Wrap the model, then create the optimizer, then the "
            "manager"
        )


def optimizer_state(optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Return all optimizers' state and options, keyed by FQN. Tensors share memory with the optimizers.

    Raises:
        SaveError: two optimizers would be stored under the same key.
        ConfigError: an optimizer steps parameters that the model no longer has.
    """
    merged = ByName()
    for number, optimizer in enumerate(optimizers):
        state_dict = state_dict_of(optimizer)
        _check_hidden(optimizer)
        if not has_numbered_parameters(state_dict, optimizer):  # its own form, or one made by a hook
            _merge(merged, state_dict, optimizer)
            continue
        check_still_there(optimizer, names)
        numbers = {index: names[p] for p, index in indexed(optimizer).items()}
        entries = state_dict["state"]
        for index, entry in entries.items():
            if index in numbers:
                _merge(merged, _by_name(f"state.{numbers[index]}", entry), optimizer)
        for group in state_dict["param_groups"]:
            options = group_options(group)
            for index in group["params"]:
                _merge(merged, _by_name(f"param_groups.{numbers[index]}", options), optimizer)
        extra: dict[str, Any] = {k: v for k, v in state_dict.items() if k not in ("state", "param_groups")}
        empty = {str(n): group for n, group in enumerate(state_dict["param_groups"]) if not group["params"]}
        if empty:  # options without parameters
            extra[EMPTY_GROUPS] = {number: group_options(group) for number, group in empty.items()}
        if shared := {index: entry for index, entry in entries.items() if index not in numbers}:
            extra["state"] = shared
        if extra:
            merged.setdefault("extra", {})[str(number)] = extra
    return merged


def state_dict_of(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's ``state_dict()``; for PyTorch's ZeroRedundancyOptimizer, that of the local optimizer.

    Its own ``state_dict()`` works on one rank only. Each rank saves the state of the parameters that it steps by FQN,
    so that other ranks find it.
    """
    local = local_optimizer(optimizer)
    if local is None:
        return optimizer.state_dict()
    numbers = indexed(optimizer)
    return {
        "state": {numbers[p]: local.state[p] for _, p in each_parameter(local) if p in local.state},
        "param_groups": [{**one, "params": [numbers[p] for p in one["params"]]} for one in optimizer.param_groups],
    }


def local_optimizer(optimizer: Any) -> Optimizer | None:
    """The optimizer of this rank's parameters in a ZeroRedundancyOptimizer; None for any other kind."""
    is_zero = any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
    return optimizer.optim if is_zero else None


def _check_hidden(optimizer: Optimizer) -> None:
    """Refuse a wrapper whose ``state_dict()`` leaves out the state of the optimizer that it wraps, as SAM's does.

    Raises:
        SaveError: it has such state.
    """
    if getattr(type(optimizer), "state_dict", None) is not Optimizer.state_dict:
        return
    for name, inner in vars(optimizer).items():
        if not isinstance(inner, Optimizer) or inner.state is optimizer.state:
            continue
        entries = [entry.values() if isinstance(entry, Mapping) else [entry] for entry in inner.state.values()]
        if any(value is not None for values in entries for value in values):
            kind, wrapped = type(optimizer).__name__, type(inner).__name__
            raise SaveError(
                f"{kind}.state_dict() leaves out the state of the {wrapped} that it wraps as `{name}`, which would be "
                f"lost: give CheckpointManager that one, and the {kind} beside it: optimizer=optimizer.{name}, "
                f'states={{"{kind.lower()}": optimizer}}',
                key=PART,
            )


def _by_name(prefix: str, entry: Any) -> dict[str, Any]:
    """Return a parameter's entry under flat keys; as one mapping if flat keys would be ambiguous."""
    if not isinstance(entry, Mapping) or not all(type(key) is str and "." not in key for key in entry):
        return {prefix: entry}
    return {f"{prefix}.{key}": value for key, value in entry.items()}


def _merge(into: dict[str, Any], more: Mapping[str, Any], optimizer: Optimizer) -> None:
    for key, value in more.items():
        if key in into:
            raise SaveError(
                f"{type(optimizer).__name__} and another optimizer both have state for '{key}': give one of them to "
                "the CheckpointManager, or let each step different parameters",
                key=f"{PART}.{key}",
            )
        into[key] = value


def of_own_form(optimizers: Sequence[Optimizer]) -> frozenset[Optimizer]:
    """Return optimizers whose ``state_dict()`` is neither torch's nor of its form."""
    return frozenset(
        optimizer
        for optimizer in optimizers
        if getattr(type(optimizer), "state_dict", None) is not Optimizer.state_dict
        and not has_numbered_parameters(state_dict_of(optimizer), optimizer)
    )


def has_numbered_parameters(state_dict: Any, optimizer: Optimizer) -> bool:
    """Return whether a state dict has the form of ``torch.optim.Optimizer``'s, for the optimizer's groups."""
    if not (isinstance(state_dict, Mapping) and isinstance(state_dict.get("state"), Mapping)):
        return False
    groups = state_dict.get("param_groups")
    if not (
        isinstance(groups, list) and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    ):
        return False
    return [len(group["params"]) for group in groups] == [len(group["params"]) for group in optimizer.param_groups]


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options, without its parameters and their names."""
    return {option: value for option, value in group.items() if option not in ("params", NAMES)}
