"""Staging from a GPU: the stored state is that at the call. Skipped without CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import milepost
from milepost.collective.comm import SingleProcess
from milepost.errors import SaveError
from milepost.run.assemble import SaveInfo
from milepost.saving.async_save import AsyncSaver
from milepost.saving.request import SaveRequest
from milepost.storage import LocalStorage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

INFO = SaveInfo(step=None, kind="state")


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_copies_start_behind_the_work_that_is_queued_and_end_before_staged_returns(mode, tmp_path: Path):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), mode, timeout_s=60.0)
    live = {f"w{i}": torch.zeros(1024, 1024, device="cuda") for i in range(16)}
    for round_number in range(3):
        for value in live.values():
            for _ in range(50):  # queued, not done: the copies must wait for it
                value.add_(1)
        handle = saver.save(SaveRequest(f"ck-{round_number}", lambda: live, INFO))
        handle.staged(60)
        for value in live.values():
            value.mul_(2)
        handle.committed(60)
        into = {key: torch.zeros(1024, 1024, device="cuda") for key in live}
        milepost.load(tmp_path / f"ck-{round_number}", into)
        expected = {0: 50.0, 1: 150.0, 2: 350.0}[round_number]
        assert all(bool((value == expected).all()) for value in into.values())
    saver.close()


def test_pinned_memory_is_used_and_let_go(tmp_path: Path):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem", timeout_s=60.0)
    live = {"w": torch.ones(1024, 1024, device="cuda")}
    saver.save(SaveRequest("ck", lambda: live, INFO)).committed(60)
    assert torch.frombuffer(saver._arena.memory, dtype=torch.uint8).is_pinned()
    saver.close()


def test_memory_that_is_allocated_ahead_is_pinned_and_used(tmp_path: Path):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async", timeout_s=60.0)
    live = {"w": torch.ones(1024, 1024, device="cuda")}
    saver.prepare(8 << 20)
    saver.save(SaveRequest("ck", lambda: live, INFO)).committed(60)
    assert saver.arena_nbytes == 8 << 20
    assert torch.frombuffer(saver._arena.memory, dtype=torch.uint8).is_pinned()
    into = {"w": torch.zeros(1024, 1024, device="cuda")}
    milepost.load(tmp_path / "ck", into)
    assert torch.equal(into["w"], live["w"])
    saver.close()


def test_a_change_during_staging_is_noticed(tmp_path: Path):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem", timeout_s=60.0)
    live = {f"w{i}": torch.ones(4096, 4096, device="cuda") for i in range(8)}
    saver.save(SaveRequest("whole", lambda: live, INFO)).committed(60)  # memory is there from now on
    torch.cuda._sleep(2_000_000_000)  # the copies wait for this second or so, so the change comes before their end
    handle = saver.save(SaveRequest("torn", lambda: live, INFO))
    live["w7"].add_(1)
    with pytest.raises(SaveError, match="maybe_wait_for_staging"):
        handle.staged(60)
    with pytest.raises(SaveError):
        saver.close()
