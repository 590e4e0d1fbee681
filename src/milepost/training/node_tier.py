"""The local folders of a run with one per node: when a step counts, pruning, and the copies to the remote folder.

One :class:`NodeTier` on the first rank of each node. They agree in the background through the job's store, without
collectives or a shared folder::

    part      each node: its part of a save is committed in its folder
        noted     each node: it knows that all have theirs, and has recorded that beside the step
        order 1.. rank 0 to the others: the older parts to keep, the step to copy, the end of the run
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from milepost.collective.comm import Comm
from milepost.config import CheckpointConfig
from milepost.errors import CheckpointNotFoundError, MilepostError, StorageError
from milepost.run import marks, node_steps, retention
from milepost.run.catalog import StepEntry, examine
from milepost.run.node_part import NodePart
from milepost.run.step_names import pin_mark, step_name
from milepost.run.sweep import delete_checkpoint
from milepost.saving.copy_part import report_to_nodes
from milepost.saving.copy_process import CopyRequest
from milepost.saving.copy_step import Spot
from milepost.storage.base import join
from milepost.training.hooks import Commit, CommitHooks, commit_of
from milepost.training.remote import RETRY_S, RemoteTier, run_copy

log = logging.getLogger("milepost")

POLL_S = 0.25
END_S = 60.0
"""Seconds that nodes wait for each other at the end of a run."""


@dataclass(frozen=True, slots=True)
class _Own:
    """A save whose part on this node is committed."""

    commit: Commit
    save_id: str
    order: int
    protected: Mapping[int, str]
    is_noted: bool = False


class NodeTier:
    """Settles offered saves, from construction to :meth:`close` or :meth:`leave`. ``remote`` is given on rank 0."""

    def __init__(
        self,
        local: Spot,
        config: CheckpointConfig,
        hooks: CommitHooks,
        comm: Comm,
        part: NodePart,
        token: str,
        remote: Spot,
    ):
        self._local = local
        self._config = config
        self._hooks = hooks
        self._comm = comm
        self._part = part
        self._token = token
        self._changed = threading.Condition()
        self._own: list[_Own] = []
        self._ends = self._has_left = False
        self._last: _Own | None = None  # of those that are settled; on rank 0
        self._not_copied = ""  # on rank 0: the reason why the newest step is not in the remote folder
        self._num_orders = 0
        self._remote: RemoteTier | None = None
        if comm.rank == 0:
            self._remote = RemoteTier(
                local, remote, config, hooks, announce=self._order_copy, abandon=self._order_no_copy
            )
        self._copies = _Copies(local, remote, part.node) if comm.rank != 0 else None
        if self._copies is not None:  # on rank 0 the remote tier does it
            marks.note_remote(local.storage, local.path, join(remote.storage.root, remote.path))
        self._thread = threading.Thread(target=self._run, name="milepost-node", daemon=True)
        self._thread.start()

    def offer(self, commit: Commit, save_id: str, order: int, protected: Mapping[int, str]) -> None:
        """Record that this node's part of a save is committed. Returns at once; thread-safe."""
        with self._changed:
            self._own.append(_Own(commit, save_id, order, dict(protected)))
            self._comm.arrive(self._key("part", save_id))
            self._changed.notify_all()

    def offer_what_is_left(self, entry: StepEntry) -> None:
        """Offer the step that an earlier run committed on all nodes but did not copy. On rank 0."""
        assert self._remote is not None
        self._remote.offer(commit_of(entry, self._local.storage.root), {})

    def close(self) -> str:
        """Return once all saves are settled and the newest is copied, or can't be. Call it after the last save.

        On rank 0 returns the reason why it is not in the remote folder; else, and if it is there, nothing.
        """
        self._comm.arrive(self._key("closing"))  # after the last offer of this node's
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        self._thread.join()
        return self._not_copied

    def leave(self) -> None:
        """Stop after an error: a running copy is finished by its process, if the other nodes do their part."""
        with self._changed:
            self._has_left = True
            self._changed.notify_all()
        if self._remote is not None:
            self._remote.leave()

    def _key(self, what: str, of: str = "") -> str:
        return f"{self._token} {what} {of}"

    def _all_have(self, what: str, save_id: str) -> bool:
        arrived = self._comm.num_arrived(self._key(what, save_id))
        return math.isfinite(arrived) and arrived >= self._part.num_nodes

    def _run(self) -> None:
        deadline = math.inf
        while not self._has_left:
            with self._changed:
                ends = self._ends
            self._settle()
            if self._copies is not None and not self._follow(self._copies):
                break
            if ends and self._copies is not None and not math.isfinite(self._comm.num_arrived(self._key("ended"))):
                break  # rank 0 has exited
            if ends and self._remote is not None:
                deadline = min(deadline, time.monotonic() + END_S)
                if self._is_over() or time.monotonic() > deadline:
                    break
            with self._changed:
                self._changed.wait(POLL_S)
        self._end()

    def _is_over(self) -> bool:
        """Return whether rank 0 has nothing left to settle. If a save failed on a node, its part never arrives."""
        has_all = self._all_have("closing", "")
        with self._changed:
            if has_all:
                self._own = [own for own in self._own if self._all_have("part", own.save_id)]
            return has_all and not self._own

    def _end(self) -> None:
        if self._copies is not None:
            self._comm.arrive(self._key("ended"))
            if self._has_left:
                self._copies.leave()
            else:
                self._copies.close()
        elif self._remote is not None and not self._has_left:
            self._not_copied = self._remote.close() or self._why_not_settled()
            if self._last is not None:
                with contextlib.suppress(StorageError):  # steps kept while they were copied
                    self._prune_all(self._last, self._remote)
            self._order({"end": True})
            deadline = time.monotonic() + END_S
            # The store that the other nodes poll may end with this process.
            while self._comm.num_arrived(self._key("ended")) < self._part.num_nodes - 1:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)

    def _why_not_settled(self) -> str:
        with self._changed:
            left = [own.commit.step for own in self._own]
        if not left:
            return ""
        return (
            f"step {left[-1]} was not copied to checkpoint.remote_folder: within {END_S:.0f} s not all nodes have "
            "reported that they have recorded it. The next start of this run copies it, if they have"
        )

    # ---- settling ----

    def _settle(self) -> None:
        with self._changed:
            waiting = list(self._own)
        for own in waiting:
            try:
                if not self._settle_one(own):
                    break  # in order: hooks run for each, and the newest is offered last
            except MilepostError as error:  # will be retried
                log.warning("could not record yet that step %d is committed on all nodes: %s", own.commit.step, error)

    def _settle_one(self, own: _Own) -> bool:
        """Settle a save; False if it is still in progress, so that later ones must wait."""
        if not own.is_noted:
            if not self._all_have("part", own.save_id):
                return True
            node_steps.note_settled(self._local.storage, self._local.path, own.commit.step, own.save_id)
            self._comm.arrive(self._key("noted", own.save_id))
            with self._changed:
                # Earlier unsettled saves never will be: they failed on a node.
                self._own = [one for one in self._own if one.order > own.order]
                if self._remote is not None:
                    own = replace(own, is_noted=True)
                    self._own.insert(0, own)
        if self._remote is None:
            return True
        if not self._all_have("noted", own.save_id):
            return False
        with self._changed:
            self._own = [one for one in self._own if one.order > own.order]
        self._hooks.committed(own.commit)
        self._remote.offer(own.commit, own.protected)  # before the pruning, which keeps the step to be copied
        self._last = own
        self._prune_all(own, self._remote)
        return True

    def _prune_all(self, own: _Own, remote: RemoteTier) -> None:
        kept = self._prune(own, remote)
        self._order({"kept": kept, "order": own.order})

    def _prune(self, own: _Own, remote: RemoteTier) -> list[str]:
        """Apply the rules to the settled steps on rank 0's node; returns the save ids of those kept."""
        folder = node_steps.look_at_node(self._local.storage, self._local.path, self._part)
        entries = [
            replace(entry, state="committed")
            for entry in folder.entries
            if entry.state == "part" and folder.settled.get(entry.step) == entry.save_id
        ]
        rules = retention.Rules.of(self._config, {**own.protected, **remote.needed(), **self._hooks.needed("folder")})
        decisions = retention.plan(entries, rules, now=time.time())
        keep = {decision.step for decision in decisions if decision.keep}
        kept = [entry.save_id for entry in entries if entry.step in keep]
        self._delete(node_steps.outdated(folder, kept, own.order))
        return kept

    def _delete(self, entries: list[StepEntry]) -> None:
        for entry in entries:
            try:
                if delete_checkpoint(self._local.storage, entry.path, unless=pin_mark(entry.path)):
                    log.info(
                        "deleted %s: no rule keeps it (keep_latest_k = %d)", entry.name, self._config.keep_latest_k
                    )
            except CheckpointNotFoundError:
                continue
            except StorageError as error:
                log.warning("an old step could not be deleted: %s", error)

    # ---- orders ----

    def _order_copy(self, commit: Commit) -> None:
        entry = examine(self._local.storage, join(self._local.path, step_name(commit.step)))
        self._order({"copy": commit.step, "save_id": entry.save_id if entry is not None else ""})

    def _order_no_copy(self, commit: Commit) -> None:
        self._order({"stop": commit.step})

    def _order(self, what: Mapping[str, Any]) -> None:
        with self._changed:
            self._num_orders += 1
            self._comm.post(self._key("order", str(self._num_orders)), json.dumps(what))

    def _follow(self, copies: _Copies) -> bool:
        """Follow rank 0's orders since the last call; returns False at the end of the run."""
        while (text := self._comm.look_up(self._key("order", str(self._num_orders + 1)))) is not None:
            self._num_orders += 1
            order = json.loads(text)
            if "end" in order:
                return False
            if "copy" in order:
                copies.begin(order["copy"], order["save_id"])
            elif "stop" in order:
                log.warning("step %d is not copied: node 0 can't copy its part, see its log", order["stop"])
                copies.stop()
            else:
                with contextlib.suppress(StorageError):  # at the next order
                    folder = node_steps.look_at_node(self._local.storage, self._local.path, self._part)
                    self._delete(node_steps.outdated(folder, order["kept"], order["order"]))
        return True


class _Copies:
    """Copies this node's parts one at a time, on rank 0's orders. On all nodes except the first."""

    def __init__(self, local: Spot, remote: Spot, node: int):
        self._local = local
        self._remote = remote
        self._node = node
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._is_given_up = threading.Event()

    def begin(self, step: int, save_id: str) -> None:
        """Copy a step; an earlier copy that is not done is abandoned."""
        self.stop()
        name = step_name(step)
        request = CopyRequest(
            src_root=self._local.storage.root,
            src_path=join(self._local.path, name),
            dst_root=self._remote.storage.root,
            dst_path=join(self._remote.path, name),
            keep=None,
            is_part=True,
        )
        self._is_given_up.clear()
        self._thread = threading.Thread(
            target=self._copy, args=(step, save_id, request), name="milepost-part", daemon=True
        )
        self._thread.start()

    def _copy(self, step: int, save_id: str, request: CopyRequest) -> None:
        """Copy with retries until done: the other nodes' processes wait for this part."""
        while (outcome := run_copy(request, self._started)).failure and not self._is_given_up.is_set():
            log.warning(
                "this node's part of step %d could not be copied to %s: %s", step, self._remote, outcome.failure
            )
            if outcome.is_final:
                self._report_failure(step, save_id, outcome.failure)
            if outcome.is_final or self._is_given_up.wait(RETRY_S):
                return

    def _report_failure(self, step: int, save_id: str, reason: str) -> None:
        """Report to the other nodes' processes that this part will not arrive, once they have begun."""
        dst = Spot(self._remote.storage, join(self._remote.path, step_name(step)))
        deadline = time.monotonic() + END_S
        while save_id and time.monotonic() < deadline:
            try:
                if report_to_nodes(dst, self._node, save_id, reason):
                    return
            except StorageError as error:
                log.warning("could not report to the other nodes that step %d is not copied: %s", step, error)
            if self._is_given_up.wait(POLL_S):
                return

    def _started(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        if self._is_given_up.is_set():
            process.terminate()

    def stop(self) -> None:
        """Abandon the running copy."""
        self._is_given_up.set()
        if self._thread is not None and self._thread.is_alive():
            if self._process is not None:
                self._process.terminate()
            self._thread.join()
        self._process = None

    def leave(self) -> None:
        """Stop retrying; a running copy is finished by its process."""
        self._is_given_up.set()

    def close(self) -> None:
        """Return once the last copy has ended, which follows rank 0's."""
        if self._thread is not None:
            self._thread.join(END_S)
        self.stop()
