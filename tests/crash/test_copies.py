"""Copies of a step: after every fault the destination has the copy, the previous step, or nothing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import obstore.store

from milepost.errors import SaveError, StorageError
from milepost.run import catalog, checkpoint_record
from milepost.saving.copy_step import Spot, copy_step
from milepost.storage import LocalStorage
from milepost.storage.base import Storage
from milepost.storage.objectstore import ObjectStorage
from milepost.storage.retry import Retry
from milepost.testing.faulty import FaultyStorage
from milepost.testing.faulty_client import CLIENT_FAULTS, FaultyClient, Killed
from milepost.testing.sample import save_arrays
from milepost.verification.verify import verify_in

Tally = Callable[..., None]
STEP = "run/step-5"


def memory(client: object) -> ObjectStorage:
    return ObjectStorage("memory://bucket", store=client, retry=Retry(num_tries=3, first_wait_s=0.0))


def saved(storage: Storage, scale: float = 1.0) -> Spot:
    save_arrays(
        storage, STEP, {"a": np.full((6, 4), scale, np.float32)}, objects={"n": 3}, step=5, num_ranks=2, now=1.0
    )
    return Spot(storage, STEP)


def copy_of(store: obstore.store.MemoryStore) -> obstore.store.MemoryStore:
    other = obstore.store.MemoryStore()
    for meta in store.list().collect():
        other.put(meta["path"], store.get(meta["path"]).bytes())
    return other


def test_every_fault_leaves_the_step_that_was_there_or_the_copy(tmp_path: Path, tally: Tally) -> None:
    src = saved(LocalStorage(tmp_path))
    src_id = checkpoint_record.read_manifest(src.storage, STEP).save_id
    empty, begun = obstore.store.MemoryStore(), obstore.store.MemoryStore()
    old_id = checkpoint_record.read_manifest(memory(begun), saved(memory(begun), scale=2.0).path).save_id
    tried = 0
    for before, fault in itertools.product((empty, begun), CLIENT_FAULTS):
        counting = FaultyClient(copy_of(before))
        copy_step(src, Spot(memory(counting), STEP))
        # What is answered is not changed by a request that fails and is made again: a few of these will do.
        for number in range(0, len(counting.requests), 5 if fault in ("busy", "cut") else 1):
            store = copy_of(before)
            with contextlib.suppress(Killed, SaveError, StorageError):
                copy_step(src, Spot(memory(FaultyClient(store, fail_at=number, fault=fault)), STEP))
            storage = memory(store)
            found = [(entry.save_id, entry.is_usable) for entry in catalog.scan(storage, "run")]
            assert found in ([(src_id, True)], [(old_id, True)] if before is begun else []), (fault, number)
            copy_step(src, Spot(storage, STEP))
            assert verify_in(storage, STEP).is_sound, (fault, number)
            tried += 1
    tally("A copy of a step to an object store, cut short at any request", tried=tried, lost=0)


def test_every_fault_on_a_disk_leaves_nothing_or_the_copy(tmp_path: Path) -> None:
    src = saved(LocalStorage(tmp_path / "src"))
    counting = FaultyStorage(LocalStorage(tmp_path / "count"))
    copy_step(src, Spot(counting, STEP))
    for number in range(len(counting.operations)):
        storage = LocalStorage(tmp_path / str(number))
        with contextlib.suppress(StorageError, SaveError):
            copy_step(src, Spot(FaultyStorage(storage, fail_at=number), STEP))
        assert [entry.is_usable for entry in catalog.scan(storage, "run")] in ([], [True])
        copy_step(src, Spot(storage, STEP))
        assert verify_in(storage, STEP).is_sound
