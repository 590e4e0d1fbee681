"""The owners of a run's parts: how each object gets its state from a checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from milepost.errors import StateMismatchError
from milepost.loading.module import ModuleOwner
from milepost.loading.optimizer import OptimizerOwner
from milepost.loading.parts import LikeOf, want_node
from milepost.loading.stateful import StatefulOwner, check_state, has_check
from milepost.loading.target import Restorer, Stored, Target
from milepost.tensors.tree import Node, rebuild
from milepost.training.modules import fqn
from milepost.training.random_state import derive_rng_state, set_rng_state

log = logging.getLogger("milepost")


class SeveralSchedulers:
    """Several schedulers as one object: their states by position."""

    def __init__(self, schedulers: Sequence[Any]):
        self._schedulers = schedulers

    def load_state_dict(self, states: Sequence[Any]) -> None:
        for scheduler, state in zip(self._schedulers, states, strict=True):
            scheduler.load_state_dict(state)


def module_owner(part: nn.Module) -> ModuleOwner:
    """A part of the model, its keys at the top level."""
    return ModuleOwner(part, lambda name: (fqn(part, name),))


def owner_of_any(stateful: Any, path: tuple[str, ...], stored: Stored, like_of: LikeOf) -> Restorer:
    """Return the owner of a user's object. Its DTensors are restored with its own or the model's sharding.

    Its state is requested only if needed, because some objects can't report it before they are loaded.
    """
    own = None
    start = ".".join(path) + "."
    if torch.distributed.is_initialized() and any(key.startswith(start) for key in stored.manifest.tensors):
        try:
            own = stateful.state_dict()
        except Exception as error:  # noqa: BLE001 - it may raise anything before it is filled
            log.debug("%s can't report its state before it is loaded: %s", type(stateful).__name__, error)
    return StatefulOwner(stateful, path, own=own, like_of=like_of)


def state_owner(stateful: Any, path: tuple[str, ...], stored: Stored, like_of: LikeOf) -> Restorer:
    """Return the owner of a user's object with its state below ``path``."""
    if isinstance(stateful, nn.Module):
        return ModuleOwner(stateful, lambda entry: (*path, entry))
    if isinstance(stateful, Optimizer) and type(stateful).state_dict is Optimizer.state_dict:
        return OptimizerOwner(stateful, path)
    return owner_of_any(stateful, path, stored, like_of)


class PerRankOwner:
    """A part that was saved for each rank. On the same layout each rank gets its own state back.

    On another one the object's ``reshard(states)`` is called with all saved states, in the order of the old ranks, and
    returns this rank's state.
    """

    def __init__(self, stateful: Any, part: str, rank: int, *, same_layout: bool):
        self._stateful = stateful
        self._part = part
        self._rank = rank
        self._same_layout = same_layout
        self._nodes: list[Node] = []
        self._states: list[Any] = []  # at most one: for this rank

    def prepare(self, target: Target) -> None:
        whole = target.at((self._part,))
        found = whole if isinstance(whole, Mapping) else {}
        ranks = sorted(int(name[4:]) for name in found if re.fullmatch(r"rank\d{1,6}", str(name)))
        if self._same_layout:
            if self._rank not in ranks:
                target.want_missing([f"{self._part}.rank{self._rank}"])
            else:
                self._nodes = [found[f"rank{self._rank}"]]
            for rank in ranks:
                if rank != self._rank:
                    target.leave(found[f"rank{rank}"])
        elif callable(getattr(self._stateful, "reshard", None)):
            self._nodes = [found[f"rank{rank}"] for rank in ranks]
        else:
            raise StateMismatchError(
                f"the checkpoint holds the state of {self._part} for each of {len(ranks)} ranks, and this run has "
                "other ranks or degrees of parallelism; nothing was changed. Resume on the same ones, give the object "
                "a method reshard(states) that returns this rank's state from all of them, or set "
                f"checkpoint.exclude_from_loading = {self._part}: it then starts newly initialized",
                mismatched=[f"{self._part}: saved for each of {len(ranks)} ranks"],
            )
        for node in self._nodes:
            want_node(target, node)

    def check(self, values: Mapping[str, Any]) -> None:
        """Reshard if needed, and let the object look at its state: nothing has been changed yet if it refuses."""
        self._states = [rebuild(node, values) for node in self._nodes]
        if self._states and not self._same_layout:
            method = f"{self._part}: {type(self._stateful).__name__}.reshard(states)"
            try:
                state = self._stateful.reshard(self._states)
            except Exception as error:
                raise StateMismatchError(
                    f"{method} raised {type(error).__name__}: {error}. Nothing was changed"
                ) from error
            if state is None:
                raise StateMismatchError(f"{method} returned None, not the state for this rank. Nothing was changed")
            self._states = [state]
        if self._states and has_check(self._stateful):
            check_state(self._stateful, self._states[0], (self._part,))

    def restore(self, values: Mapping[str, Any]) -> None:
        for state in self._states:
            self._stateful.load_state_dict(state)


class RngOwner:
    """This process's random generators: restored on the same layout, else derived from rank 0's."""

    def __init__(self, rank: int, *, same_layout: bool):
        self._rank = rank
        self._same_layout = same_layout
        self._node: Node = None
        self._is_left = False
        self.note = ""

    def prepare(self, target: Target) -> None:
        path = ("rng", f"rank{self._rank}") if self._same_layout else ("rng", "rank0", "torch")
        self._is_left = any(key.startswith("rng.") for key in target.excluded_keys)
        self._node = None if self._is_left else target.at(path)
        want_node(target, self._node)

    def check(self, values: Mapping[str, Any]) -> None:
        """Any state fits."""

    def restore(self, values: Mapping[str, Any]) -> None:
        if self._is_left:  # part of their state is useless
            self.note = "random generators keep this run's seeds"
        elif self._node is None:
            self.note = "it holds no random state: the generators keep this run's seeds"
        elif self._same_layout:
            set_rng_state(rebuild(self._node, values))
        else:
            derive_rng_state(rebuild(self._node, values), self._rank)
            self.note = (
                "saved under other degrees of parallelism: each rank's random generators were reseeded from "
                "the saved ones"
            )
