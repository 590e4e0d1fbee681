"""The remote tier of a run: copies committed steps to ``checkpoint.remote_folder`` during training.

On rank 0. One step is copied at a time, in a separate process, and of the waiting ones only the newest: a slow link
gets fewer steps, not a queue.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from milepost.config import CheckpointConfig
from milepost.errors import StorageError
from milepost.run import catalog, marks
from milepost.run.branches import History
from milepost.run.catalog import StepEntry
from milepost.run.lock import RunLock
from milepost.run.object_sweep import remove_orphans
from milepost.run.retention import Rules
from milepost.run.step_names import step_name
from milepost.run.sweep import name_left, sweep_leftovers
from milepost.saving import copy_process
from milepost.saving.copy_process import CopyRequest
from milepost.saving.copy_step import Spot
from milepost.saving.job import Keep
from milepost.storage.base import format_nbytes, join
from milepost.training.choice import both_tiers
from milepost.training.hooks import Commit, CommitHooks, commit_of

log = logging.getLogger("milepost")

RETRY_S = 10.0
LAST_TRIES = 3
"""Number of failures after which a copy is abandoned once the run has ended."""
LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class CopyOutcome:
    """The outcome of a copy. ``is_final``: it failed because of the step itself, so it is not retried.

    ``is_gone``: the step was deleted meanwhile.
    """

    failure: str = ""
    """Reason why the step could not be copied; empty if it was."""
    is_final: bool = False
    is_gone: bool = False
    nbytes: int = 0
    """Bytes sent."""


def _name(spot: Spot) -> str:
    return join(spot.storage.root, spot.path) if spot.path else spot.storage.root


def run_copy(
    request: CopyRequest, started: Callable[[subprocess.Popen[bytes]], None] = lambda process: None
) -> CopyOutcome:
    """Copy in a separate process, passed to ``started``; returns the outcome."""
    said: Mapping[str, Any] = {}
    try:
        with copy_process.start(request) as process:
            started(process)
            for message in copy_process.messages(process):
                said = message
    except (OSError, subprocess.SubprocessError) as error:
        return CopyOutcome(f"{type(error).__name__}: {error}")
    if "seconds" not in said:
        text = said.get("error") or f"its process ended with status {process.returncode}"
        return CopyOutcome(str(text), is_final=bool(said.get("is_final")), is_gone=bool(said.get("is_gone")))
    return CopyOutcome(nbytes=int(said["nbytes"]))


class RemoteTier:
    """Copies offered steps, from construction to :meth:`close` or :meth:`leave`.

    If each node copies its own part, ``announce`` is called with each step before it is copied, and ``abandon`` with
    one that can't be copied from here.

    Raises:
        ConfigError: the remote folder holds steps of another run.
        RunLockedError: another run writes to the remote folder.
        StorageError: it can't be read or written.
    """

    def __init__(
        self,
        local: Spot,
        remote: Spot,
        config: CheckpointConfig,
        hooks: CommitHooks,
        *,
        retry_s: float | None = None,
        announce: Callable[[Commit], None] | None = None,
        abandon: Callable[[Commit], None] = lambda commit: None,
    ):
        self._announce = announce
        self._abandon = abandon
        self._local = local
        self._remote = remote
        self._config = config
        self._hooks = hooks
        self._retry_s = RETRY_S if retry_s is None else retry_s
        self._changed = threading.Condition()
        self._waiting: Commit | None = None
        self._current: Commit | None = None
        self._newest: Commit | None = None  # of the offered steps, even if not to be copied
        self._protected: Mapping[int, str] = {}
        self._ends = self._has_left = False
        self._copied: Commit | None = None
        self._cause = ""  # of the last failure
        # Refuse a missing bucket, or another run's folder, before anything is written.
        newest = self._newest_if_local()
        self._lock = RunLock(remote.storage, remote.path)
        # An earlier run's process may still be copying: let it finish, and keep its attempt.
        swept = sweep_leftovers(remote.storage, remote.path, now=time.time())
        name_left(remote.storage, remote.path, swept.left)
        if not remote.storage.can_rename:
            remove_orphans(remote.storage, remote.path)
        marks.note_remote(local.storage, local.path, join(remote.storage.root, remote.path))
        self._thread = threading.Thread(target=self._run, name="milepost-remote", daemon=True)
        self._thread.start()
        if announce is not None:
            return
        try:
            self._offer_what_is_left(newest)
        except BaseException:
            self.leave()
            raise

    def offer(self, commit: Commit, protected: Mapping[int, str]) -> None:
        """Record a locally committed step. Returns at once; thread-safe.

        ``protected``: steps not to prune in the remote folder.
        """
        every = self._config.remote_every_n_steps
        with self._changed:
            self._newest, self._protected = commit, dict(protected)
            if not every or commit.step % every == 0:
                self._waiting = commit
                self._changed.notify_all()

    def needed(self) -> dict[int, str]:
        """Return the local steps that must be kept until they are copied, with the reason."""
        with self._changed:
            wanted = [commit for commit in (self._current, self._waiting) if commit is not None]
        return {commit.step: "it is being copied to checkpoint.remote_folder" for commit in wanted}

    def close(self) -> str:
        """Return once the newest step is copied, or can't be: then with the reason, and what to do about it."""
        with self._changed:
            if not any(self._newest is one for one in (self._copied, self._current, None)):
                self._waiting = self._newest
            self._ends = True
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(LOG_EVERY_S)
            if self._thread.is_alive():
                log.info("waiting for the newest step to be copied to %s", _name(self._remote))
        self._lock.release()
        return self._why_not_copied()

    def _why_not_copied(self) -> str:
        """Say why the newest step is not in the remote folder, what is there, and how to copy it; empty if it is."""
        newest = self._newest
        if newest is None or newest is self._copied:
            return ""
        here, there = _name(self._local), _name(self._remote)
        text = f"step {newest.step} was not copied to checkpoint.remote_folder {there}, {self._content_there()}"
        text += f": {self._cause}" if self._cause else ""
        try:
            found = catalog.examine(self._local.storage, join(self._local.path, step_name(newest.step)))
        except StorageError as error:
            return f"{text}. It can't be read in {here} either: {error.message}"
        if found is not None and found.state == "part":
            return (
                f"{text}. It is in the nodes' folders {here}: the next start of this run copies it, if all have theirs"
            )
        if found is None or not found.is_usable:
            return f"{text}. {newest.path} is {found.state if found is not None else 'gone'}"
        command = shlex.join(["milepost", "sync", newest.path, there])
        return (
            f"{text}. It is committed only in {here}: before that is deleted, run `{command}`, or start this run again"
        )

    def _content_there(self) -> str:
        try:
            entries = [] if self._copied else catalog.scan(self._remote.storage, self._remote.path)
        except StorageError:
            return "which can't be read"
        newest = self._copied or next((e for e in reversed(History.of(entries).current) if e.is_usable), None)
        return f"whose newest step is {newest.step}" if newest is not None else "which holds no step"

    def leave(self) -> None:
        """Stop after an error: the running copy is finished by its process, no other is started."""
        with self._changed:
            self._ends = self._has_left = True
            self._waiting = None
            self._changed.notify_all()
        self._lock.release()

    def _newest_if_local(self) -> StepEntry | None:
        """Return the newest step of both folders, if only the local one has it and it is committed there.

        An older local step is not copied: the remote folder may hold a later save of its number.
        """
        here = catalog.scan(self._local.storage, self._local.path)
        there = catalog.scan(self._remote.storage, self._remote.path)
        found = both_tiers(here, there, str(self._remote))
        newest = History.of(entry for entry, _ in found).newest
        if newest is None or newest.state != "committed":
            return None
        has_it = any(entry.is_usable and entry.save_id == newest.save_id for entry in there)
        return newest if not has_it and any(entry is newest for entry in here) else None

    def _offer_what_is_left(self, newest: StepEntry | None) -> None:
        """Offer the step that an earlier run committed but did not copy."""
        if newest is not None:
            self.offer(commit_of(newest, self._local.storage.root), {})

    def _run(self) -> None:
        num_failures = 0
        while (commit := self._next()) is not None:
            failure = self._copy(commit)
            with self._changed:
                self._current = None
                if failure is None:
                    num_failures, self._copied = 0, commit
                    continue
                num_failures += 1
                gives_up = failure.is_final or self._has_left or (self._ends and num_failures >= LAST_TRIES)
                if not gives_up and self._waiting is None:
                    self._waiting = commit
            self._report(commit, failure, "not tried again" if gives_up else "tried again")
            with self._changed:
                if not gives_up:
                    self._changed.wait_for(lambda: self._has_left, self._retry_s)

    def _report(self, commit: Commit, failure: CopyOutcome, what: str) -> None:
        self._cause = failure.failure
        there = _name(self._remote)
        if failure.is_gone:
            log.info("step %d was deleted before it was copied to %s", commit.step, there)
        else:
            log.warning("step %d could not be copied to %s (%s): %s", commit.step, there, what, failure.failure)

    def _next(self) -> Commit | None:
        """Return the next step to copy; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._ends)
            self._current, self._waiting = self._waiting, None
            return self._current

    def _copy(self, commit: Commit) -> CopyOutcome | None:
        """Copy a step and run the hooks. Returns the reason of a failure; None on success."""
        name = step_name(commit.step)
        dst_path = join(self._remote.path, name)
        request = CopyRequest(
            src_root=self._local.storage.root,
            src_path=join(self._local.path, name),
            dst_root=self._remote.storage.root,
            dst_path=dst_path,
            keep=self._keep(),
            is_part=self._announce is not None,
        )
        if self._announce is not None:
            self._announce(commit)
        started = time.monotonic()
        outcome = run_copy(request)
        if outcome.failure:
            if outcome.is_final:
                self._abandon(commit)
            return outcome
        size, seconds = format_nbytes(outcome.nbytes), time.monotonic() - started
        log.info("copied step %d to %s: %s in %.1f s", commit.step, _name(self._remote), size, seconds)
        self._hooks.committed(replace(commit, path=join(self._remote.storage.root, dst_path), tier="remote_folder"))
        return None

    def _keep(self) -> Keep:
        config = self._config
        rules = replace(
            Rules.of(config, {**self._protected, **self._hooks.needed("remote_folder")}),
            keep_latest_k=config.remote_keep_latest_k,
            keep_every_n=config.remote_keep_every_n_steps,
        )
        return Keep(self._remote.path, rules)
