"""The folder that a manager writes to, locked for its run, and its remote folder."""

from __future__ import annotations

import gc
import json
import math
import os
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from milepost.collective.comm import Comm, errors_shared, on_rank_0
from milepost.config import CheckpointConfig
from milepost.errors import ConfigError, RunLockedError, SaveError
from milepost.run import checkpoint_record
from milepost.run.lock import RunLock
from milepost.run.owner import is_alive, is_here
from milepost.run.retention import Rules
from milepost.run.step_names import step_of
from milepost.run.takeover import take_over
from milepost.saving.copy_step import Spot
from milepost.saving.job import Keep, SaveReport
from milepost.saving.nodes import Nodes, find_nodes
from milepost.saving.peers import Peers
from milepost.storage.base import join, split
from milepost.training.hooks import QUIET_S, Commit, CommitHooks
from milepost.training.node_tier import NodeTier
from milepost.training.remote import RemoteTier

if TYPE_CHECKING:
    from milepost.run.catalog import StepEntry
    from milepost.saving.background import SaveHandle
    from milepost.saving.request import SaveRequest

LOOK_S = 0.1
SEEN_S = 10.0
"""Seconds that rank 0 waits at the end for the others to have seen that a copy failed."""

_open_here: weakref.WeakValueDictionary[tuple[int, str, str], RunFolder] = weakref.WeakValueDictionary()
"""Folders in use, by process, storage root and path: two managers would confuse each other's steps."""


class RunFolder:
    """A run's folder. With per-node folders, ``nodes`` holds the ranks that share one.

    ``protected`` maps steps that retention must keep to the reason. Construction is collective, and fails on every
    rank.
    """

    def __init__(self, local: Spot, remote: Spot | None, config: CheckpointConfig, comm: Comm, hooks: CommitHooks):
        self.local = local
        self.remote = remote
        self.protected: dict[int, str] = {}
        self._config = config
        self._comm = comm
        self._hooks = hooks
        self._lock: RunLock | None = None  # on the first rank of each folder
        self._remote_tier: RemoteTier | None = None  # on rank 0
        self._node_tier: NodeTier | None = None  # on the first rank of each node, with per-node folders
        self._peers = Peers(comm) if remote is not None else None
        self._outcome = ""
        self._not_copied = ""  # on rank 0: the reason why the newest step is not in the remote folder
        self.nodes = self._find_nodes()

    @property
    def name(self) -> str:
        """The folder with its storage's root, for messages."""
        return join(self.local.storage.root, self.local.path)

    def _find_nodes(self) -> Nodes | None:
        """Find the ranks that share the folder; None if all do. Collective."""
        config = self._config
        if not (config.enable and config.folder_per_node) or self._comm.world_size == 1:
            return None
        if not self.local.storage.can_rename:
            raise ConfigError(
                f"checkpoint.folder_per_node: {self.name} is an object store, shared by all nodes: leave it unset, or "
                f"set checkpoint.folder to a path on each node's local disk"
            )
        nodes = find_nodes(self.local.storage, self.local.path, self._comm)
        return nodes if len(nodes.groups) > 1 else None

    def _on_first_ranks(self, act: Callable[[], None]) -> None:
        """Run ``act`` on rank 0, or on the first rank of each node with a folder. An error is raised on all ranks."""
        if self.nodes is None:
            on_rank_0(self._comm, act)
            return
        with errors_shared(self._comm):
            if self.nodes.is_first(self._comm.rank):
                act()

    def check(self) -> None:
        """Refuse a checkpoint as the folder of a run: steps would be saved inside it. Collective."""
        self._on_first_ranks(self._check)

    def _check(self) -> None:
        storage, path = self.local.storage, self.local.path
        if checkpoint_record.is_checkpoint(storage, path):
            parent, name = split(path)
            step = step_of(name)
            run = join(storage.root, parent)
            resume = f", and load_step={step}" if step is not None else ""
            raise ConfigError(
                f"{self.name} is a checkpoint, not the folder of a run. To resume from it, give the folder that "
                f"contains it, {run}{resume}; to start a new run with its weights, give another folder and "
                f'initial_load_path="{self.name}"'
            )

    def take(self, token: str) -> None:
        """Lock the folder and the remote one for this run, once the writers of a dead run have finished.

        Collective. ``token`` identifies the run and is the same on every rank.

        Raises:
            RunLockedError: another run, or another manager of this process, writes to one of them.
        """
        self._outcome = f"{token} copied"
        self._on_first_ranks(lambda: self._take(token))

    def _take(self, token: str) -> None:
        if self._key in _open_here:
            gc.collect()  # a manager that is no longer referenced, except by a cycle
        if self._key in _open_here:
            raise RunLockedError(
                f"another CheckpointManager of this process writes to {self.name}: close() it first, or use "
                "`with CheckpointManager(...) as manager:`; to only read, set load_only",
                path=self.name,
            )
        self._lock = take_over(self.local.storage, self.local.path)
        _open_here[self._key] = self
        if self.remote is None:
            return
        try:
            if self.nodes is not None:
                part = self.nodes.part_of(self._comm.rank)
                self._node_tier = NodeTier(self.local, self._config, self._hooks, self._comm, part, token, self.remote)
            else:
                self._remote_tier = RemoteTier(self.local, self.remote, self._config, self._hooks)
        except BaseException:
            self.release()
            raise

    @property
    def _key(self) -> tuple[int, str, str]:
        return os.getpid(), self.local.storage.root, self.local.path

    def keep(self) -> Keep | None:
        """Return the retention rules applied at a commit; None if ``NodeTier`` prunes instead."""
        if self.nodes is not None:
            return None
        protected = self.protected | self._hooks.needed("folder")
        protected |= self._remote_tier.needed() if self._remote_tier is not None else {}
        return Keep(self.local.path, Rules.of(self._config, protected))

    def announce(self, begun: SaveReport | SaveHandle, request: SaveRequest) -> None:
        """Run the hooks and start the copy when the save is committed: now, or from the committing thread."""
        if (self._comm.rank != 0 and self._node_tier is None) or request.info.step is None:
            return
        commit = Commit(
            step=request.info.step,
            path=join(self.local.storage.root, request.target),
            contents=request.info.kind,
            metrics=dict(request.info.metrics),
        )
        # The closure must not hold this object: a running save would keep a dropped manager alive.
        hooks, remote, tier, protected = self._hooks, self._remote_tier, self._node_tier, self.protected
        lineage = request.info.lineage

        def committed() -> None:
            if tier is not None:
                assert lineage is not None
                tier.offer(commit, begun.save_id, lineage.order, protected)
                return
            hooks.committed(commit)
            if remote is not None:
                remote.offer(commit, protected)

        if isinstance(begun, SaveReport):
            committed()
        else:
            begun.when_done(lambda: committed() if begun.failure is None else None)

    def offer_newest(self, entry: StepEntry) -> None:
        """Copy the newest step that all nodes hold, if an earlier run did not. On rank 0."""
        assert self._node_tier is not None
        self._node_tier.offer_what_is_left(entry)

    def close(self) -> None:
        """Wait for copies and hooks of committed steps, then release the folder. Call :meth:`check_copied` next."""
        try:
            for tier in (self._remote_tier, self._node_tier):
                self._not_copied = (tier.close() if tier is not None else "") or self._not_copied
            self._hooks.close()
        finally:
            self.release()
            self._tell()

    def _tell(self) -> None:
        """Let the other ranks hear the outcome of the copies."""
        if self._comm.rank == 0 and self.remote is not None:
            self._comm.post(self._outcome, json.dumps(self._not_copied))

    def check_copied(self) -> None:
        """Return if the newest step is in the remote folder, if there is one. Waits for rank 0's :meth:`close`.

        Raises:
            SaveError: on every rank: it could not be copied there.
        """
        if self.remote is None:
            return
        reason = self._not_copied if self._comm.rank == 0 else self._hear()
        seen = f"{self._outcome} seen"
        if self._comm.rank != 0:
            self._comm.arrive(seen)
        if not reason:
            return
        deadline = time.monotonic() + SEEN_S
        # The store in which the others look may end with this process.
        while self._comm.rank == 0 and self._comm.num_arrived(seen) < self._comm.world_size - 1:
            if time.monotonic() > deadline:
                break
            time.sleep(LOOK_S)
        raise SaveError(reason, rank=0)

    def _hear(self) -> str:
        """Return what rank 0 says of its copies: once it has closed, hours later perhaps. Not in a collective."""
        rank_0 = self._peers.find(0) if self._peers is not None else None
        while (text := self._comm.look_up(self._outcome)) is None:
            if not math.isfinite(self._comm.num_arrived(f"{self._outcome} seen")):
                return ""  # rank 0 has ended, or there is nothing to look it up in
            if rank_0 is not None and is_here(rank_0) and not is_alive(rank_0, time.time()):
                raise SaveError(f"rank 0 ({rank_0}) died before it had copied the newest step", rank=0)
            time.sleep(LOOK_S)
        return str(json.loads(text))

    def leave(self) -> None:
        """Release the folder after an error, without waiting for copies."""
        self._hooks.close(timeout_s=QUIET_S)  # hooks of committed steps are started, but must not delay an error
        for tier in (self._remote_tier, self._node_tier):
            if tier is not None:
                tier.leave()
        self.release()
        self._tell()

    def release(self) -> None:
        """Unlock the folder, if this rank holds its lock."""
        if self._lock is not None:
            self._lock.release()
            _open_here.pop(self._key, None)
