"""Staging memory that is allocated ahead of the first save."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.collective.comm import SingleProcess
from milepost.errors import SaveError
from milepost.run.assemble import SaveInfo
from milepost.saving.arena import Arena
from milepost.saving.async_save import AsyncSaver
from milepost.saving.request import SaveRequest
from milepost.storage import LocalStorage

INFO = SaveInfo(step=None, kind="state")
MODES = ("async", "async_with_pinned_mem")


def staging_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "milepost-arena"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimate", [1 << 20, 64 << 20])
def test_a_save_fits_whatever_was_estimated(mode: str, estimate: int, tmp_path: Path) -> None:
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), mode)  # type: ignore[arg-type]
    state = {f"w{i}": torch.randn(512, 512) for i in range(8)}
    saver.prepare(estimate)
    saver.prepare(1 << 30)  # once is enough
    saver.save(SaveRequest("ck", lambda: state, INFO)).committed(60)
    needed = sum(tensor.nbytes for tensor in state.values())
    assert saver.arena_nbytes == estimate if estimate > needed else needed <= saver.arena_nbytes < 1.1 * needed
    into = {key: torch.zeros(512, 512) for key in state}
    milepost.load(tmp_path / "ck", into)
    assert all(torch.equal(into[key], state[key]) for key in state)
    saver.close()
    assert not staging_threads()


def test_memory_that_can_not_be_had_ahead_fails_no_save_but_the_one_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async")
    state = {"w": torch.ones(1024)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", lambda fd, nbytes: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
        saver.prepare(1 << 20)
        handle = saver.save(SaveRequest("none", lambda: state, INFO))
        with pytest.raises(SaveError, match="Cannot allocate memory"):
            handle.committed(60)
    with pytest.raises(SaveError, match="Cannot allocate memory"):
        saver.wait()
    saver.save(SaveRequest("ck", lambda: state, INFO)).committed(60)
    saver.close()


def test_closing_does_not_wait_until_all_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = 0
    inside, go_on = threading.Event(), threading.Event()
    zero = torch.Tensor.zero_

    def slow_zero(piece: torch.Tensor) -> torch.Tensor:
        nonlocal pieces
        pieces += 1
        inside.set()
        go_on.wait(30)
        return zero(piece)

    monkeypatch.setattr(torch.Tensor, "zero_", slow_zero)
    arena = Arena()
    arena.prepare(1 << 30)
    assert inside.wait(30)
    closing = threading.Thread(target=arena.close)
    closing.start()
    while not arena._is_cut_short:
        pass
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    assert pieces == 1
    assert arena.nbytes == 0


class Linear(nn.Module):
    """Parameters, a frozen one among them, a buffer, and AdamW's state: 4 tensors a trained parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(512, 512)
        self.frozen = nn.Linear(512, 512).requires_grad_(False)
        self.norm = nn.BatchNorm1d(512)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("only_trainable", [False, True])
def test_a_manager_s_first_save_finds_its_memory_there_and_no_more_of_it(
    mode: str, only_trainable: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "milepost")

    def run(until: int) -> int:
        torch.manual_seed(0)
        module = Linear()
        optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
        config = CheckpointConfig(
            interval=3,
            async_mode=mode,  # type: ignore[arg-type]
            only_trainable=only_trainable,
            last_save_model_only=False,
        )
        with CheckpointManager(tmp_path, config, model=module, optimizer=optimizer) as manager:
            report = manager.load()
            step = 0 if report is None else report.resumed_step or 0
            saver = manager._saves.saver  # type: ignore[union-attr]
            assert isinstance(saver, AsyncSaver)
            found: list[int] = []
            while step < until:
                module.norm(module.trained(torch.randn(4, 512))).sum().backward()
                manager.maybe_wait_for_staging()
                optimizer.step()
                step += 1
                if manager.save(step):
                    found.append(saver.arena_nbytes)
                else:
                    saver._arena._wait_for_preparation()
                    found.append(saver.arena_nbytes)
            saved = sum(p.nbytes for p in module.parameters() if p.requires_grad or not only_trainable)
            saved += sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
            assert len(set(found)) == 1, found
            assert saved <= found[0] <= saved + (2 << 20)
        return step

    assert run(4) == 4
    assert run(7) == 7  # resumed at 3
    assert not staging_threads()


def test_a_forked_process_does_not_stage_in_the_memory_of_its_parents_save(tmp_path: Path) -> None:
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem")
    state = {"w": torch.ones(64, 64)}
    saver.save(SaveRequest("first", lambda: state, INFO)).committed(60)
    os.kill(saver.writer_pid, signal.SIGSTOP)  # the parent's save is staged, and not written yet
    handle = saver.save(SaveRequest("parents", lambda: state, INFO))
    handle.staged(60)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            saver._arena.fit(saver._current.job.plan)  # type: ignore[union-attr]
            saver._arena.memory[:] = bytes(saver.arena_nbytes)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    os.kill(saver.writer_pid, signal.SIGCONT)
    handle.committed(60)
    saver.close()
    into = {"w": torch.zeros(64, 64)}
    milepost.load(tmp_path / "parents", into)
    assert torch.equal(into["w"], state["w"])
