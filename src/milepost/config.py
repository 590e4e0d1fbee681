"""``CheckpointConfig``: every option of checkpointing, with torchtitan's names, defaults and meanings.

The spellings of torchtitan's documentation (``load_step = -1``, both ``data_loader`` and ``dataloader``) are accepted
here only; the layers below do not see them.
"""

from __future__ import annotations

import math
import numbers
import os
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from milepost.errors import ConfigError, near

AsyncMode = Literal["disabled", "async", "async_with_pinned_mem"]
ReadMode = Literal["auto", "own", "shared"]
ExportDtype = Literal["float32", "bfloat16", "float16"]

NUM_IO_THREADS = 2
"""Default number of threads per rank that copy, write and read checkpoint files."""

PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state", "states", "rng", "attached")
"""The parts of a training state. All but ``model`` are key prefixes in a checkpoint; the model has none."""

PER_RANK_PARTS = ("lr_scheduler", "dataloader", "train_state")
"""Parts that may be stored for each rank."""


def part_of(key: str) -> str:
    """Return the part to which a key of a checkpoint belongs; ``model`` for a key without a part's prefix."""
    head = key.partition(".")[0]
    return head if head in _PREFIXES else "model"


_PREFIXES = frozenset(PARTS[1:])

_PART_ALIASES = {"data_loader": "dataloader", "optimizers": "optimizer", "lr_schedulers": "lr_scheduler"} | {
    f"{part}.*": part for part in PARTS[1:]
}


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Options of a :class:`milepost.CheckpointManager`.

    Raises:
        ConfigError: at construction, with every problem at once.
    """

    enable: bool = True
    """Save and resume; a manager with ``enable = False`` does neither. In the trainer it is off by default."""
    folder: str = "checkpoint"
    """Folder of the checkpoints, below the run's dump folder."""
    interval: int | Literal["auto"] = 500
    """Save every N steps; ``auto`` picks the time between saves from what one costs and ``mtbf_hours``."""
    interval_seconds: float = 0.0
    """Also save when this many seconds have passed since the last save; 0 disables."""
    mtbf_hours: float = 24.0
    """Mean time between failures of the whole job, in hours, for ``interval = "auto"``."""
    initial_load_path: str = ""
    """A checkpoint to start from when the run's own folder holds no step. Empty: start from newly initialized
    weights."""
    initial_load_model_only: bool = True
    """Load only the model from ``initial_load_path``, not the optimizer and the rest."""
    initial_load_in_hf: bool = False
    """``initial_load_path`` (or the model's ``hf_assets_path``) holds Hugging Face files of weights."""
    initial_load_in_hf_quantized: bool = False
    """These weights are quantized. Block-wise fp8 and MXFP4 weights are recognized and dequantized without this
    option, too."""
    last_save_model_only: bool = True
    """The save at the last step holds only the model."""
    last_save_in_hf: bool = False
    """The save at the last step is written as Hugging Face safetensors."""
    only_trainable: bool = False
    """Save only the model's trainable parameters (``requires_grad``) and its buffers, as with adapters. A resume takes
    the rest from ``initial_load_path``, or leaves it as initialized; it refuses weights that differ from those present
    when the step was saved."""
    hf_interval: int = 0
    """Every N steps also write the model as Hugging Face files, in ``hf/step-<N>`` below ``folder``, while training
    continues: for evaluation and serving. Needs host memory for another copy of the model; 0 disables."""
    hf_keep_latest_k: int = 10
    """Like ``keep_latest_k``, for the folders of ``hf_interval``."""
    hf_keep_every_n_steps: int = 0
    """Like ``keep_every_n_steps``, for the folders of ``hf_interval``."""
    export_dtype: ExportDtype | None = None
    """Cast the model to this dtype in a model-only last save and in those of ``hf_interval``. Unset: every tensor keeps
    its dtype."""
    async_mode: AsyncMode = "disabled"
    """``disabled``: training waits for the write. ``async``: a thread writes. ``async_with_pinned_mem``: a process."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """When a save fails: ``stop`` raises; ``warn`` logs it and trains on, but raises after 3 failed saves in a row."""
    on_commit: str = ""
    """Command line that rank 0 runs in the background after each committed step, with MILEPOST_STEP,
    MILEPOST_PATH, MILEPOST_CONTENTS, MILEPOST_METRICS (JSON) and MILEPOST_TIER in its environment. Its failure is
    logged. Empty: none."""
    check_replicas: int = 0
    """At every N-th save compare all of the tensors that several ranks hold, to detect a device that computes wrongly
    or a missing all-reduce; 0 compares only a sample, when the structure of the state is new."""
    num_io_threads: int = NUM_IO_THREADS
    """Threads of each rank that copy, write and read the files of a checkpoint."""
    page_cache: Literal["auto", "keep", "drop", "direct"] = "auto"
    """Treatment of written files in the operating system's page cache: ``keep`` them, so that a resume on the same
    machine reads from memory; ``drop`` each part once it is on disk; ``direct`` bypasses the cache (O_DIRECT). ``auto``
    keeps files smaller than half of the free memory, and drops larger ones."""
    full_every: int = 0
    """Tensors without gradient that have not changed since the previous step are not written again: both steps share a
    file (by a hard link). Rewrite them at every N-th save, so that one damaged file can't damage every step; 1: at
    each save, 0: only when they have changed."""
    read: ReadMode = "auto"
    """Choice of the rank that reads data needed by several ranks, such as replicas. ``own``: each rank reads for
    itself; ``shared``: one rank reads and distributes through the process group. ``auto``: where sharing would save
    much, ranks measure with a few blocks which is faster; else ``shared`` from an object store or a network file
    system, ``own`` from a disk."""
    keep_latest_k: int = 10
    """Keep the N newest committed steps; 0 keeps all."""
    keep_every_n_steps: int = 0
    """Also keep older steps that are multiples of N; 0 disables."""
    keep_best_k: int = 0
    """Also keep the N steps with the best value of ``metric``; 0 disables."""
    metric: str = ""
    """The metric that ``keep_best_k`` compares, one of those recorded by ``save(step, metrics=...)``."""
    mode: Literal["min", "max"] = "min"
    """Which value of ``metric`` is best, the lowest or the highest."""
    remote_folder: str = ""
    """A second folder behind ``folder``, a path or the URL of a store: committed steps are copied there during
    training, and a run resumes from the newest step of either. Empty: none."""
    folder_per_node: bool = False
    """``folder`` is on each node's local disk or memory: a node keeps its ranks' shards, and a step counts once all
    nodes have their part. Needs ``remote_folder``, where steps are complete and any number of ranks can resume."""
    remote_every_n_steps: int = 0
    """Copy only steps that are multiples of N, and the last one; 0: every step, or the newest where copying is slower
    than saving."""
    remote_keep_latest_k: int = 10
    """Like ``keep_latest_k``, for ``remote_folder``."""
    remote_keep_every_n_steps: int = 0
    """Like ``keep_every_n_steps``, for ``remote_folder``."""
    load_step: int = -1
    """Start from this step; -1 means the end of the branch that was written last. Once steps that descend from it have
    been saved, the same command resumes from the newest of them."""
    restart_branch: bool = False
    """Start from ``load_step`` again, on a new branch, although steps that descend from it have been saved."""
    exclude_from_loading: tuple[str, ...] = field(default=())
    """Parts or keys to leave as initialized: parts (model, optimizer, lr_scheduler, dataloader, train_state, states,
    rng, attached), or globs of keys, such as ``head.*``."""
    allow_missing: tuple[str, ...] = field(default=())
    """Globs of keys of this run that the checkpoint may lack: they stay as initialized. All others are required."""
    allow_unexpected: tuple[str, ...] = field(default=())
    """Globs of keys of the checkpoint that this run may not have: they are ignored. Others are refused."""
    enable_first_step_checkpoint: bool = False
    """Also save after the first step, to show early that saving works."""
    create_seed_checkpoint: bool = False
    """Initialize the model on one process, save it as step 0 and exit."""
    load_only: bool = False
    """Load, but never save."""

    def __post_init__(self) -> None:
        problems = list(self._settle_types())
        parts = tuple(_PART_ALIASES.get(name, name) for name in self.exclude_from_loading)
        object.__setattr__(self, "exclude_from_loading", parts)
        problems += self._problems()
        if problems:
            raise ConfigError(problems)

    def _settle_types(self) -> list[str]:
        """Convert every field to its type; an invalid one is reported and gets its default for the other checks."""
        problems = []
        for option in fields(self):
            value = getattr(self, option.name)
            try:
                settled = settle(value, _HINTS[option.name])
            except ValueError as error:
                problems.append(f"checkpoint.{option.name} must be {error}, not {value!r:.80}")
                settled = option.default if option.default_factory is MISSING else option.default_factory()
            object.__setattr__(self, option.name, settled)
        return problems

    def _problems(self) -> list[str]:
        found = []
        if self.interval != "auto" and self.interval < 1:
            found.append(f"checkpoint.interval must be at least 1, or auto, not {self.interval}")
        if self.mtbf_hours <= 0:
            found.append(f"checkpoint.mtbf_hours must be above 0, not {self.mtbf_hours:g}")
        for name, (least, expected) in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                shown = f"{value:g}" if isinstance(value, float) else value
                found.append(f"checkpoint.{name} must be {expected}, not {shown}")
        for name in self.exclude_from_loading:
            if name not in PARTS and (not name or not is_pattern(name)):
                meant = near(name, PARTS)
                found.append(
                    f"checkpoint.exclude_from_loading: there is no part '{name}'"
                    + (f" (did you mean {meant}?)" if meant else "")
                    + f"; parts are {', '.join(PARTS)} (of keys, write the whole key or a glob, such as head.*; of an "
                    f"object among `states`, states.{name or 'NAME'}.*)"
                )
        if not self.folder.strip():
            found.append("checkpoint.folder must not be empty")
        return found + self._contradictions()

    def _contradictions(self) -> list[str]:
        found = []
        if bool(self.keep_best_k) != bool(self.metric):
            found.append(
                "checkpoint.keep_best_k and checkpoint.metric need each other: how many steps to keep, by which metric"
            )
        if self.restart_branch and self.load_step == -1:
            found.append("checkpoint.restart_branch needs checkpoint.load_step: the step where the branch begins")
        if self.remote_folder and self.remote_folder == self.folder:
            found.append(
                f"checkpoint.remote_folder equals checkpoint.folder ({self.folder}): give another one, or none"
            )
        if self.folder_per_node and not self.remote_folder:
            found.append("checkpoint.folder_per_node needs checkpoint.remote_folder: a lost node loses its folder too")
        for name in ("last_save_in_hf", "hf_interval"):
            if self.folder_per_node and getattr(self, name):
                found.append(
                    f"checkpoint.folder_per_node and checkpoint.{name} contradict each other: all ranks write those "
                    "files together. `milepost convert` makes them from a step in checkpoint.remote_folder"
                )
        if self.load_only and self.create_seed_checkpoint:
            found.append("checkpoint.load_only and checkpoint.create_seed_checkpoint contradict each other")
        if self.only_trainable and self.create_seed_checkpoint:
            found.append("checkpoint.only_trainable and checkpoint.create_seed_checkpoint contradict each other")
        if self.export_dtype not in (None, "float32") and not (self.last_save_model_only or self.hf_interval):
            found.append(
                f"checkpoint.export_dtype = {self.export_dtype} needs checkpoint.last_save_model_only or "
                "checkpoint.hf_interval: "
                "a full checkpoint must keep its dtypes to be resumed from"
            )
        for name, needed, reason in _NEEDS:
            if getattr(self, name) and not getattr(self, needed):
                found.append(f"checkpoint.{name} needs checkpoint.{needed}{reason}")
        return found


_NEEDS = (
    ("create_seed_checkpoint", "enable", ""),
    ("initial_load_in_hf_quantized", "initial_load_in_hf", ""),
    ("initial_load_in_hf", "initial_load_model_only", ": safetensors hold the model"),
    ("last_save_in_hf", "last_save_model_only", ": safetensors hold the model"),
)
"""Options that are refused without another one, and the reason."""

_DISABLED, _KEEP_ALL = (0, "0 (disabled) or more"), (0, "0 (keep all) or more")
_LEAST: dict[str, tuple[int, str]] = {
    "interval_seconds": _DISABLED,
    "check_replicas": (0, "0 (a sample, once) or more"),
    "num_io_threads": (1, "at least 1"),
    "full_every": (0, "0 (share what has not changed) or more"),
    "keep_latest_k": _KEEP_ALL,
    "keep_every_n_steps": _DISABLED,
    "keep_best_k": _DISABLED,
    "remote_every_n_steps": _DISABLED,
    "remote_keep_latest_k": _KEEP_ALL,
    "remote_keep_every_n_steps": _DISABLED,
    "hf_interval": _DISABLED,
    "hf_keep_latest_k": _KEEP_ALL,
    "hf_keep_every_n_steps": _DISABLED,
    "load_step": (-1, "-1 (the newest) or a step"),
}
"""The least value of each numeric option, and the words for what is allowed."""

# At import, not when an untrusted file is read: it compiles the annotations.
_HINTS = typing.get_type_hints(CheckpointConfig)


def is_pattern(name: str) -> bool:
    """Return True if a name selects keys, not a part: it has a dot or a wildcard."""
    return any(sign in name for sign in ".*?[")


def settle(value: object, hint: Any) -> Any:
    """Convert ``value`` to the type ``hint``: integers and paths of any kind, lists to tuples.

    Raises:
        ValueError: it has another type; the message names the expected one.
    """
    words = [choice for choice in _choices(hint) if isinstance(choice, str)]
    kinds = [choice for choice in _choices(hint) if not isinstance(choice, str)]
    if (value is None and type(None) in kinds) or (isinstance(value, str) and value in words):
        return value
    if bool in kinds and isinstance(value, bool):
        return value
    is_number = not isinstance(value, bool)
    if is_number and isinstance(value, numbers.Integral) and int in kinds:
        return int(value)
    if is_number and isinstance(value, numbers.Real) and float in kinds and math.isfinite(value):
        return float(value)
    if str in kinds and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    is_list = tuple in kinds and isinstance(value, list | tuple)
    if is_list and all(isinstance(part, str) for part in value):  # type: ignore[attr-defined]
        return tuple(value)  # type: ignore[arg-type]
    raise ValueError(_expected(value, kinds, words))


def _choices(hint: Any) -> list[Any]:
    """Return the types that a value may have, and the choices of a Literal."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return list(typing.get_args(hint))
    if origin is tuple:
        return [tuple]
    if origin is not None:
        return [choice for part in typing.get_args(hint) for choice in _choices(part)]
    return [hint]


def _expected(value: object, kinds: list[Any], words: list[str]) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text or a path"}
    names |= {type(None): "None", tuple: "a list of names"}
    text = " or ".join([*(names[kind] for kind in kinds if kind is not type(None)), *words])
    if tuple in kinds and isinstance(value, str):
        return f'{text}, such as ["{value}"]'
    hint = meant_word(value, words)
    return f'{text} (did you mean "{hint}"?)' if hint else text


def meant_word(value: object, words: list[str]) -> str | None:
    """Return the one of ``words`` that ``value`` may stand for: by a short name, upper case or a misspelling."""
    known = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
    meant = str(value)[:100].removeprefix("torch.").lower().replace("-", "_")
    hint = known.get(meant, meant if meant in words else near(meant, words))
    return hint if hint in words else None
