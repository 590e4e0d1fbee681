"""Hooks that run after a step is committed: a function, a command line, or both, off the training thread. On rank 0."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Literal

from milepost.run.catalog import StepEntry
from milepost.storage.base import join

log = logging.getLogger("milepost")

CLOSE_TIMEOUT_S = 600.0
"""Seconds that an ending run waits for its last hooks."""
MAX_OUTPUT = 2000
"""Bytes kept of the end of a command's output, for the log."""
OUTPUT_S = 1.0
"""Seconds to wait for the rest of an ended command's output."""
PIECE_NBYTES = 64 << 10

Tier = Literal["folder", "remote_folder"]


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
        return {
            "MILEPOST_STEP": str(self.step),
            "MILEPOST_PATH": self.path,
            "MILEPOST_CONTENTS": self.contents,
            "MILEPOST_METRICS": json.dumps(dict(self.metrics)),
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
        self._commits: queue.SimpleQueue[Commit | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def committed(self, commit: Commit) -> None:
        """Record a commit, from any thread. Returns at once."""
        if self._act is None and not self._command:
            return
        self._commits.put(commit)
        with self._lock:  # a save and a copy may be committed at once: one thread serves both
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="milepost-on-commit", daemon=True)
                self._thread.start()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Return once all hooks are done, or after ``timeout_s``, which is logged."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None:
            return
        self._commits.put(None)
        thread.join(10.0)
        if thread.is_alive():
            log.info("waiting up to %.0f s for on_commit to end", timeout_s)
            thread.join(timeout_s)
        if thread.is_alive():
            log.warning("on_commit has not ended after %.0f s: continuing without it", timeout_s)

    def _run(self) -> None:
        while (commit := self._commits.get()) is not None:
            if self._act is not None:
                try:
                    self._act(commit)
                except Exception:  # user code
                    log.exception("on_commit failed for step %d", commit.step)
            if self._command:
                self._run_command(commit)

    def _run_command(self, commit: Commit) -> None:
        try:
            process = subprocess.Popen(
                self._command,
                shell=True,
                env=os.environ | commit.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach only the training process
            )
        except OSError as error:
            log.error("checkpoint.on_commit failed for step %d: %s", commit.step, error.strerror)
            return
        assert process.stdout is not None
        output = _Tail(process.stdout)
        status = process.wait()
        if status:
            said = output.text()
            text = f": {said}" if said else ""
            log.error("checkpoint.on_commit failed for step %d (exit status %d)%s", commit.step, status, text)


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
