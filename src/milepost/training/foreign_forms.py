"""Optimizer state as other programs save it, brought into the form of ``optimizers.optimizer_state``.

Stock PyTorch saves it flattened by parameter (torchtitan does so), or, by default, as the optimizer's own
``state_dict()``: a state for each parameter, and a list of groups with the names, or the numbers, of their parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from milepost.loading.names import renames
from milepost.loading.target import Target
from milepost.tensors.tree import Node, child


def by_parameter(target: Target, node: Node, own_groups: Sequence[Sequence[str]]) -> Node:
    """Return the entries below ``optimizer`` by parameter, if they are saved with groups as a list; others unchanged.

    Groups may give the numbers of their parameters. ``own_groups``, the names in each group of this run's optimizer,
    say which are meant, if they have as many as the saved ones (the check of PyTorch's own ``load_state_dict()``);
    otherwise the numbers stay, and fit nothing here.
    """
    groups = child(node, "param_groups") if isinstance(node, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return node
    members = [target.value_of(child(group, "params")) for group in groups]
    if not all(isinstance(each, list | tuple) for each in members):
        return node
    names = {}
    if [*map(len, members)] == [*map(len, own_groups)]:
        pairs = (pair for each, own in zip(members, own_groups, strict=True) for pair in zip(each, own, strict=True))
        names = {number: name for number, name in pairs if isinstance(number, int)}
    found: dict[Any, Node] = {}
    for group, each in zip(groups, members, strict=True):
        target.leave(child(group, "params"))
        options = {option: value for option, value in group.items() if option != "params"}
        found |= {f"param_groups.{names.get(parameter, parameter)}": options for parameter in each}
    state = child(node, "state")
    for name, entry in state.items() if isinstance(state, Mapping) else ():
        number = int(name) if str(name).isdecimal() else -1
        found[f"state.{names.get(number, name)}"] = entry
    return found


def wrapped_names(node: Node, names: Collection[str]) -> dict[str, str]:
    """Map parameters to the names under which their state is saved, if these have a wrapper's prefix.

    For instance ``module.`` of ``nn.DataParallel``; ``loading.names.renames`` does this for the weights.
    """
    entries = node.items() if isinstance(node, Mapping) else ()
    keys = [(*str(key).partition(".")[::2], isinstance(value, Mapping)) for key, value in entries]
    # The keys of stock PyTorch's flattened form end with the name of an option or of a tensor of the state.
    saved = {
        name if is_whole else name.rpartition(".")[0]
        for kind, name, is_whole in keys
        if kind in ("state", "param_groups")
    }
    return {} if saved & set(names) else renames(saved, names)
