"""Background saves on one process: the staged state is stored, and every failure is reported."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import milepost
from milepost.collective.comm import SingleProcess
from milepost.errors import SaveError
from milepost.run.assemble import SaveInfo
from milepost.saving.async_save import AsyncSaver, Mode, log_lost_saves
from milepost.saving.request import SaveRequest
from milepost.saving.samples import Samples
from milepost.saving.stage import Staging
from milepost.storage import LocalStorage

MODES: tuple[Mode, ...] = ("async", "async_with_pinned_mem")
INFO = SaveInfo(step=None, kind="state")


def state(value: float = 1.0, count: int = 6) -> dict[str, object]:
    tensors: dict[str, object] = {f"w{i}": torch.full((300, 257), value + i) for i in range(count)}
    return {
        **tensors,
        "strided": torch.arange(600.0).view(20, 30).t() + value,
        "lr": value,
        "step": torch.tensor(value),
    }


def loaded(path: Path) -> dict[str, object]:
    into = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in state().items()}
    milepost.load(path, into)
    return into


def assert_equal(one: dict[str, object], other: dict[str, object]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            found = other[key]
            assert isinstance(found, torch.Tensor)
            assert torch.equal(value, found), key
        else:
            assert value == other[key], key


@pytest.fixture(params=MODES)
def saver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AsyncSaver]:
    made = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), request.param, timeout_s=20.0)
    yield made
    with contextlib.suppress(SaveError):  # the test has looked at the failure itself
        made.close()


def test_what_is_stored_is_the_state_at_the_call_whatever_happens_after_staging(saver: AsyncSaver, tmp_path: Path):
    live = state(3.0)
    for round_number in range(3):
        expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in live.items()}
        handle = saver.save(SaveRequest(f"ck-{round_number}", lambda: live, INFO))
        handle.staged(30)
        for value in live.values():
            if isinstance(value, torch.Tensor):
                value.mul_(1.5)
        report = handle.result()
        assert report.reused_plan == (round_number > 0)
        assert_equal(loaded(tmp_path / f"ck-{round_number}"), expected)


def test_the_arena_is_kept_and_no_larger_than_the_state(saver: AsyncSaver):
    live = state()
    sizes = []
    for number in range(3):
        saver.save(SaveRequest(f"ck-{number}", lambda: live, INFO)).committed(60)
        sizes.append(saver.arena_nbytes)
    nbytes = sum(v.nbytes for v in live.values() if isinstance(v, torch.Tensor))
    assert len(set(sizes)) == 1
    assert nbytes <= sizes[0] <= nbytes + (1 << 20)


def test_a_smaller_and_then_a_larger_structure_fit_the_same_arena_or_a_new_one(saver: AsyncSaver, tmp_path: Path):
    for number, count in enumerate((3, 1, 6)):
        live = state(2.0, count)
        saver.save(SaveRequest(f"ck-{number}", lambda live=live: live, INFO)).committed(60)
        into = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for k, v in live.items()}
        milepost.load(tmp_path / f"ck-{number}", into)
        assert_equal(into, live)


def test_a_save_waits_for_the_one_before_and_both_are_whole(saver: AsyncSaver, tmp_path: Path):
    first, second = state(1.0), state(2.0)
    saver.save(SaveRequest("ck-1", lambda: first, INFO))
    saver.save(SaveRequest("ck-2", lambda: second, INFO)).committed(60)
    assert_equal(loaded(tmp_path / "ck-1"), first)
    assert_equal(loaded(tmp_path / "ck-2"), second)


def test_a_state_that_cannot_be_stored_is_refused_at_the_call_and_the_next_save_works(saver: AsyncSaver, tmp_path):
    with pytest.raises(SaveError, match="without running code"):
        saver.save(SaveRequest("bad", lambda: {"f": state}, INFO))
    live = state()
    saver.save(SaveRequest("good", lambda: live, INFO)).committed(60)
    assert_equal(loaded(tmp_path / "good"), live)


def test_a_change_through_data_before_staging_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem", timeout_s=20.0)
    live = {"w": torch.ones(64, 64)}
    run = Staging.run
    monkeypatch.setattr(Staging, "run", lambda self, **options: (live["w"].data.add_(1), run(self, **options))[1])
    handle = saver.save(SaveRequest("torn", lambda: live, INFO))
    with pytest.raises(SaveError, match=r"'w'.*maybe_wait_for_staging"):
        handle.staged(60)
    with pytest.raises(SaveError):
        saver.close()


def test_a_change_during_staging_fails_the_save_at_the_next_call_and_the_one_after_works(tmp_path: Path):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem", timeout_s=20.0)
    live = {f"w{i}": torch.ones(1024, 1024) for i in range(24)}
    handle = saver.save(SaveRequest("torn", lambda: live, INFO))
    live["w23"].add_(1)  # without handle.staged() before
    with pytest.raises(SaveError, match=r"'w23'.*maybe_wait_for_staging"):
        handle.staged(60)
    with pytest.raises(SaveError, match="discarded"):
        saver.save(SaveRequest("next", lambda: live, INFO))
    assert not (tmp_path / "torn").exists()
    saver.save(SaveRequest("next", lambda: live, INFO)).committed(60)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["next"]
    saver.close()


def test_memory_that_is_freed_before_staging_fails_the_save_and_not_the_process(tmp_path: Path, monkeypatch) -> None:
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem", timeout_s=20.0)
    live = {"w": torch.ones(64, 64)}
    run = Staging.run
    monkeypatch.setattr(
        Staging, "run", lambda self, **options: (live["w"].untyped_storage().resize_(0), run(self, **options))[1]
    )
    handle = saver.save(SaveRequest("freed", lambda: live, INFO))
    with pytest.raises(SaveError, match=r"the memory of 'w' was freed.*maybe_wait_for_staging"):
        handle.staged(60)
    with pytest.raises(SaveError):
        saver.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_changes_that_torch_does_not_count_are_noticed_in_the_copies(dtype: torch.dtype) -> None:
    """Those through ``.data`` and shared memory; a change after the copy is allowed."""
    live = {
        name: torch.ones(shape).to(dtype) for name, shape in {"a": (64, 32), "b": (), "c": (5, 0), "t": (8, 4)}.items()
    }
    live["t"] = live["t"].t()
    for name in ("a", "b", "t", ""):
        copies = {key: torch.zeros(value.shape, dtype=dtype) for key, value in live.items()}
        samples = Samples([(key, copies[key], value) for key, value in live.items()])
        version = live[name]._version if name else 0
        if name:
            live[name].data.fill_(0)
            assert live[name]._version == version
        for key, value in live.items():
            copies[key].copy_(value)
        if name:
            live[name].data.fill_(1)
        assert samples.changed() == ([name] if name else [])


def test_a_killed_writer_process_fails_its_save_and_the_next_one_starts_another(tmp_path: Path):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem", timeout_s=20.0)
    live = state()
    saver.save(SaveRequest("ck-1", lambda: live, INFO)).committed(60)
    first = saver.writer_pid
    os.kill(first, signal.SIGSTOP)  # it must not finish before it is killed
    handle = saver.save(SaveRequest("ck-2", lambda: live, INFO))
    handle.staged(60)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(SaveError, match=r"writer process of rank 0 died \(signal 9\)"):
        handle.committed(60)
    with pytest.raises(SaveError, match="writer process"):
        saver.save(SaveRequest("ck-3", lambda: live, INFO))
    saver.save(SaveRequest("ck-3", lambda: live, INFO)).committed(60)
    assert saver.writer_pid != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck-1", "ck-3"]
    saver.close()


def test_close_raises_what_nothing_else_did_and_without_it_the_end_of_the_program_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem", timeout_s=20.0)
    os.kill(saver.writer_pid, signal.SIGSTOP)
    live = state()
    handle = saver.save(SaveRequest("ck", lambda: live, INFO))
    handle.staged(60)
    os.kill(saver.writer_pid, signal.SIGKILL)
    with pytest.raises(SaveError, match="writer process of rank 0 died"):
        handle.committed(60)
    log_lost_saves()
    with pytest.raises(SaveError, match="writer process of rank 0 died"):
        saver.close()
    log_lost_saves()
    assert caplog.text.count("its last save failed: the writer process of rank 0 died") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_writer_process_has_no_torch_and_leaves_with_its_trainer(tmp_path: Path):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), "async_with_pinned_mem", timeout_s=20.0)
    live = state()
    saver.save(SaveRequest("ck", lambda: live, INFO)).committed(60)
    pid = saver.writer_pid
    mapped = Path(f"/proc/{pid}/maps").read_text()
    assert "libtorch" not in mapped
    status = Path(f"/proc/{pid}/status").read_text()
    private_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    assert private_kb < 60_000
    assert os.getsid(pid) != os.getsid(0)
    saver.close()
    assert not Path(f"/proc/{pid}").exists()


KILLED_TRAINER = """
import os, signal, sys, torch, milepost
live = {f"w{i}": torch.full((512, 1024), float(i)) for i in range(40)}
handle = milepost.async_save(sys.argv[1], live, mode="async_with_pinned_mem")
handle.staged()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_staged_is_committed_although_the_trainer_is_killed(tmp_path: Path):
    path = tmp_path / "run" / "step-7"
    done = subprocess.run([sys.executable, "-c", KILLED_TRAINER, str(path)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    into = {f"w{i}": torch.zeros(512, 1024) for i in range(40)}
    milepost.load(path, into)
    assert all(bool((value == int(key[1:])).all()) for key, value in into.items())
    while len(list(path.parent.iterdir())) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [p.name for p in path.parent.iterdir()] == ["step-7"]
