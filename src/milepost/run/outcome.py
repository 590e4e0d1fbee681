"""The outcome of a save: rank 0 records a failure, the other ranks wait for a commit or a failure.

They poll only the storage, so that a background save needs no collective.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable

from milepost.errors import SaveError, StorageError
from milepost.format.manifest import MANIFEST_NAME, PART_NAME
from milepost.run.object_commit import COMMITTED_NAME, TARGET_NAME
from milepost.run.place import VISIBILITY_S
from milepost.storage.base import Storage, join

RANKS_PER_S = 1024
"""Number of ranks that poll the storage per second, with three names each."""
MAX_POLL_S = 5.0
"""Maximum pause between two polls of a rank."""
FAILED_NAME = "failed"
_SAVE_ID = re.compile(rb'^"save_id": "([0-9a-f]+)",$', re.MULTILINE)
_HEAD_NBYTES = 4096
_jitter = random.Random()
"""Not the global generator of ``random``, which is part of the training state."""


def fail_attempt(storage: Storage, attempt: str, message: str, *, rank: int | None = None) -> None:
    """Record the failure, its reason and its rank for the ranks in ``wait_for_outcome``.

    The attempt stays, so that all ranks can read it; ``abort_attempt`` removes it. On a full disk an empty file must
    suffice.

    Raises:
        StorageError: not even that could be written.
    """
    name = f"{attempt}/{FAILED_NAME}"
    content = json.dumps({"rank": rank, "message": message}).encode()
    if not storage.can_rename:
        storage.write(name, content)
        return
    try:
        storage.write(f"{name}.part", content)
        storage.rename(f"{name}.part", name)
    except StorageError:
        storage.write(name, b"")


def wait_for_outcome(
    storage: Storage,
    attempt: str,
    target: str,
    save_id: str,
    *,
    timeout_s: float,
    world_size: int = 1,
    give_up: Callable[[], str | None] = lambda: None,
    poll_s: float | None = None,
    member: str = "rank",
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once the save is committed; for ranks that do not publish.

    Polls at growing intervals, up to half a second, and longer with a large ``world_size``, at random times, so that
    all ranks together make some thousand requests per second at most. ``give_up`` returns a reason to stop, or None, or
    raises the final error. ``member`` is the word for a rank in messages.

    Raises:
        SaveError: the save failed, or there was no outcome within ``timeout_s``.
    """
    deadline = clock() + timeout_s
    poll_s = storage.poll_s if poll_s is None else poll_s
    max_poll_s = min(max(0.5, world_size / RANKS_PER_S), MAX_POLL_S)
    gone_until: float | None = None
    while True:
        # Rank 0 removes the attempt after the commit, and after a failure that all ranks know of. So a missing attempt
        # proves neither: only the save id at the target does.
        names = _marks_in(storage, attempt)
        if FAILED_NAME in names:
            message, rank = recorded_failure(storage, attempt)
            raise SaveError(message, path=target, rank=rank)
        if COMMITTED_NAME in names:
            return
        if not names:
            if save_id_at(storage, target) == save_id:
                return
            # The attempt disappears at once, but the checkpoint that it became may become visible later (NFS).
            if gone_until is None:
                gone_until = min(deadline, clock() + VISIBILITY_S)
            if clock() >= gone_until:
                raise SaveError(f"the save of {storage.root}/{target} was aborted before it was committed", path=target)
        reason = give_up()
        if reason is not None or clock() >= deadline:
            raise SaveError(
                f"{member} 0 did not commit {storage.root}/{target} {reason or f'within {timeout_s:g} s'}: see its log",
                path=target,
                rank=0,
            )
        sleep(poll_s * _jitter.uniform(0.7, 1.3))
        poll_s = min(poll_s * 1.5, max_poll_s)


def recorded_failure(storage: Storage, attempt: str) -> tuple[str, int | None]:
    """Read the reason and the rank of a failure, as recorded by rank 0 in the attempt.

    Raises:
        StorageError: there is no record.
    """
    said = storage.read(f"{attempt}/{FAILED_NAME}", 1 << 20)
    if not said:
        return "rank 0 failed to commit and could not record the reason; see its log", None
    recorded = json.loads(said)
    return recorded["message"], recorded["rank"]


def _marks_in(storage: Storage, attempt: str) -> set[str]:
    """Find the marks that record an attempt's outcome, and the attempt itself.

    The attempt is not listed: it holds a sign-off of every rank, and every rank polls it.
    """
    itself = attempt if storage.can_rename else f"{attempt}/{TARGET_NAME}"
    places = {name: f"{attempt}/{name}" for name in (FAILED_NAME, COMMITTED_NAME)} | {TARGET_NAME: itself}
    return {name for name, place in places.items() if storage.stat(place) is not None}


def save_id_at(storage: Storage, target: str) -> str:
    """The save id at ``target``, or empty. Reads only the head of the manifest, since a thousand ranks may ask."""
    paths = (join(target, name) for name in (MANIFEST_NAME, PART_NAME))
    path = next((path for path in paths if storage.stat(path) is not None), None)
    if path is None:
        return ""
    with storage.open_read(path) as handle:
        head = bytearray(min(handle.nbytes, _HEAD_NBYTES))
        handle.read_into(0, [memoryview(head)])
    found = _SAVE_ID.search(head)
    return found[1].decode() if found else ""
