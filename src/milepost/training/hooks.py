"""Hooks that run after a step is committed: a function, a command line, or both, off the training thread. On rank 0."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Literal

from milepost.collective.alone import alone
from milepost.errors import listed
from milepost.run.catalog import StepEntry
from milepost.storage.base import counted, join

log = logging.getLogger("milepost")

CLOSE_TIMEOUT_S = 600.0
"""Seconds that an ending run waits for its last hooks."""
QUIET_S = 10.0
"""Seconds of that without a word; all that a run waits which ends with an error."""
MANY = 8
"""Number of commits waiting for their hook that is reported, and again when it has doubled."""
MAX_OUTPUT = 2000
"""Bytes kept of the end of a command's output, for the log."""
OUTPUT_S = 1.0
"""Seconds to wait for the rest of an ended command's output."""
PIECE_NBYTES = 64 << 10

Tier = Literal["folder", "remote_folder"]

_NUMBERS = {f"{of}{number}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for number in ("RANK", "WORLD_SIZE")}
_OF_A_RANK = _NUMBERS | {"ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "MILEPOST_LAUNCHER_PID"}
_OF_TORCHRUN = "TORCHELASTIC_"
"""Variables by which a launcher makes a process a rank of the job: a program of a hook would wait for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A newly committed step in one of the run's folders."""

    step: int
    path: str
    """Path or URL of the step's folder."""
    contents: str
    """``full`` or ``model``."""
    metrics: Mapping[str, float]
    """The metrics recorded with it."""
    tier: Tier = "folder"
    """The option that names the folder: ``checkpoint.folder`` or ``checkpoint.remote_folder``."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables that describe it to a command line."""
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return {
            "MILEPOST_STEP": str(self.step),
            "MILEPOST_PATH": self.path,
            "MILEPOST_CONTENTS": self.contents,
            "MILEPOST_METRICS": json.dumps(metrics),  # JSON has no NaN
            "MILEPOST_TIER": self.tier,
        }


def commit_of(entry: StepEntry, root: str) -> Commit:
    """Describe a step that an earlier run committed in the folder of a storage with this root."""
    return Commit(
        step=entry.step,
        path=join(root, entry.path),
        contents=entry.kind or "full",
        metrics=dict(entry.metrics),
    )


class CommitHooks:
    """Calls ``act`` and runs ``command`` for each commit, in order, in a separate thread.

    A failure is logged, and affects neither training nor the checkpoint.
    """

    def __init__(self, act: Callable[[Commit], None] | None, command: str):
        self._act = act
        self._command = command
        self._changed = threading.Condition()  # a save and a copy may be committed at once: one thread serves both
        self._waiting: deque[Commit] = deque()
        self._current: Commit | None = None
        self._thread: threading.Thread | None = None
        self._ends = False
        self._many = MANY

    def committed(self, commit: Commit) -> None:
        """Record a commit, from any thread. Returns at once."""
        if self._act is None and not self._command:
            return
        with self._changed:
            self._waiting.append(commit)
            if len(self._waiting) >= self._many:
                self._many *= 2
                log.warning(
                    "on_commit is slower than the saves: %d commits wait for it, and their steps may be deleted before "
                    "it has run (see keep_latest_k)",
                    len(self._waiting),
                )
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="milepost-on-commit", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def needed(self, tier: Tier) -> dict[int, str]:
        """Return the steps of a folder that a hook is using or is about to, with the reason not to delete them."""
        with self._changed:
            found = [*([self._current] if self._current is not None else []), *list(self._waiting)[:1]]
        return {commit.step: "on_commit is running for it" for commit in found if commit.tier == tier}

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Return once all hooks are done, or after ``timeout_s``, which is logged."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._ends = True
            self._changed.notify_all()
        if thread is None:
            return
        thread.join(min(timeout_s, QUIET_S))
        if thread.is_alive() and timeout_s > QUIET_S:
            log.info("waiting up to %.0f s for on_commit to end: %s", timeout_s, self._left())
            thread.join(timeout_s - QUIET_S)
        if thread.is_alive():
            log.warning(
                "on_commit has not ended after %.0f s: continuing without it: %s. What has not begun when this process "
                "ends is never run; a running command goes on",
                *(timeout_s, self._left()),
            )

    def _left(self) -> str:
        with self._changed:
            current, waiting = self._current, [f"step {commit.step} ({commit.tier})" for commit in self._waiting]
        runs = f"it runs for step {current.step} ({current.tier})" if current is not None else "it is between two"
        return runs + (f"; {counted(len(waiting), 'commit')} waiting: {', '.join(listed(waiting))}" if waiting else "")

    def _next(self) -> Commit | None:
        """Return the next commit; None at the end."""
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._waiting or self._ends)
            self._current = self._waiting.popleft() if self._waiting else None
            return self._current

    def _run(self) -> None:
        while (commit := self._next()) is not None:
            if self._act is not None:
                try:
                    with alone():
                        self._act(commit)
                except BaseException:
                    log.exception("on_commit failed for step %d", commit.step)
            if self._command:
                self._run_command(commit)

    def _run_command(self, commit: Commit) -> None:
        try:
            process = subprocess.Popen(
                self._command,
                shell=True,
                env=_environment() | commit.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach only the training process
            )
        except (OSError, ValueError) as error:
            log.error("checkpoint.on_commit failed for step %d: %s", commit.step, error)
            return
        assert process.stdout is not None
        output = _Tail(process.stdout)
        status = process.wait()
        if status:
            said = output.text()
            text = f": {said}" if said else ""
            log.error("checkpoint.on_commit failed for step %d (%s)%s", commit.step, _ending(status), text)


def _environment() -> dict[str, str]:
    """Return this process's environment without that of a rank."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_RANK and not name.startswith(_OF_TORCHRUN)
    }


def _ending(status: int) -> str:
    """Name the end of a command. A shell reports a signal that killed its last program as 128 + its number."""
    number = -status if status < 0 else status - 128
    if number in {member.value for member in signal.Signals}:
        return f"{'killed by' if status < 0 else f'exit status {status},'} {signal.Signals(number).name}"
    return f"exit status {status}"


class _Tail:
    """Keeps the end of a command's output. All output is read, so that the command never blocks.

    Background processes of the command may hold its output open: they are not waited for.
    """

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._kept = b""
        self._thread = threading.Thread(target=self._read, name="milepost-on-commit-output", daemon=True)
        self._thread.start()

    def text(self) -> str:
        """The last output, once the command has ended."""
        self._thread.join(OUTPUT_S)
        return self._kept.decode(errors="replace").strip()

    def _read(self) -> None:
        with self._stream:
            while chunk := os.read(self._stream.fileno(), PIECE_NBYTES):
                self._kept = (self._kept + chunk)[-MAX_OUTPUT:]
