"""One run at a time writes to a folder, and a dead one never blocks the next."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from milepost import CheckpointConfig, CheckpointManager, RunLockedError
from milepost.run.lock import LOCK_NAME, RunLock
from milepost.run.owner import this_process
from milepost.storage import LocalStorage

HOLDER = """
import sys, time
from milepost.run.lock import RunLock
from milepost.storage import LocalStorage
lock = RunLock(LocalStorage(sys.argv[1]), "run")
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def hold_elsewhere(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_with_host_process_and_start_until_the_first_is_gone(storage, tmp_path):
    process = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(RunLockedError) as refused:
            RunLock(storage, "run")
        host = re.escape(os.uname().nodename)
        assert re.search(rf"process {process.pid} on {host}, since \d{{4}}-\d\d-\d\d", str(refused.value))
        config = CheckpointConfig(enable=True)
        with pytest.raises(RunLockedError):
            CheckpointManager(tmp_path / "run", config, model=torch.nn.Linear(2, 2))
        reader = CheckpointManager(tmp_path / "run", replace(config, load_only=True), model=torch.nn.Linear(2, 2))
        assert reader.load() is None
    finally:
        process.kill()  # without releasing
        process.wait()
    lock = RunLock(storage, "run")
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_released_lock_is_free_and_one_process_may_open_its_folder_again(storage, tmp_path):
    first = RunLock(storage, "run")
    second = RunLock(storage, "run")  # a notebook that builds its manager again
    first.release()
    assert (tmp_path / "run" / LOCK_NAME).exists()  # it is the second's
    second.release()
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_lock_that_is_forgotten_is_free_but_not_by_a_fork_of_its_holder(storage, tmp_path):
    path = tmp_path / "run" / LOCK_NAME
    lock = RunLock(storage, "run")
    pid = os.fork()
    if pid == 0:
        lock.release()
        del lock
        os._exit(0)
    os.waitpid(pid, 0)
    assert path.exists()
    del lock
    assert not path.exists()


def leave_lock_of_another_host(folder: Path) -> Path:
    folder.mkdir()
    owner = replace(this_process(time.time()), host="another-machine", machine_id="f" * 32)
    path = folder / LOCK_NAME
    path.write_bytes(owner.dump() + b"\n")
    return path


def test_a_lock_from_another_machine_holds_while_it_grows(storage, tmp_path):
    path = leave_lock_of_another_host(tmp_path / "run")

    def beat(seconds: float) -> None:
        with path.open("ab") as file:
            file.write(b".")

    with pytest.raises(RunLockedError, match="on another-machine"):
        RunLock(storage, "run", lease_s=5, sleep=beat)


def test_a_lock_from_another_machine_that_does_not_grow_is_broken(storage, tmp_path):
    path = leave_lock_of_another_host(tmp_path / "run")
    waited: list[float] = []
    lock = RunLock(storage, "run", lease_s=5, sleep=waited.append)
    assert sum(waited) == 5
    assert b"another-machine" not in path.read_bytes()
    lock.release()


def test_a_torn_lock_is_watched_and_broken(storage, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).write_bytes(b'{"host": "a')
    RunLock(storage, "run", lease_s=3, sleep=lambda s: None).release()


def test_a_held_lock_grows(storage, tmp_path):
    others = set(threading.enumerate())  # a manager that some other test left open has a beating lock of its own
    lock = RunLock(storage, "run", beat_s=0.01)
    path = tmp_path / "run" / LOCK_NAME
    before = path.stat().st_size
    deadline = time.monotonic() + 30
    while path.stat().st_size < before + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_size >= before + 3
    lock.release()
    assert not [t for t in set(threading.enumerate()) - others if t.name == "milepost-lock"]
