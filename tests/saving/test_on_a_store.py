"""Saves and loads on a real store: the manager with its writer process, and stock DCP in both directions."""

from __future__ import annotations

import uuid

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import milepost
from milepost.report.diff import diff
from milepost.run import catalog
from milepost.storage import open_storage
from milepost.testing.seaweed import BUCKET, SECRET_KEY, Seaweed
from milepost.verification.verify import verify

pytestmark = [
    pytest.mark.usefixtures("store_environment"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture
def url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_a_run_is_saved_pruned_and_resumed(url: str, mode: milepost.config.AsyncMode) -> None:
    config = milepost.CheckpointConfig(enable=True, interval=1, keep_latest_k=2, async_mode=mode)
    model = torch.nn.Linear(4, 4)
    manager = milepost.CheckpointManager(url, config, model=model)
    for step in range(1, 4):
        manager.maybe_wait_for_staging()
        torch.nn.init.constant_(model.weight, step)
        manager.save(step)
    manager.close()
    storage, folder = open_storage(url)
    assert [(entry.step, entry.state) for entry in catalog.scan(storage, folder)] == [
        (2, "committed"),
        (3, "committed"),
    ]
    assert verify(f"{url}/step-3").is_sound
    resumed = torch.nn.Linear(4, 4)
    manager = milepost.CheckpointManager(url, config, model=resumed)
    report = manager.load()
    manager.close()
    assert report is not None
    assert report.resumed_step == 3
    assert torch.equal(resumed.weight, model.weight)
    for name in storage.list_files(folder):
        assert SECRET_KEY.encode() not in storage.read(f"{folder}/{name}")


def test_stock_dcp_opens_what_milepost_saved_and_the_other_way_round(url: str, store: Seaweed) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": torch.full((5,), 7.0)}}
    milepost.save(f"{url}/step-1", state)
    milepost.save(f"{url}/step-1", state)
    loaded = {"a": torch.zeros(2, 3), "b": {"c": torch.zeros(5)}}
    dcp.load(loaded, storage_reader=FsspecReader(f"{url}/step-1", endpoint_url=store.endpoint), no_dist=True)
    assert torch.equal(loaded["a"], state["a"])  # type: ignore[arg-type]
    dcp.save(state, storage_writer=FsspecWriter(f"{url}/step-2", endpoint_url=store.endpoint), no_dist=True)
    storage, folder = open_storage(url)
    assert [entry.state for entry in catalog.scan(storage, folder)] == ["committed", "external"]
    loaded = {"a": torch.zeros(2, 3), "b": {"c": torch.zeros(5)}}
    milepost.load(f"{url}/step-2", loaded)
    assert torch.equal(loaded["b"]["c"], state["b"]["c"])  # type: ignore[index]
    found = diff(f"{url}/step-1", f"{url}/step-2", values=True)
    assert found.is_same
