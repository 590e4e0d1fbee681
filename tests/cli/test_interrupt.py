"""Ctrl-C at any moment of a command stops it with status 130, and leaves nothing half done."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from zoo import save_model

from milepost.cli.main import main
from milepost.run import catalog, sweep
from milepost.run.owner import OWNERLESS_LIFETIME_S
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays
from milepost.verification.verify import verify

INTERRUPTED = 130
# If a signal arrives in a callback of the garbage collector, Python prints the interrupt and continues: the command
# then ends as if there had been none.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MOMENTS = 8
"""So many moments of each command, spread over the time it takes."""


def interrupted(argv: list[str], after_s: float) -> int:
    """The status of a command that gets SIGINT after some time. It may be done before."""
    ended = threading.Event()

    def press() -> None:
        if not ended.wait(after_s):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    try:
        thread.start()
        status = main(argv)
        ended.set()
        thread.join()
    except KeyboardInterrupt:  # it had ended before the key was pressed
        status = 0
    return status


def seconds_of(argv: list[str]) -> float:
    started = time.monotonic()
    assert main(argv) == 0
    return time.monotonic() - started


@pytest.mark.parametrize("form", ["hf", "pt", "dcp"])
def test_a_conversion_leaves_its_destination_whole_or_not_there(
    memory_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(LocalStorage(memory_path), "model/step-7")
    argv = ["convert", f"{memory_path}/model/step-7", "", "--to", form, "--model", "llama3", "--flavor", "debugmodel"]

    def to(name: str) -> list[str]:
        return [word or f"{memory_path}/{name}" for word in argv]

    seconds_of(to("first"))  # what is imported by and by
    whole = seconds_of(to("whole"))
    statuses = []
    for moment in range(MOMENTS):
        name = f"out-{moment}"
        statuses.append(interrupted(to(name), whole * (moment + 0.5) / MOMENTS))
        assert statuses[-1] in (0, INTERRUPTED)
        found = memory_path / name
        if statuses[-1] == INTERRUPTED and not found.exists():
            continue
        if found.is_dir():
            assert sorted(os.listdir(found)) == sorted(os.listdir(memory_path / "whole"))
        else:
            assert found.stat().st_size == (memory_path / "whole").stat().st_size
    assert INTERRUPTED in statuses
    # Interrupted while it swept, an attempt may be left. The next one there sweeps it once this process is gone.
    monkeypatch.setattr(sweep, "is_alive", lambda owner, now: False)
    seconds_of(to("last"))
    assert sorted(os.listdir(memory_path)) == sorted(
        ["model", "first", "whole", "last", *(name for name in os.listdir(memory_path) if name.startswith("out-"))]
    )


def test_a_pruning_leaves_each_step_whole_or_gone_and_the_next_one_ends_it(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    arrays = {f"w{i}": np.ones((64, 64), "float32") for i in range(20)}
    argv = ["prune", f"{memory_path}/run", "--keep-latest", "1"]

    def fill() -> None:
        for step in range(12):
            save_arrays(storage, f"run/step-{step}", arrays, step=step, num_ranks=2)

    fill()
    whole = seconds_of(argv)
    statuses = []
    for moment in range(MOMENTS):
        fill()
        statuses.append(interrupted(argv, whole * (moment + 0.5) / MOMENTS))
        left = catalog.scan(storage, "run")
        assert left[-1].step == 11
        assert all(verify(memory_path / entry.path).is_sound for entry in left)
    assert INTERRUPTED in statuses
    assert main(argv) == 0
    # An empty place for a deletion may be another process's, about to be used: it is swept when it is old.
    sweep.sweep_leftovers(storage, "run", now=time.time() + 2 * OWNERLESS_LIFETIME_S)
    assert [entry.name for entry in storage.list("run")] == ["step-11"]


def test_a_verification_stops_at_once(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    save_arrays(storage, "run/step-1", {f"w{i}": np.ones(1 << 22, "float32") for i in range(16)}, step=1)
    argv = ["verify", f"{memory_path}/run/step-1", "--threads", "2"]
    whole = seconds_of(argv)
    started = time.monotonic()
    status = interrupted(argv, whole / 4)
    assert status == INTERRUPTED
    assert time.monotonic() - started < whole + 0.5
