"""A soak: a training run on two ranks whose processes are repeatedly killed equals the undisturbed one.

    python tests/crash/soak.py --kills 50 --seed 7          (make soak KILLS=50 SEED=7)

The trainer runs as its users start it, under torchrun. What is killed, with SIGKILL, and when, follows from the seed:
a rank, a writer process, the launcher, or all of it at once as when the power fails; while it starts, loads, trains,
saves, between staged and committed, and while old steps are deleted. Ranks are started again by torchrun, the launcher
by this script, each time in the next of the modes of saving.

After each kill every step that the run had reported as saved must be there. At the end the losses of all steps, however
often they were made, and the whole saved state must be those of the undisturbed run, to the last bit; and nothing may
be left over: in the folder, of the processes, of shared memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

import milepost
from milepost.report.diff import DiffReport, diff
from milepost.report.resume_test import kill_tree
from milepost.run import catalog
from milepost.run.lock import LOCK_NAME
from milepost.run.step_names import ATTEMPT_PREFIX, DELETING_PREFIX, step_name
from milepost.storage import open_storage
from milepost.testing.world import run_world
from milepost.train.config import TrainConfig
from milepost.train.loop import Trainer
from milepost.train.options import load_config

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2
MODES = ("disabled", "async", "async_with_pinned_mem")
WHOLE_JOB = ("launcher", "everything")
"""Victims after which a launcher has to be started; the others are torchrun's to start again."""
GLOBAL_BATCH = 4
INTERVAL = 2
KEEP = 2
PATIENCE_S = 240.0
"""The longest wait for anything: a moment to come, a run to end."""
MARK = "MILEPOST_SOAK"
"""Environment variable by which all processes of a soak are known."""


class SoakError(AssertionError):
    """The run did not survive."""


# ---- victims and moments of kills ----


@dataclass(frozen=True, slots=True)
class Kill:
    """``victim`` is killed in ``moment``, ``delay_s`` after that was seen to begin, of a run that saves in ``mode``."""

    mode: str
    moment: str
    victim: str
    delay_s: float
    after_steps: int
    """So many steps are seen first, since the kill before."""


def schedule(seed: int, num_kills: int) -> list[Kill]:
    """The kills in order: a pure function. The mode changes whenever the launcher was killed."""
    rng = random.Random(seed)
    kills: list[Kill] = []
    mode = rng.randrange(len(MODES))
    moments: list[str] = []
    since_change = 0
    for _ in range(num_kills):
        pinned = MODES[mode] == "async_with_pinned_mem"
        if not moments:  # all of them once, in random order, before any comes again
            moments = rng.sample(sorted(DELAYS_S), len(DELAYS_S))
        moment = moments.pop()
        if since_change >= 3:
            victim = rng.choice(WHOLE_JOB)
        elif moment in ("start", "load"):
            victim = rng.choice(["rank 0", "rank 1", "launcher"])
        else:
            victim = rng.choice(["rank 0", "rank 1", *WHOLE_JOB, *(["writer 0", "writer 1"] * 2 if pinned else [])])
        if kills and kills[-1].victim.startswith("writer") and moment in ("start", "load"):
            moment = "train"  # a run need not start again for a writer that had nothing to write
        kills.append(Kill(MODES[mode], moment, victim, rng.uniform(0.0, DELAYS_S[moment]), rng.randint(1, 3)))
        since_change += 1
        if victim in WHOLE_JOB:
            mode, since_change = (mode + 1) % len(MODES), 0
    return kills


DELAYS_S = {"start": 5.0, "load": 0.5, "train": 0.2, "save": 0.05, "staged": 0.02, "retention": 0.005}
"""For each moment, the most seconds from when it is seen to begin to the kill."""


# ---- the run ----


def flags(folder: Path, num_steps: int, *more: str) -> list[str]:
    """The trainer's options: small batches of the debug model, a save every other step, all figures logged."""
    options = {
        "job.dump_folder": folder,
        "training.steps": num_steps,
        "training.seq_len": 32,
        "training.local_batch_size": GLOBAL_BATCH // NUM_RANKS,
        "training.global_batch_size": GLOBAL_BATCH,
        "metrics.log_freq": 1,
        "checkpoint.interval": INTERVAL,
        "checkpoint.keep_latest_k": KEEP,
        "checkpoint.last_save_model_only": "false",
    }
    return [*(f"--{name}={value}" for name, value in options.items()), "--metrics.enable_tensorboard", *more]


def train_undisturbed(folder: Path, num_steps: int, *more: str) -> None:
    """The undisturbed run, which saves only once; its ranks are forks of this process."""
    argv = [f"--job.config_file={ROOT}/configs/debug_cpu.toml", *flags(folder, num_steps, *more)]
    argv += [f"--checkpoint.interval={num_steps}"]
    run_world(_train, NUM_RANKS, load_config(argv, NUM_RANKS), timeout_s=1200)


def _train(config: TrainConfig) -> None:
    Trainer(config).run()


@dataclass
class Run:
    """The job: one launcher after another in one folder. ``old_ranks`` are the processes of ranks that were there
    when the last kill came."""

    folder: Path
    num_steps: int
    more: tuple[str, ...]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    launcher: subprocess.Popen[bytes] | None = None
    num_launchers: int = 0
    old_ranks: tuple[int, ...] = ()
    num_read: int = 0
    """Characters of this launcher's log that had been written when the last kill came."""
    acknowledged: int = 0
    """The newest step that the run has reported as saved."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    def start(self, mode: str) -> None:
        """Start a launcher: torchrun's agent, which starts the ranks, again and again if they die."""
        environment = {**os.environ, "NGPU": str(NUM_RANKS), "PYTHON": sys.executable, MARK: self.mark}
        environment["TORCHRUN_ARGS"] = "--max-restarts 1000"
        command = [ROOT / "run_train.sh", *flags(self.folder, self.num_steps, *self.more)]
        command += [f"--checkpoint.async_mode={mode}"]
        self.num_launchers += 1
        self.old_ranks, self.num_read = (), 0
        with self.log_path.open("wb") as log:
            self.launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def log_path(self) -> Path:
        return self.folder / f"launcher-{self.num_launchers}.log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.num_launchers else ""

    def pid(self) -> int:
        assert self.launcher is not None
        return self.launcher.pid

    def ranks(self) -> list[int]:
        """The processes of the ranks started since the last kill, in order; empty while they are not all there."""
        ranks = sorted(children(self.pid()))
        return ranks if len(ranks) == NUM_RANKS and not set(ranks) & set(self.old_ranks) else []

    def writers(self) -> list[int]:
        """The writer processes of the ranks that are there, in the order of the ranks."""
        return [pid for rank in sorted(children(self.pid())) for pid in children(rank) if _is_writer(pid)]

    def steps_seen(self) -> list[int]:
        """The steps made since the last kill."""
        return [int(step) for step in re.findall(r"\bstep (\d+)/", self.log()[self.num_read :])]

    def wait_for(self, what: str, seen: Callable[[], bool], poll_s: float = 0.02) -> None:
        """Return as soon as ``seen()``. It is an error if the launcher ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not seen():
            assert self.launcher is not None
            if (status := self.launcher.poll()) is not None:
                raise SoakError(f"the launcher ended with {status} before {what}:\n{self.log()[-3000:]}")
            if time.monotonic() > deadline:
                raise SoakError(f"no {what} within {PATIENCE_S:.0f} s:\n{self.log()[-3000:]}")
            time.sleep(poll_s)

    def hidden(self) -> set[str]:
        """The names in the folder that a save or a deletion has for a while, and what is in them."""
        found = set()
        with contextlib.suppress(OSError), os.scandir(self.checkpoints) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    found.add(entry.name)
                if entry.name.startswith(ATTEMPT_PREFIX):
                    with contextlib.suppress(OSError):
                        found |= {f"{entry.name}/{name}" for name in os.listdir(f"{entry.path}/data")}
        return found

    def await_moment(self, kill: Kill) -> None:
        """Return when the moment of ``kill`` has come."""
        if kill.moment in ("start", "load"):
            self.wait_for("start of the ranks", lambda: bool(self.ranks()))
            if kill.moment == "load":  # the folder is taken just before
                before = self._lock_time()
                self.wait_for("load", lambda: self._lock_time() > before or bool(self.steps_seen()), 0.002)
        else:
            self.wait_for(f"{kill.after_steps} steps", lambda: len(self.steps_seen()) >= kill.after_steps)
            known = self.hidden()
            if pattern := _SIGNS.get(kill.moment):
                sign = re.compile(pattern)
                self.wait_for(kill.moment, lambda: any(map(sign.match, self.hidden() - known)), 0.0005)
        time.sleep(kill.delay_s)

    def _lock_time(self) -> int:
        with contextlib.suppress(OSError):
            return (self.checkpoints / LOCK_NAME).stat().st_mtime_ns
        return 0

    def kill(self, victim: str) -> None:
        """Send SIGKILL, and record the state of the run."""
        kind, _, number = victim.partition(" ")
        ranks = sorted(children(self.pid()))
        if kind == "everything":
            kill_tree(self.pid())
        elif kind == "launcher":
            os.kill(self.pid(), signal.SIGKILL)
        elif kind == "rank":
            self.wait_for("the ranks", lambda: len(children(self.pid())) == NUM_RANKS)
            ranks = sorted(children(self.pid()))
            os.kill(ranks[int(number)], signal.SIGKILL)
        else:
            self.wait_for("the writers", lambda: len(self.writers()) == NUM_RANKS, 0.002)
            os.kill(self.writers()[int(number)], signal.SIGKILL)
        self._note_kill(victim, ranks)

    def _note_kill(self, victim: str, ranks: list[int]) -> None:
        text = self.log()
        self.num_read = len(text)
        self.acknowledged = max([self.acknowledged, *map(int, re.findall(r"\bsaved step (\d+)", text))])
        if not victim.startswith("writer"):
            self.old_ranks = tuple(ranks)
        if victim in WHOLE_JOB:
            assert self.launcher is not None
            self.launcher.wait()

    def check_nothing_is_lost(self) -> None:
        """A step that was reported as saved is there, or a newer one; and every step there is complete."""
        storage, name = open_storage(self.checkpoints)
        entries = catalog.scan(storage, name)
        wrong = [entry for entry in entries if entry.state != "committed"]
        newest = max((entry.step for entry in entries), default=0)
        if wrong or newest < self.acknowledged:
            raise SoakError(f"step {self.acknowledged} was saved, there are {entries}")

    def finish(self) -> None:
        """Wait for the run to end with status 0."""
        assert self.launcher is not None
        try:
            status = self.launcher.wait(PATIENCE_S + self.num_steps)
        except subprocess.TimeoutExpired:
            raise SoakError(f"the run does not end:\n{self.log()[-3000:]}") from None
        if status != 0:
            raise SoakError(f"the run ended with {status}:\n{self.log()[-3000:]}")

    def processes(self) -> dict[int, str]:
        """All processes that belong to this run, however they are orphaned, with their commands."""
        found = {}
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if place.name.isdecimal() and f"{MARK}={self.mark}".encode() in (place / "environ").read_bytes():
                    found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
        return found

    def end(self) -> None:
        """End all processes of the run, whatever has happened."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.launcher is not None:
            self.launcher.wait()

    def num_starts(self) -> int:
        """Return how often the ranks started and built their model."""
        return sum(path.read_text().count(f"on {NUM_RANKS} x cpu") for path in self.folder.glob("launcher-*.log"))


_ATTEMPT = re.escape(ATTEMPT_PREFIX) + "[0-9a-f]+"
_SIGNS = {
    "save": _ATTEMPT,
    "staged": _ATTEMPT + r"/__\d+_\d+\.distcp",
    "retention": re.escape(DELETING_PREFIX),
}
"""The name in the folder that marks each moment."""


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def _is_writer(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"milepost.saving.writer_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


# ---- the soak ----


@dataclass(frozen=True, slots=True)
class Report:
    """The faults that a run survived."""

    num_steps: int
    kills: tuple[Kill, ...]
    num_launchers: int
    num_starts: int
    seconds: float

    def __str__(self) -> str:
        def counts(what: str) -> str:
            found = Counter(str(getattr(kill, what)) for kill in self.kills)
            return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))

        return (
            f"{len(self.kills)} kills in {self.num_steps} steps and {self.seconds:.0f} s: {self.num_starts} starts of "
            f"the ranks, {self.num_launchers} launchers\n  victims: {counts('victim')}\n  moments: {counts('moment')}\n"
            f"  modes:   {counts('mode')}\nnothing was lost, and nothing is left over"
        )


def soak(folder: Path, kills: list[Kill], *more: str, show: Callable[[str], None] = lambda text: None) -> Report:
    """Train in ``folder``, killing; compare with the undisturbed run. ``show`` gets a line for each kill.

    Raises:
        SoakError: the run did not come through as it should have.
    """
    started = time.monotonic()
    segments = set(_shared_memory())
    num_steps = 3 * len(kills) + 10
    train_undisturbed(folder / "undisturbed", num_steps, *more)
    show(f"{num_steps} steps undisturbed took {time.monotonic() - started:.0f} s")
    run = Run(folder / "killed", num_steps, more)
    run.folder.mkdir()
    try:
        for number, kill in enumerate(kills):
            if run.launcher is None or run.launcher.poll() is not None:
                run.start(kill.mode)
            run.await_moment(kill)
            run.kill(kill.victim)
            run.check_nothing_is_lost()
            show(f"{time.monotonic() - started:5.0f} s  kill {number + 1}: {kill}, step {run.acknowledged} saved")
        if run.launcher is None or run.launcher.poll() is not None:
            run.start(kills[-1].mode)
        run.finish()
        _check_end(run, folder / "undisturbed", segments)
    finally:
        run.end()
    return Report(num_steps, tuple(kills), run.num_launchers, run.num_starts(), time.monotonic() - started)


def check_same_state(report: DiffReport) -> None:
    """Raise SoakError if two steps hold another state; what is attached to them names each run's own folders."""
    other = tuple(key for key in report.other_bytes if not key.startswith("attached."))
    objects = tuple(change for change in report.objects if not change.key.startswith("attached."))
    if not replace(report, other_bytes=other, objects=objects).is_same or report.num_unknown:
        raise SoakError(f"the last step is not the undisturbed run's: {report}")


def _check_end(run: Run, undisturbed: Path, segments: set[str]) -> None:
    expected, found = dict(losses(undisturbed)), list(losses(run.folder))
    if missing := set(range(1, run.num_steps + 1)) - {step for step, _ in found}:
        raise SoakError(f"no loss was logged for steps {sorted(missing)}")
    if wrong := [(step, loss, expected[step]) for step, loss in found if loss != expected[step]]:
        raise SoakError(f"losses differ from the undisturbed run's (step, loss, expected): {wrong}")
    last = step_name(run.num_steps)
    check_same_state(diff(undisturbed / "checkpoint" / last, run.checkpoints / last))
    into = milepost.load(run.checkpoints / last)
    if into["dataloader"]["samples_consumed"] != GLOBAL_BATCH * run.num_steps:
        raise SoakError(f"not every sample came once: {into['dataloader']}, of {GLOBAL_BATCH * run.num_steps}")
    saved = sorted({*range(INTERVAL, run.num_steps, INTERVAL), run.num_steps})
    kept = set(map(step_name, saved[-KEEP:]))
    kept |= set(re.findall(r"\bresumed from .*/(step-\d+) ", run.log())[-1:])  # never deleted by that run
    names = set(os.listdir(run.checkpoints)) - _cut_short(run.checkpoints)
    if names - {"events.jsonl"} != kept:
        raise SoakError(f"the run left {sorted(names)} in its folder, not just {sorted(kept)}")
    _check_gone("processes", lambda: list(run.processes().values()))
    _check_gone("shared memory", lambda: sorted(set(_shared_memory()) - segments))


def _cut_short(folder: Path) -> set[str]:
    """Attempts and deletions killed in their first or last moment: without any file, so that only their age tells."""
    found = [path for prefix in (ATTEMPT_PREFIX, DELETING_PREFIX) for path in folder.glob(f"{prefix}*")]
    return {path.name for path in found if not any(map(Path.is_file, path.rglob("*")))}


def losses(folder: Path) -> Iterator[tuple[int, float]]:
    """All (step, loss) that a run has sent to TensorBoard, those repeated after a restart too."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted((folder / "tb").glob("events.*")):
        for event in LegacyEventFileLoader(str(path)).Load():  # up to the place where a kill cut it off
            yield from ((event.step, v.simple_value) for v in event.summary.value if v.tag == "loss")


def _shared_memory() -> list[str]:
    """The segments of shared memory that have names. (A test's folder there is none.)"""
    return [entry.name for entry in os.scandir("/dev/shm") if entry.is_file()]


def _check_gone(what: str, left: Callable[[], list[str]]) -> None:
    deadline = time.monotonic() + 60
    while found := left():
        if time.monotonic() > deadline:
            raise SoakError(f"{what} left over: {found}")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a training run again and again.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="milepost-soak-"))
    again = f"make soak KILLS={args.kills} SEED={args.seed}"
    print(f"{again}   in {folder}", flush=True)
    try:
        report = soak(folder, schedule(args.seed, args.kills), show=lambda text: print(text, flush=True))
    except BaseException as error:
        print(f"FAILED; the runs are in {folder}, again: {again}", file=sys.stderr)
        sys.exit(f"error: {error}") if isinstance(error, SoakError) else None
        raise
    shutil.rmtree(folder)
    print(f"{report}\nseed {args.seed}")


if __name__ == "__main__":
    main()
