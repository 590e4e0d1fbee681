"""A run on a store, and what is done to its folder by hand: a fault at any request leaves the old state or the new.

``tests/run/test_object_commit.py`` does the same to the commit alone, ``test_copies.py`` to a copy alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import obstore.store
import pytest
import torch
from small_runs import Progress
from torch import nn

from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import MilepostError
from milepost.format.manifest import MANIFEST_NAME
from milepost.run import catalog, checkpoint_record, marks, object_sweep, retention, sweep, takeover
from milepost.run.lock import RunLock
from milepost.run.object_commit import aliases
from milepost.run.step_names import PINNED_PREFIX
from milepost.saving.copy_step import Spot, copy_step
from milepost.saving.job import Keep, prune
from milepost.storage import LocalStorage
from milepost.storage.base import Storage, join
from milepost.storage.objectstore import ObjectStorage
from milepost.storage.retry import Retry
from milepost.testing.faulty_client import CLIENT_FAULTS, ClientFault, FaultyClient, Killed
from milepost.training import manager as manager_module
from milepost.verification.verify import verify_in

Tally = Callable[..., None]
Store = obstore.store.MemoryStore
Act = Callable[[Storage], object]
Shown = dict[int, tuple[float, bool]]
"""The steps that a scan shows: the one value that their weights have, and whether they are pinned."""

WIDTH = 500
KEEP = {".lock", "events.jsonl"}


class Model(nn.Module):
    """All weights have one value, but for one that never changes: it is shared from step to step."""

    def __init__(self, value: float):
        super().__init__()
        self.frozen = nn.Parameter(torch.full((20_000,), 0.125), requires_grad=False)
        self.layers = nn.ParameterList(nn.Parameter(torch.full((WIDTH,), value)) for _ in range(2))


def on(client: object) -> ObjectStorage:
    return ObjectStorage("memory://bucket", store=client, retry=Retry(num_tries=3, first_wait_s=0.0))


def copy_of(begun: Store) -> Store:
    store = Store()
    for meta in begun.list().collect():
        store.put(meta["path"], begun.get(meta["path"]).bytes())
    return store


def run(storage: Storage, *saves: tuple[int, float], load_step: int = -1, keep: int = 0) -> None:
    """Lock the folder, sweep, resume, save, release."""
    model, progress = Model(0.0), Progress()
    config = CheckpointConfig(interval=1, keep_latest_k=keep, load_step=load_step, last_save_model_only=False)
    with mock.patch.object(manager_module, "open_storage", return_value=(storage, "run")):
        manager = CheckpointManager(
            "run", config, model=model, optimizer=torch.optim.SGD(model.parameters()), train_state=progress
        )
    with manager:
        manager.load()
        for step, value in saves:
            for parameter in model.layers:
                nn.init.constant_(parameter, value)
            progress.step = step
            manager.save(step)


def delete_old(storage: Storage) -> None:
    """Do what `milepost prune --keep-latest 1` does."""
    decisions = retention.plan(catalog.scan(storage, "run"), retention.Rules(1), now=time.time())
    retention.apply(storage, "run", decisions)
    sweep.sweep_leftovers(storage, "run", now=time.time())


def copy_to_remote(local: Path, storage: Storage) -> None:
    """Do what the process of the remote tier does."""
    copy_step(Spot(LocalStorage(local), "run/step-3"), Spot(storage, "run/step-3"))
    prune(storage, Keep("run", retention.Rules(2)))


def shown(storage: Storage) -> Shown:
    found = {}
    for entry in catalog.scan(storage, "run"):
        assert entry.state == "committed", entry
        report = verify_in(storage, entry.path)
        assert report.is_sound, report
        found[entry.step] = (value_of(storage, entry.path), entry.pinned)
    return found


def value_of(storage: Storage, path: str) -> float:
    manifest = checkpoint_record.read_manifest(storage, path)
    values: set[float] = set()
    for key in ("layers.0", "layers.1"):
        (shard,) = manifest.tensors[key].shards
        with storage.open_read(join(path, shard.file)) as handle:
            values |= {*np.frombuffer(handle.read(shard.data_offset or 0, shard.data_nbytes), np.float32).tolist()}
    (value,) = values
    return value


def leftovers(storage: Storage) -> list[str]:
    """Return what belongs to no step of the run."""
    known = set(KEEP)
    for entry in catalog.scan(storage, "run"):
        manifest = checkpoint_record.read_manifest(storage, entry.path)
        known |= {f"{entry.name}/{name}" for name in (*manifest.files, *aliases(manifest), MANIFEST_NAME)}
        known |= {PINNED_PREFIX + entry.name}
    return sorted(storage.list_files("run").keys() - known)


def sweep_like_the_next_run(storage: Storage) -> None:
    """Sweep once dead runs are known to be dead, and readers have finished."""
    with ExitStack() as stack:
        for name in ("READERS_S", "OWNERLESS_LIFETIME_S"):
            stack.enter_context(mock.patch.object(object_sweep, name, -60.0))
        stack.enter_context(mock.patch.object(object_sweep, "is_alive", return_value=False))
        sweep.sweep_leftovers(storage, "run", now=time.time())
        object_sweep.remove_orphans(storage, "run")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Store, Act]]:
    """What is done, and to what."""
    none, two = Store(), Store()
    run(on(two), (1, 1.0), (2, 2.0))
    four = copy_of(two)
    run(on(four), (3, 3.0), (4, 4.0))
    pinned = copy_of(four)
    marks.pin(on(pinned), "run", 1)
    local = tmp_path_factory.mktemp("local")
    run(LocalStorage(local), (1, 1.0), (2, 2.0), (3, 3.0))
    remote = Store()
    for step in ("run/step-1", "run/step-2"):
        copy_step(Spot(LocalStorage(local), step), Spot(on(remote), step))
    replaced = copy_of(remote)
    copy_step(Spot(LocalStorage(local), "run/step-3"), Spot(on(replaced), "run/step-3"))
    other = tmp_path_factory.mktemp("other")
    for step in ("run/step-1", "run/step-2", "run/step-3"):
        copy_step(Spot(LocalStorage(local), step), Spot(LocalStorage(other), step))
    run(LocalStorage(other), (3, 33.0), load_step=2)
    return {
        "the first save": (none, lambda storage: run(storage, (1, 1.0))),
        "a save that deletes old steps": (four, lambda storage: run(storage, (5, 5.0), keep=1)),
        "a step saved again": (two, lambda storage: run(storage, (2, 9.0), load_step=1)),
        "a branch": (four, lambda storage: run(storage, (3, 30.0), load_step=2, keep=2)),
        "a load": (four, run),
        "prune": (four, delete_old),
        "prune with a pin": (pinned, delete_old),
        "pin": (two, lambda storage: marks.pin(storage, "run", 1)),
        "unpin": (pinned, lambda storage: marks.unpin(storage, "run", 1)),
        "a copy to the remote folder": (remote, partial(copy_to_remote, local)),
        "a copy over an earlier save": (replaced, partial(copy_to_remote, other)),
    }


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A lock that a crash left is not watched for its lease; thousands of failures would be logged."""
    log = logging.getLogger("milepost")
    level = log.level
    log.setLevel(logging.CRITICAL)
    with (
        mock.patch.object(takeover, "RunLock", partial(RunLock, lease_s=0.0)),
        mock.patch.object(threading, "excepthook"),  # of threads of the "killed"
    ):
        yield
    log.setLevel(level)


NAMES = (
    "the first save",
    "a save that deletes old steps",
    "a step saved again",
    "a branch",
    "a load",
    "prune",
    "prune with a pin",
    "pin",
    "unpin",
    "a copy to the remote folder",
    "a copy over an earlier save",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_at_a_request_leaves_the_old_state_or_the_new(
    name: str, places: dict[str, tuple[Store, Act]], tally: Tally
) -> None:
    """A sample of the requests, with the faults that leave the most."""
    tried = try_faults(*places[name], ("lost", "killed", "killed after"), every=8)
    tally(f"on a store: {name}, with a fault at a request", tried=tried, lost=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_fault_at_every_request_leaves_the_old_state_or_the_new(
    name: str, places: dict[str, tuple[Store, Act]], tally: Tally
) -> None:
    tried = try_faults(*places[name], CLIENT_FAULTS, every=1)
    tally(f"on a store: {name}, with every fault at every request", tried=tried, lost=0)


def try_faults(begun: Store, act: Act, faults: Collection[ClientFault], *, every: int) -> int:
    """Return the number of faults tried: each of ``faults`` at each ``every``-th request."""
    before, client = shown(on(begun)), FaultyClient(copy_of(begun))
    act(on(client))
    after = shown(on(client.inner))
    wrong: list[str] = []
    tried = 0
    for number, fault in enumerate(faults):
        for k in range(number % every, len(client.requests), every):
            tried += 1
            wrong += [
                f"{fault} at {client.requests[k]}: {text}" for text in problems(begun, act, fault, k, before, after)
            ]
    assert not wrong, "\n".join(wrong[:10])
    return tried


def problems(begun: Store, act: Act, fault: ClientFault, k: int, before: Shown, after: Shown) -> Iterator[str]:
    store = copy_of(begun)
    storage = on(store)
    passes = not fault.startswith("killed")
    try:
        act(on(FaultyClient(store, fail_at=k, fault=fault)))
    except (Killed, MilepostError) as error:
        if passes:
            yield f"raised {error}"
    found = shown(storage)
    if passes and found != after:
        yield f"{found} after a fault that passes; expected {after}"
    for step, state in found.items():
        if state not in (before.get(step), after.get(step)):
            yield f"step {step} is {state}"
    if lost := before.keys() & after.keys() - found.keys():
        yield f"lost {lost}"
    sweep_like_the_next_run(storage)
    if shown(storage) != found:
        yield f"the sweep changed {found} to {shown(storage)}"
    if left := leftovers(storage):
        yield f"left {left}"
    if k % 4 == 0 and found:
        run(storage, (50, 50.0))
        if shown(storage) != {**found, 50: (50.0, False)}:
            yield f"after the next run {shown(storage)}"
