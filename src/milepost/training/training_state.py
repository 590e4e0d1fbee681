"""The full training state as one state dict, part by part, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from milepost.config import PARTS, PER_RANK_PARTS, part_of
from milepost.errors import ConfigError, StateMismatchError, listed
from milepost.loading.module import ModuleOwner
from milepost.loading.parts import LikeOf
from milepost.loading.restoring import restore_each
from milepost.loading.stateful import StatefulOwner
from milepost.loading.target import Restorer, Stored, Target
from milepost.tensors.placements import meshes_of
from milepost.tensors.state import PER_RANK, ByName
from milepost.training.given_options import given_options, replaced_options
from milepost.training.modules import fqn, model_state, module_versions, parameter_names
from milepost.training.optimizers import check_parameters, check_still_there, of_own_form, optimizer_state, unfold
from milepost.training.optimizers_owner import OptimizersOwner, take_place
from milepost.training.owners import PerRankOwner, RngOwner, SeveralSchedulers, module_owner, state_owner
from milepost.training.random_state import rng_state

_ADVICE = (
    "Don't continue training: fix the cause and call load() again, leave the part out with "
    "checkpoint.exclude_from_loading, or restart the program. Nothing is saved until a load succeeds"
)

KINDS = "kinds"
"""Under this name the manifest's ``extra`` has the classes of optimizers and schedulers."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingState:
    """The live objects of a run on this rank. Absent parts are empty or None."""

    models: tuple[nn.Module, ...]
    optimizers: tuple[Optimizer, ...]
    schedulers: tuple[Any, ...]
    dataloader: Any
    train_state: Any
    rank: int
    states: Mapping[str, Any] = field(default_factory=dict)
    """Further objects by name."""

    @classmethod
    def of(
        cls,
        *,
        model: Any,
        optimizer: Any,
        lr_scheduler: Any,
        dataloader: Any,
        train_state: Any,
        states: Mapping[str, Any],
        rank: int,
    ) -> TrainingState:
        """Create it from the arguments of a :class:`CheckpointManager`.

        Raises:
            ConfigError: there is no model, a name in the model is reserved for a part, or one of ``states`` has no
            state.
        """
        optimizers = unfold(_several(optimizer))
        state = cls(
            *(_several(model), optimizers, _several(lr_scheduler), dataloader, train_state, rank),
            states=_checked_states(states),
        )
        if not state.models:
            raise ConfigError("CheckpointManager needs a model")
        check_parameters(state.optimizers, parameter_names(state.models))
        taken = sorted({key for key in model_state(state.models) if part_of(key) != "model"})
        if taken:
            raise ConfigError(
                f"the model has '{taken[0]}', but keys that start with '{part_of(taken[0])}.' are "
                "reserved for that part "
                "of the training state; rename the module"
            )
        return state

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules of this run: the model's parts, and modules among the further objects."""
        return (*self.models, *(state for state in self.states.values() if isinstance(state, nn.Module)))

    def kinds(self) -> dict[str, list[str]]:
        """The classes of optimizers and schedulers that are PyTorch's own, by part; empty text for any other."""
        return {"optimizer": [*map(_kind, self.optimizers)], "lr_scheduler": [*map(_kind, self.schedulers)]}

    def model_keys(self) -> frozenset[str]:
        """Return the keys of the model's state."""
        return frozenset(model_state(self.models))

    def present(self) -> tuple[str, ...]:
        """The parts that this run has, in the order of ``PARTS``."""
        has = {
            "model": True,
            "optimizer": bool(self.optimizers),
            "lr_scheduler": bool(self.schedulers),
            "dataloader": self.dataloader is not None,
            "train_state": self.train_state is not None,
            "states": bool(self.states),
            "rng": True,
            "attached": False,  # belongs to a save, not to the run
        }
        return tuple(part for part in PARTS if has[part])

    def frozen_keys(self) -> frozenset[str]:
        """Return the keys of frozen parameters."""
        return frozenset(
            fqn(part, name)
            for part in self.models
            for name, parameter in part.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad
        )

    def state_dict(self, wanted: Collection[str], *, only_trainable: bool = False) -> dict[str, Any]:
        """Return the state of the ``wanted`` parts. Model and optimizer tensors share memory with the live ones.

        ``only_trainable`` leaves out frozen parameters.
        """
        state = ByName()
        if "model" in wanted:
            left_out = self.frozen_keys() if only_trainable else frozenset()
            state.versions = module_versions(self.models)
            state.update({key: value for key, value in model_state(self.models).items() if key not in left_out})
        if "optimizer" in wanted:
            state["optimizer"] = optimizer_state(self.optimizers, parameter_names(self.models))
        if "lr_scheduler" in wanted:
            saved = [scheduler.state_dict() for scheduler in self.schedulers]
            state["lr_scheduler"] = saved[0] if len(saved) == 1 else saved
        if "dataloader" in wanted:
            state["dataloader"] = self.dataloader.state_dict()
        if "train_state" in wanted:
            state["train_state"] = self.train_state.state_dict()
        if "states" in wanted:
            state["states"] = {name: stateful.state_dict() for name, stateful in self.states.items()}
        if "rng" in wanted:
            state["rng"] = {f"rank{self.rank}": rng_state()}
        return state

    def loading(
        self, wanted: Collection[str], stored: Stored, *, same_layout: bool, excluded: Collection[str] = ()
    ) -> StateLoad:
        """Return the load into the live objects. The ``excluded`` parts are left out, as configured.

        Raises:
            StateMismatchError: the checkpoint lacks a requested part.
        """
        found = self._parts_in(stored)
        lacking = [part for part in wanted if part not in found and part != "rng"]
        if lacking:
            raise StateMismatchError(
                f"the checkpoint holds no {', no '.join(lacking)} (it holds {', '.join(sorted(found))}); to leave "
                f"{'it' if len(lacking) == 1 else 'them'} as initialized, set checkpoint.exclude_from_loading = "
                f"{','.join(lacking)}",
                missing=lacking,
            )
        if self.rank == 0:  # which has recorded its own
            self._check_kinds([part for part in wanted if has_part(stored, part)], stored.manifest.extra.get(KINDS))
        # A schedule that is left out starts with this run's rates, not at the saved position.
        keeps_rates = "lr_scheduler" in excluded and (bool(self.schedulers) or "lr_scheduler" in found)
        owners = self._owners(wanted, stored, same_layout=same_layout, keeps_rates=keeps_rates)
        chosen = [(part, owner) for part in PARTS if part in wanted for owner in owners[part]]
        further = iter(self.states)
        chosen = [(f"{part}.{next(further)}" if part == "states" else part, owner) for part, owner in chosen]
        target = Target(stored)
        target.meshes = meshes_of(parameter for module in self.modules for parameter in module.parameters())
        sets_rates = "lr_scheduler" in wanted and "optimizer" not in wanted
        return StateLoad(target, chosen, self.optimizers, self.schedulers, self.schedulers if sets_rates else ())

    def _parts_in(self, stored: Stored) -> set[str]:
        """Return the parts of a training state that a checkpoint holds."""
        found = {part if part in PARTS[1:] else "model" for part in map(str, stored.tree.root)}
        found |= {part_of(key) for key in stored.keys}
        if not self.model_keys():
            found.add("model")  # of which there is nothing to hold
        return found

    def _owners(
        self, wanted: Collection[str], stored: Stored, *, same_layout: bool, keeps_rates: bool
    ) -> dict[str, list[Restorer]]:
        """Return the objects of each part to load, as those that get their state from the checkpoint."""
        owners: dict[str, list[Restorer]] = {"model": [module_owner(part) for part in self.models]}
        if "optimizer" in wanted:
            # Not called earlier: some create their state on request, by a step that a new run must not take.
            own_form = of_own_form(self.optimizers)
            names = parameter_names(self.models)
            for optimizer in self.optimizers:
                if optimizer not in own_form:
                    check_still_there(optimizer, names)
            owners["optimizer"] = [OptimizersOwner(self.optimizers, names, own_form, keeps_rates=keeps_rates)]
        owners["dataloader"] = [StatefulOwner(self.dataloader, ("dataloader",))]
        like_of = self._sharded_alike()
        owners["train_state"] = [state_owner(self.train_state, ("train_state",), stored, like_of)]
        owners["states"] = [
            state_owner(stateful, ("states", name), stored, like_of) for name, stateful in self.states.items()
        ]
        saved_per_rank = stored.manifest.extra.get(PER_RANK)
        per_rank = saved_per_rank if isinstance(saved_per_rank, list) else []
        if "lr_scheduler" in wanted and "lr_scheduler" not in per_rank:
            owners["lr_scheduler"] = self._scheduler_owners(stored)
        for part in (part for part in PER_RANK_PARTS if part in per_rank and part in wanted):
            owners[part] = [PerRankOwner(self._owner_of(part, stored), part, self.rank, same_layout=same_layout)]
        owners["rng"] = [RngOwner(self.rank, same_layout=same_layout)]
        return owners

    def loading_weights(self) -> StateLoad:
        """Return the load of weights from another run: into the tensors of the target."""
        return StateLoad(Target(None), [("model", module_owner(part)) for part in self.models], self.optimizers)

    def _sharded_alike(self) -> LikeOf:
        """Return the model's DTensor with the name of another object's tensor, if any.

        Averages of weights have the weights' names and sharding. On one process nothing is sharded.
        """
        named = {key: tensor for key, tensor in model_state(self.models).items() if isinstance(tensor, DTensor)}

        def like_of(key: str) -> torch.Tensor | None:
            while named and key:
                if key in named:
                    return named[key]
                key = key.partition(".")[2]
            return None

        return like_of

    def _owner_of(self, part: str, stored: Stored) -> Any:
        """Return the object into which a part's state is loaded."""
        if part == "lr_scheduler":
            by_rank = stored.tree.root.get(part)
            saved = next(iter(by_rank.values()), None) if isinstance(by_rank, Mapping) else None
            self._check_number(len(saved) if isinstance(saved, list) else 1)
            return self.schedulers[0] if len(self.schedulers) == 1 else SeveralSchedulers(self.schedulers)
        return self.dataloader if part == "dataloader" else self.train_state

    def _scheduler_owners(self, stored: Stored) -> list[Restorer]:
        """Return owners of schedulers: states by position; in older checkpoints all have the first one's."""
        saved = stored.tree.root.get("lr_scheduler")
        if not isinstance(saved, list):
            if stored.manifest.structure:  # not recorded in older checkpoints
                self._check_number(1)
            return [StatefulOwner(scheduler, ("lr_scheduler",)) for scheduler in self.schedulers]
        self._check_number(len(saved))
        return [StatefulOwner(scheduler, ("lr_scheduler", n)) for n, scheduler in enumerate(self.schedulers)]

    def _check_kinds(self, parts: Collection[str], recorded: Any) -> None:
        """Raise StateMismatchError if the state belongs to another class of optimizer or scheduler."""
        recorded = recorded if isinstance(recorded, Mapping) else {}
        for part, here in self.kinds().items():
            saved = recorded.get(part) if part in parts else None
            if not isinstance(saved, list) or not all([*saved, *here]):
                continue
            differ = not {*here} <= {*saved} if part == "optimizer" else len(here) == len(saved) and here != saved
            if differ:
                raise StateMismatchError(
                    f"{part}: the checkpoint holds the state of {', '.join(dict.fromkeys(saved))}, this run has "
                    f"{', '.join(dict.fromkeys(here))}, which would continue from it differently; nothing was changed. "
                    f"To leave it as initialized, set checkpoint.exclude_from_loading = {part}",
                    mismatched=[f"{part}: {', '.join(saved)} in the checkpoint, {', '.join(here)} here"],
                )

    def _check_number(self, saved: int) -> None:
        """Raise StateMismatchError if the number of schedulers differs from the saved one."""
        if saved != len(self.schedulers):
            here = _schedulers(len(self.schedulers))
            raise StateMismatchError(
                f"the checkpoint holds the states of {_schedulers(saved)}, this run has {here}; "
                "nothing was changed. Give as many as were saved, in the same order, or set "
                "checkpoint.exclude_from_loading = lr_scheduler",
                mismatched=[f"lr_scheduler: {_schedulers(saved)} in the checkpoint, {len(self.schedulers)} here"],
            )


def _kind(stateful: Any) -> str:
    kind = type(stateful)
    # Some are in the package itself (Muon, Adafactor), others in modules of it.
    return kind.__qualname__ if f"{kind.__module__}.".startswith("torch.optim.") else ""


def has_part(stored: Stored, part: str) -> bool:
    """Return whether anything is stored of a part, and not excluded."""
    manifest = stored.manifest
    return any(key.startswith(f"{part}.") for keys in (manifest.tensors, manifest.objects) for key in keys)


def _schedulers(number: int) -> str:
    return f"{number} scheduler{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True, eq=False)
class StateLoad:
    """One load into the live objects of a run: first read everything, then restore."""

    target: Target
    owners: Sequence[tuple[str, Restorer]]
    """With the part of the training state that each belongs to."""
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[Any] = ()
    rate_setters: Sequence[Any] = ()
    """Schedulers loaded without their optimizers, which get the schedule's current rates."""

    def prepare(self) -> Target:
        """Collect the target state of the objects, without changing them."""
        renamed: dict[str, str] = {}
        for _, owner in self.owners:
            if isinstance(owner, OptimizersOwner):
                owner.find_under(renamed)
            owner.prepare(self.target)
            if isinstance(owner, ModuleOwner):
                renamed.update(owner.renamed)
        return self.target

    def check(self) -> None:
        """Refuse what does not fit, once all but the live tensors is read."""
        for _, owner in self.owners:
            owner.check(self.target.values)

    def restore(self) -> list[str]:
        """Restore the objects from the data read. Returns remarks for the log.

        Raises:
            PartlyLoadedError: one of them raised.
        """
        replaced: dict[torch.Tensor, torch.Tensor] = {}
        before = self._options()
        restore_each([(part, partial(self._restore, owner, replaced)) for part, owner in self.owners], advice=_ADVICE)
        notes = [owner.note for _, owner in self.owners if isinstance(owner, RngOwner) and owner.note]
        take_place(self.optimizers, replaced)  # even if their state is not loaded
        for scheduler in self.rate_setters:
            set_rates(scheduler)
        options = list(replaced_options(before, self._options()))
        if options:
            what = "options as in the checkpoint, not as this run gave them (exclude_from_loading keeps these)"
            notes.append(f"{what}: {'; '.join(listed(options, 8))}")
        return notes

    def _options(self) -> dict[str, Any]:
        """Return this run's options of the optimizers and schedulers that are loaded."""
        parts = {part for part, _ in self.owners}
        return given_options(
            self.optimizers if "optimizer" in parts else (), self.schedulers if "lr_scheduler" in parts else ()
        )

    def _restore(self, owner: Restorer, replaced: dict[torch.Tensor, torch.Tensor]) -> None:
        if isinstance(owner, OptimizersOwner):
            owner.adopt(replaced)
        owner.restore(self.target.values)
        if isinstance(owner, ModuleOwner):
            replaced.update(owner.replaced)


def set_rates(scheduler: Any) -> None:
    """Set an optimizer's learning rates to its schedule's, from which the next ones are computed."""
    optimizer, rates = getattr(scheduler, "optimizer", None), getattr(scheduler, "_last_lr", None)
    bases = getattr(scheduler, "base_lrs", ())
    groups = getattr(optimizer, "param_groups", ())
    if rates is None or len(rates) != len(groups):
        return
    for group, rate in zip(groups, rates, strict=True):
        _set_rate(group, "lr", rate)
    if len(bases) == len(groups):
        for group, rate in zip(groups, bases, strict=True):
            _set_rate(group, "initial_lr", rate)


def _set_rate(group: dict[str, Any], option: str, rate: Any) -> None:
    if isinstance(group.get(option), torch.Tensor):
        group[option].fill_(rate)
    else:
        group[option] = rate


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _checked_states(states: Mapping[str, Any]) -> dict[str, Any]:
    """Check names and objects; raises ConfigError for those that could not be restored."""
    problems = [
        f"states[{name!r}] must be an object with state_dict() and load_state_dict() under a name without a dot"
        for name, stateful in states.items()
        if not (isinstance(name, str) and name and "." not in name)
        or not all(callable(getattr(stateful, door, None)) for door in ("state_dict", "load_state_dict"))
    ]
    if problems:
        raise ConfigError(problems)
    return dict(states)
