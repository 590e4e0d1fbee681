"""A whole training state as one state dict, part by part, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from milepost.config import PARTS, part_of
from milepost.errors import ConfigError, FormatError, StateMismatchError
from milepost.format.manifest import Manifest
from milepost.tensors.state import EMPTY_MAPPINGS, Path
from milepost.training import parts

MAX_LIST = 1 << 20
"""No list in a part of a training state has more elements that are stored one by one."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingState:
    """The live objects of a run on this rank. Absent parts are empty or None."""

    models: tuple[nn.Module, ...]
    optimizers: tuple[Optimizer, ...]
    schedulers: tuple[Any, ...]
    dataloader: Any
    train_state: Any
    rank: int

    @classmethod
    def of(
        cls, *, model: Any, optimizer: Any, lr_scheduler: Any, dataloader: Any, train_state: Any, rank: int
    ) -> TrainingState:
        """From what a :class:`CheckpointManager` is given.

        Raises:
            ConfigError: there is no model, or the model has a name that is kept for a part.
        """
        state = cls(_several(model), _several(optimizer), _several(lr_scheduler), dataloader, train_state, rank)
        if not state.models:
            raise ConfigError("CheckpointManager needs a model")
        taken = sorted({key for key in parts.model_state(state.models) if part_of(key) != "model"})
        if taken:
            raise ConfigError(
                f"the model has '{taken[0]}', but keys that start with '{part_of(taken[0])}.' are kept for that part "
                "of the training state; rename the module"
            )
        return state

    def present(self) -> tuple[str, ...]:
        """The parts that this run has, in the order of ``PARTS``."""
        has = {
            "model": True,
            "optimizer": bool(self.optimizers),
            "lr_scheduler": bool(self.schedulers),
            "dataloader": self.dataloader is not None,
            "train_state": self.train_state is not None,
            "rng": True,
        }
        return tuple(part for part in PARTS if has[part])

    def state_dict(self, wanted: Collection[str]) -> dict[str, Any]:
        """The state of the ``wanted`` parts. Model and optimizer tensors share memory with the live ones."""
        state: dict[str, Any] = {}
        if "model" in wanted:
            state.update(parts.model_state(self.models))
        if "optimizer" in wanted:
            state["optimizer"] = parts.optimizer_state(self.optimizers, parts.parameter_names(self.models))
        if "lr_scheduler" in wanted:
            state["lr_scheduler"] = self.schedulers[0].state_dict()
        if "dataloader" in wanted:
            state["dataloader"] = self.dataloader.state_dict()
        if "train_state" in wanted:
            state["train_state"] = self.train_state.state_dict()
        if "rng" in wanted:
            state["rng"] = {f"rank{self.rank}": parts.rng_state()}
        return state

    def target(self, wanted: Collection[str], manifest: Manifest, *, same_layout: bool) -> dict[str, Any]:
        """What to load a checkpoint into. Model and optimizer: the live tensors. The rest: as the checkpoint has it.

        Under another layout only rank 0's random state is asked for, to derive new streams from.

        Raises:
            StateMismatchError: the checkpoint lacks a whole part that is wanted.
        """
        stored = {part_of(key) for key in (*manifest.tensors, *manifest.objects)}
        stored |= {part_of(str(path[0])) for path in _empty_mappings(manifest)}
        lacking = [part for part in wanted if part not in stored and part != "rng"]
        if lacking:
            raise StateMismatchError(
                f"the checkpoint holds no {', no '.join(lacking)} (it holds {', '.join(sorted(stored))}); to leave "
                f"{'it' if len(lacking) == 1 else 'them'} as freshly built, set checkpoint.exclude_from_loading = "
                f"{','.join(lacking)}",
                missing=lacking,
            )
        if "optimizer" in wanted:
            for optimizer in self.optimizers:
                parts.materialise_optimizer_state(optimizer)
            keys = [key.removeprefix("optimizer.") for key in (*manifest.tensors, *manifest.objects)]
            parts.forget_unsaved_state(self.optimizers, parts.parameter_names(self.models), keys)
        target = self.state_dict([part for part in wanted if part in ("model", "optimizer")])
        for part in ("lr_scheduler", "dataloader", "train_state"):
            if part in wanted:
                target[part] = _blank(manifest, f"{part}.")[part]
        if "rng" in wanted:
            prefix = f"rng.rank{self.rank}." if same_layout else "rng.rank0.torch"
            target.update(_blank(manifest, prefix))
        return target

    def restore(self, wanted: Collection[str], loaded: Mapping[str, Any], *, same_layout: bool) -> str | None:
        """Hand loaded values to the live objects. Returns a remark for the log when there is something to say."""
        if "model" in wanted:
            parts.load_extra_state(self.models, loaded)
        if "optimizer" in wanted:
            parts.load_optimizer_options(self.optimizers, parts.parameter_names(self.models), loaded["optimizer"])
        if "lr_scheduler" in wanted:
            for scheduler in self.schedulers:
                scheduler.load_state_dict(loaded["lr_scheduler"])
        if "dataloader" in wanted:
            self.dataloader.load_state_dict(loaded["dataloader"])
        if "train_state" in wanted:
            self.train_state.load_state_dict(loaded["train_state"])
        if "rng" in wanted:
            return self._restore_rng(loaded.get("rng", {}), same_layout=same_layout)
        return None

    def _restore_rng(self, saved: Mapping[str, Any], *, same_layout: bool) -> str | None:
        if same_layout and f"rank{self.rank}" in saved:
            parts.set_rng_state(saved[f"rank{self.rank}"])
            return None
        if "rank0" in saved:
            parts.derive_rng_state(saved["rank0"]["torch"], self.rank)
            return "saved under another layout: each rank's random generators were seeded anew from the saved ones"
        return "it holds no random state: the generators stay as this run seeded them"


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _blank(manifest: Manifest, prefix: str) -> dict[str, Any]:
    """A nested dict of the shape that was saved, with empty tensors and None, for the keys that start so.

    Raises:
        FormatError: the paths of the checkpoint make no sense together.
    """
    root: dict[str, Any] = {}
    for path in _empty_mappings(manifest):
        if ".".join(map(str, (*path, ""))).startswith(prefix):
            _put(root, path, {})
    for key, value in _blank_leaves(manifest, prefix):
        _put(root, manifest.paths.get(key, tuple(key.split("."))), value)
    return root


def _empty_mappings(manifest: Manifest) -> list[Path]:
    found = manifest.extra.get(EMPTY_MAPPINGS, [])
    paths = [tuple(path) for path in found if isinstance(path, list) and path] if isinstance(found, list) else []
    return [path for path in paths if all(type(part) in (str, int) for part in path)]


def _blank_leaves(manifest: Manifest, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, entry in manifest.tensors.items():
        if key.startswith(prefix):
            yield key, torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    for key in manifest.objects:
        if key.startswith(prefix):
            yield key, None


def _put(root: Any, path: Path, value: Any) -> None:
    """Set ``root[path[0]][path[1]]...``; a number as path element makes a list."""
    for element, following in zip(path, [*path[1:], None], strict=True):
        fits = isinstance(root, list) and 0 <= element < MAX_LIST if isinstance(element, int) else type(root) is dict
        if not fits:
            raise FormatError(f"the checkpoint gives the path {path}, which contradicts its other paths or is absurd")
        if isinstance(element, int):
            root.extend([None] * (element + 1 - len(root)))
        here = root[element] if isinstance(element, int) else root.get(element)
        if following is None:
            root[element] = value
            return
        if here is None:
            here = root[element] = [] if isinstance(following, int) else {}
        root = here
