"""``resume_test``: test for a configuration that a killed run resumes exactly.

The trainer runs as users start it, under torchrun: once to the end, once until it is killed with SIGKILL, and from
there once for each layout. The checkpoints of the last step are compared.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from milepost.config import part_of
from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, ConfigError, MilepostError
from milepost.parallelism.degrees import SHORT_DEGREES
from milepost.report.diff import DiffReport, diff
from milepost.run import catalog
from milepost.run.branches import History
from milepost.run.step_names import step_name
from milepost.storage import open_storage
from milepost.storage.base import join
from milepost.training.attached import PART as ATTACHED
from milepost.verification.verify import verify

TRAINER: tuple[str, ...] = (sys.executable, "-m", "milepost.train.launch")
"""The command, followed by torchrun's options, ``--`` and the trainer's options."""
TAIL_LINES = 30
KILL_TRIES = 3
_STEP_LINE = re.compile(r"\bstep (\d+)/\d+ +loss (\S+)")
_SAVED_LINE = re.compile(r"\bsaved step \d+")
_DEGREE = re.compile(r"([a-z]+)(\d+)")
_OPTION = {short: name for name, short in SHORT_DEGREES.items()}


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A layout to train on: ``degrees`` by short name; empty for the configuration's degrees on ``num_ranks``."""

    name: str
    num_ranks: int
    degrees: Mapping[str, int]

    def __str__(self) -> str:
        return self.name if self.degrees else "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"

    def flags(self) -> list[str]:
        """Return the trainer's flags: all degrees, so that they override the configuration file's."""
        if not self.degrees:
            return []
        return [
            word
            for short, option in _OPTION.items()
            for word in (f"--parallelism.{option}", str(self.degrees.get(short, 1)))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeTestSettings:
    """Options of a resume test. ``extra`` are more flags for the trainer, such as ``--training.seq_len=128``."""

    config_file: str
    layouts: tuple[LayoutChoice, ...]
    """The run is trained and killed on the first, and resumed on each."""
    num_steps: int
    kill_at: int
    """Step after whose log line the run is killed; the step before it is saved."""
    tolerance: float
    """Largest relative difference of the loss, on another layout than the one that saved."""
    extra: tuple[str, ...] = ()
    trainer: tuple[str, ...] = field(default_factory=lambda: TRAINER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A run resumed on one set of degrees, compared with the uninterrupted run."""

    layout: str
    resumed_from: int
    loss: float
    """Loss of the last step, as logged."""
    loss_difference: float
    """Largest relative difference of the loss at any step after the resume."""
    is_same_layout: bool
    num_same_keys: int
    """Number of keys of the last checkpoint whose bytes are the same in both runs."""
    differs_in: tuple[str, ...]
    """Keys of the last checkpoint that differ; not recorded on another layout, where the order of sums differs."""
    max_abs: float
    """Largest difference of any element of the model, on another layout; 0 on the same layout."""
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeTestReport:
    """The result of a resume test."""

    num_steps: int
    killed_after: int
    committed_step: int
    loss: float
    """Loss of the last step of the uninterrupted run."""
    resumed: tuple[Resumed, ...]

    @property
    def passed(self) -> bool:
        return all(one.passed for one in self.resumed)


def parse_layouts(text: str, num_ranks: int) -> tuple[LayoutChoice, ...]:
    """Parse ``fsdp2,fsdp1xtp2,4``: layouts by degrees, or by a number of ranks for the configuration's degrees.

    Raises:
        ConfigError: with all problems.
    """
    layouts = []
    problems = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        if name.isdecimal() and int(name) > 0:
            layouts.append(LayoutChoice(name, int(name), {}))
            continue
        matches = [_DEGREE.fullmatch(part) for part in name.split("x")]
        degrees = {match[1]: int(match[2]) for match in matches if match is not None}
        if None in matches or not degrees.keys() <= _OPTION.keys() or not all(degrees.values()):
            problems.append(
                f"--layouts: '{name}' is not a set of degrees: write degrees such as fsdp2xtp2, "
                f"of {', '.join(_OPTION)}, or a number of ranks"
            )
            continue
        num_ranks_of = math.prod(degree for short, degree in degrees.items() if short != "ep")
        layouts.append(LayoutChoice(name, num_ranks_of, degrees))
    if problems:
        raise ConfigError(problems)
    return tuple(layouts) or (LayoutChoice(str(num_ranks), num_ranks, {}),)


def resume_test(
    settings: ResumeTestSettings, folder: Path, on_stage: Callable[[str], None] = lambda text: None
) -> ResumeTestReport:
    """Train, kill, resume, compare. ``folder`` must be empty; ``on_stage`` is called with each stage's description.

    Raises:
        ConfigError: the trainer refuses the configuration.
        MilepostError: a run failed; the message has the last lines that it printed.
        CheckpointNotFoundError, CheckpointDamagedError: the killed run left no undamaged step.
    """
    runs = _Runs(settings, folder)
    first = settings.layouts[0]
    on_stage(f"training {settings.num_steps} steps on {first} without interruption")
    whole = runs.train(folder / "whole", first)
    on_stage(f"training again, to be killed after step {settings.kill_at}")
    committed = _train_and_kill(runs, folder / "killed", settings)
    resumed = []
    for number, layout in enumerate(settings.layouts):
        on_stage(f"resuming from step {committed} on {layout}")
        place = folder / f"resumed-{number}"
        shutil.copytree(folder / "killed", place)
        losses = runs.train(place, layout)
        resumed.append(_compare(folder, place, layout, first, whole, losses, committed, settings))
    return ResumeTestReport(
        num_steps=settings.num_steps,
        killed_after=settings.kill_at,
        committed_step=committed,
        loss=whole[settings.num_steps],
        resumed=tuple(resumed),
    )


def _train_and_kill(runs: _Runs, folder: Path, settings: ResumeTestSettings) -> int:
    """Return the step left by a killed run. Repeats if the run finished before it was killed."""
    for _ in range(KILL_TRIES):
        runs.train(folder, settings.layouts[0], kill_at=settings.kill_at)
        committed = _committed_step(folder / "checkpoint")
        if committed < settings.num_steps:
            return committed
        shutil.rmtree(folder)
    raise MilepostError(
        f"the run was killed after step {settings.kill_at}, but in {KILL_TRIES} attempts its last step "
        f"{settings.num_steps} had been saved by then, so there was nothing to resume. Give it more steps: --steps"
    )


def _committed_step(folder: Path) -> int:
    """Return the step left by the killed run, with every byte verified."""
    storage, name = open_storage(folder)
    entry = History.of(catalog.scan(storage, name)).newest_resumable
    if entry is None:
        raise CheckpointNotFoundError(f"the killed run left no committed step in {folder}", path=str(folder))
    report = verify(join(storage.root, entry.path))
    if not report.is_sound:
        raise CheckpointDamagedError(
            f"the killed run left step {entry.step} damaged: {report.problems[0]}", path=entry.path
        )
    return entry.step


def _compare(
    folder: Path,
    place: Path,
    layout: LayoutChoice,
    first: LayoutChoice,
    whole: Mapping[int, float],
    losses: Mapping[int, float],
    committed: int,
    settings: ResumeTestSettings,
) -> Resumed:
    last = step_name(settings.num_steps)
    same = layout == first
    found = diff(folder / "whole" / "checkpoint" / last, place / "checkpoint" / last, values=not same)
    expected = set(range(committed + 1, settings.num_steps + 1))
    difference = max((_relative(whole[step], losses[step]) for step in expected & losses.keys()), default=math.nan)
    complete = losses.keys() == expected
    differs_in = _different_keys(found) if same else ()
    is_exact = same and not differs_in and found.num_unknown == 0 and difference == 0
    return Resumed(
        layout=layout.name,
        resumed_from=min(losses, default=committed + 1) - 1,
        loss=losses.get(settings.num_steps, math.nan),
        loss_difference=difference,
        is_same_layout=same,
        num_same_keys=found.num_same,
        differs_in=differs_in,
        max_abs=max((change.max_abs for change in found.values if part_of(change.key) == "model"), default=0.0),
        passed=complete and (is_exact if same else difference <= settings.tolerance),
    )


def _different_keys(found: DiffReport) -> tuple[str, ...]:
    """Compare the state only: data attached to a step depends on the run's folder and options."""
    keys = {held.key for held in (*found.only_a, *found.only_b)} | {change.key for change in found.kinds}
    keys |= {change.key for change in found.values} | {change.key for change in found.objects}
    keys |= set(found.other_bytes)
    return tuple(sorted(key for key in keys if part_of(key) != ATTACHED))


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(a) if a else abs(b)


# ---- the trainer's processes ----


class _Runs:
    """Starts the trainer with the settings common to all runs of a test."""

    def __init__(self, settings: ResumeTestSettings, folder: Path):
        self._settings = settings
        self._log = folder / "trainer.log"
        self._batch = _global_batch_size(settings)

    def train(self, place: Path, layout: LayoutChoice, *, kill_at: int = 0) -> dict[int, float]:
        """Train in the folder ``place``; returns the logged losses by step.

        ``kill_at``: kill it once that step was logged and a step was saved (which may end later, in the background).
        """
        settings = self._settings
        command = [*settings.trainer, "--nproc_per_node", str(layout.num_ranks)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--local-ranks-filter", "0", "--"]
        command += ["--job.config_file", settings.config_file, *settings.extra, *layout.flags()]
        command += ["--job.dump_folder", str(place), "--training.steps", str(settings.num_steps)]
        command += ["--training.global_batch_size", str(self._batch)] if self._batch else []
        command += ["--checkpoint.enable", "--checkpoint.folder", "checkpoint", "--checkpoint.no_load_only"]
        command += ["--checkpoint.interval", str(max(1, settings.kill_at - 1)), "--checkpoint.keep_latest_k", "0"]
        command += ["--checkpoint.no_last_save_model_only", "--metrics.log_freq", "1"]
        losses: dict[int, float] = {}
        has_saved = False
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        with _running(command) as process, self._log.open("a") as log:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                tail.append(line)
                has_saved = has_saved or _SAVED_LINE.search(line) is not None
                if match := _STEP_LINE.search(line):
                    losses[int(match[1])] = float(match[2])
                if kill_at and has_saved and kill_at in losses:
                    kill_tree(process.pid)
                    return losses
            status = process.wait()
        if status or kill_at or settings.num_steps not in losses:
            self._fail(status, kill_at, "".join(tail))
        return losses

    def _fail(self, status: int, kill_at: int, tail: str) -> None:
        if status == ConfigError.exit_status:
            raise ConfigError(f"the trainer rejected this:\n{tail.rstrip()}")
        what = f"with exit status {status}" if status else "too early"
        before = f" before step {kill_at}, after which it was to be killed" if kill_at else ""
        raise MilepostError(f"a training run ended {what}{before}. It printed:\n{tail.rstrip()}")


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a process; it and its descendants are killed when the block ends."""
    environment = {**os.environ, "LOG_RANK": "0", "PYTHONUNBUFFERED": "1"}
    if shutil.which("nvidia-smi") is None:  # all ranks share the cores
        environment.setdefault("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process.pid)


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and its descendants, which torchrun puts into separate sessions."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for victim in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()


def _global_batch_size(settings: ResumeTestSettings) -> int:
    """Return the first layout's sequences per step, to be used on all layouts; 0 if there is only one layout."""
    if len({layout.name for layout in settings.layouts}) == 1:
        return 0
    try:
        training = tomllib.loads(Path(settings.config_file).read_text()).get("training", {})
    except tomllib.TOMLDecodeError:
        return 0  # the trainer reports what is wrong with it
    given = dict(flag.removeprefix("--training.").partition("=")[::2] for flag in settings.extra)
    options = {"local_batch_size": 8, "global_batch_size": -1} | training | given
    try:
        local, together = int(options["local_batch_size"]), int(options["global_batch_size"])
    except ValueError:
        return 0  # as above
    degrees = settings.layouts[0].degrees
    if together != -1 or not degrees:
        return max(together, 0)
    return local * degrees.get("replicate", 1) * degrees.get("fsdp", 1)
