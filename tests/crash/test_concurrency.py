"""Several processes use one run's folder: runs that write, and commands that read and prune at the same time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from milepost import CheckpointConfig, CheckpointManager
from milepost.cli.main import main
from milepost.errors import CheckpointNotFoundError, RunLockedError, StorageError
from milepost.run import catalog, marks
from milepost.run.lock import LOCK_NAME, RunLock
from milepost.run.owner import is_alive, this_process
from milepost.storage import LocalStorage, Storage
from milepost.testing.faulty import FaultyStorage
from milepost.testing.sample import save_arrays
from milepost.testing.wrap import Operation, WrappedStorage
from milepost.verification.verify import verify_in

ROOT = Path(__file__).parents[2]
SEED = 7


class Child:
    """A forked process that answers lines with lines."""

    def __init__(self, serve: Callable[[Callable[[], str], Callable[[str], None]], None]):
        to_child, from_child = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _serve(serve, to_child[0], from_child[1], (to_child[1], from_child[0]))
        os.close(to_child[0])
        os.close(from_child[1])
        self._in, self._out = os.fdopen(to_child[1], "w", 1), os.fdopen(from_child[0])

    def send(self, line: str) -> None:
        self._in.write(line + "\n")

    def receive(self) -> str:
        """The next line; empty when it has ended."""
        return self._out.readline().rstrip("\n")

    def end(self) -> int:
        """Let it end; return its wait status."""
        with contextlib.suppress(BrokenPipeError):
            self.send("end")
            self._in.close()
        self._out.close()
        return os.waitpid(self.pid, 0)[1]


def _serve(serve: Any, reader: int, writer: int, others: tuple[int, ...]) -> NoReturn:
    status = 1
    try:
        for fd in others:
            os.close(fd)
        signal.alarm(120)  # nothing outlives the test for long
        lines, out = os.fdopen(reader), os.fdopen(writer, "w", 1)
        serve(lambda: lines.readline().rstrip("\n"), lambda line: print(line, file=out, flush=True))
        status = 0
    except BaseException:  # noqa: BLE001 - the top of a process
        traceback.print_exc()
    finally:
        os._exit(status)


# ---- one lock, many that want it ----


class Hesitant(WrappedStorage):
    """Pauses before some operations, so that several processes interleave in many orders."""

    def __init__(self, inner: Storage, seed: int):
        super().__init__(inner)
        self._random = random.Random(seed)

    def around(self, operation: Operation, act: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        if self._random.random() < 0.4:
            time.sleep(self._random.random() * 0.004)
        return act()


def contend(folder: Path, seed: int, receive: Callable[[], str], send: Callable[[str], None]) -> None:
    """On each request, take the lock of ``run``, send the outcome, and release it on request."""
    storage = Hesitant(LocalStorage(folder), seed)
    while receive() == "take":
        try:
            lock = RunLock(storage, "run", sleep=lambda _: time.sleep(0.002))
        except RunLockedError as refused:
            send(refused.message)
            receive()
        else:
            send("won")
            receive()
            lock.release()
        send("let go")


@pytest.fixture
def contenders(memory_path: Path) -> Iterator[list[Child]]:
    children = [Child(partial(contend, memory_path, SEED + n)) for n in range(5)]
    yield children
    assert [child.end() for child in children] == [0] * len(children)


def race(children: list[Child]) -> None:
    """All want the lock at the same moment: one gets it, and the others are sent its id."""
    for child in children:
        child.send("take")
    answers = [child.receive() for child in children]
    winners = [child.pid for child, answer in zip(children, answers, strict=True) if answer == "won"]
    assert len(winners) == 1, answers
    refused = [answer for answer in answers if answer != "won"]
    host = re.escape(os.uname().nodename)
    for answer in refused:
        assert re.search(rf"process {winners[0]} on {host}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", answer), answer
    for child in children:
        child.send("let go")
    assert [child.receive() for child in children] == ["let go"] * len(children)


def dead_process() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def leave_lock_of_a_dead_run(folder: Path, *, torn: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    owner = replace(this_process(time.time()), pid=dead_process(), started="1")
    (folder / LOCK_NAME).write_bytes(b"" if torn else owner.dump() + b"\n")


def test_of_many_that_find_a_dead_runs_lock_exactly_one_gets_it(
    memory_path: Path, contenders: list[Child], tally: Any
) -> None:
    num_rounds = 60
    for _ in range(num_rounds):
        leave_lock_of_a_dead_run(memory_path / "run")
        race(contenders)
        assert list((memory_path / "run").iterdir()) == []
    tally(
        f"{len(contenders)} runs start at once after a crash: exactly one goes on", tried=num_rounds, lost=0, seed=SEED
    )


def kill(_: Operation) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def take(storage: Storage, receive: Callable[[], str], send: Callable[[str], None]) -> None:
    RunLock(storage, "run", sleep=lambda _: time.sleep(0.002), lease_s=20).release()


def test_one_that_dies_while_it_breaks_a_lock_keeps_nobody_out(
    memory_path: Path, contenders: list[Child], tally: Any
) -> None:
    storage = LocalStorage(memory_path)
    leave_lock_of_a_dead_run(memory_path / "run")
    counting = FaultyStorage(storage)
    RunLock(counting, "run").release()
    count = len(counting.operations)
    assert count >= 5
    for k in range(count):
        leave_lock_of_a_dead_run(memory_path / "run")
        status = Child(partial(take, FaultyStorage(storage, fail_at=k, hook=kill))).end()
        assert os.WIFSIGNALED(status), (k, status)
        race(contenders)
        assert list((memory_path / "run").iterdir()) == [], k
    tally("a run killed at any operation of breaking a lock: the next start works", tried=count, lost=0)


def test_a_lock_whose_process_id_belongs_to_another_process_now_is_broken(memory_path: Path) -> None:
    idle = Child(lambda receive, send: (send("up"), receive())[0])
    idle.receive()
    storage = LocalStorage(memory_path)
    (memory_path / "run").mkdir()
    path = memory_path / "run" / LOCK_NAME
    began = Path(f"/proc/{idle.pid}/stat").read_text().rpartition(")")[2].split()[19]
    owner = replace(this_process(time.time()), pid=idle.pid, started=began)
    path.write_bytes(owner.dump() + b"\n")
    with pytest.raises(RunLockedError, match=f"process {idle.pid} "):
        RunLock(storage, "run")
    path.write_bytes(replace(owner, started=str(int(began) - 1)).dump() + b"\n")
    started = time.monotonic()
    RunLock(storage, "run").release()
    assert time.monotonic() - started < 10
    idle.end()


def test_a_process_out_of_descriptors_takes_nobody_for_dead(memory_path: Path) -> None:
    owner = this_process(time.time())

    def ask(receive: Callable[[], str], send: Callable[[str], None]) -> None:
        here = this_process(0.0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        with pytest.raises(OSError, match="Too many open files"):
            os.open("/proc/self/stat", os.O_RDONLY)
        import milepost.run.owner as module

        module.is_here = lambda _: True  # what it compares with can't be read either
        module.this_process = lambda _: here
        send(str(is_alive(owner, time.time())))

    child = Child(ask)
    assert child.receive() == "True"
    assert child.end() == 0


def test_a_lock_that_cant_be_read_is_an_error_and_no_endless_loop(memory_path: Path) -> None:
    (memory_path / "run" / LOCK_NAME).mkdir(parents=True)
    with pytest.raises(StorageError, match=r"\.lock is not a regular file"):
        RunLock(LocalStorage(memory_path), "run")


def test_a_run_whose_lock_was_taken_over_leaves_it_alone(memory_path: Path) -> None:
    """It was stopped for longer than the lease, on another machine; then it ends."""
    storage = LocalStorage(memory_path)
    lock = RunLock(storage, "run")
    path = memory_path / "run" / LOCK_NAME
    path.unlink()
    other = replace(this_process(time.time()), host="another-machine").dump() + b"\n"
    path.write_bytes(other)
    lock.release()
    assert path.read_bytes() == other


def test_a_second_training_run_is_refused_with_the_first_ones_host_process_and_start(tmp_path: Path) -> None:
    options = [
        f"--job.dump_folder={tmp_path}",
        "--checkpoint.enable",
        "--training.steps=100000",
        "--training.seq_len=32",
        "--training.local_batch_size=1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CONFIG_FILE": str(ROOT / "configs" / "debug_cpu.toml")}
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(
        [sys.executable, "-m", "milepost.train", "--job.config_file", environment["CONFIG_FILE"], *options],
        env=environment,
        **quiet,
    )
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "checkpoint" / LOCK_NAME).exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(
            [ROOT / "run_train.sh", *options],
            env={**environment, "NGPU": "1", "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert second.returncode == RunLockedError.exit_status, second.stderr
        message = (
            rf"error: another run writes to {re.escape(str(tmp_path))}/checkpoint: process {first.pid} on "
            rf"{re.escape(os.uname().nodename)}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\. Wait for it, stop it, or"
        )
        assert re.search(message, second.stderr), second.stderr
        assert "Traceback" not in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


# ---- commands at a run that saves ----


NUM_SAVES = 110
PINNED = 1


class State:
    """A few numbers, all of one value, so that a mixture of two saves shows."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(8, 8)

    def set(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)


def keep_saving(folder: Path, mode: str, receive: Callable[[], str], send: Callable[[str], None]) -> None:
    """Many saves, each newest step looked at at once; now and then a step is saved again."""
    torch.set_num_threads(1)
    state = State()
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=4, async_mode=mode)  # type: ignore[arg-type]
    manager = CheckpointManager(folder / "run", config, model=state.model)
    storage = LocalStorage(folder)
    step = 0
    for number in range(NUM_SAVES):
        step += number % 10 != 9
        manager.maybe_wait_for_staging()
        state.set(number)
        manager.save(step)
        if step == PINNED:
            if mode != "disabled":
                manager.pending.committed(60)  # type: ignore[union-attr]
            marks.pin(storage, "run", PINNED)
            send("ready")
        done = step if mode == "disabled" else step - 1
        if done >= 1 and number % 10 not in (8, 9, 0):  # not while the one after it is replaced
            found = catalog.examine(storage, f"run/step-{done}")
            assert found is not None, done
            assert found.state == "committed", found
    manager.close()
    send(str(step))


def run_command(*arguments: str) -> tuple[int, str]:
    """A command of ``milepost``, in this process; its exit status and all that it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(arguments)
    return status, out.getvalue()


def keep_looking(folder: Path, command: str, receive: Callable[[], str], send: Callable[[str], None]) -> None:
    """Run a command again and again until the file ``over`` is there; send the outcomes, by exit status."""
    chance = random.Random(SEED)
    outcomes: dict[int, int] = {}
    run = str(folder / "run")
    while not (folder / "over").exists():
        arguments = [command, run]
        if command == "prune":
            arguments += ["--keep-latest", "2"]
        elif command == "verify":
            steps = list((folder / "run").glob("step-*"))
            arguments = [command, str(chance.choice(steps)) if steps and chance.random() < 0.5 else run]
        elif command == "diff":
            steps = sorted((folder / "run").glob("step-[1-9]*"))  # step-0 has no key that the others have
            if len(steps) < 2:
                continue
            arguments = [command, *map(str, chance.sample(steps, 2)), *chance.choice([(), ("--values",)])]
        status, printed = run_command(*arguments)
        outcomes[status] = outcomes.get(status, 0) + 1
        if status not in ALLOWED[command] or (
            (status == 3 and not re.search(r"was deleted|no such folder|does not exist", printed))
            or (status == 11 and set(re.findall(r"step-\d+(?=: not verified)", printed)) != {"step-0"})
        ):
            send(json.dumps([arguments, status, printed]))
            return
    send(json.dumps(outcomes))


ALLOWED = {"ls": {0}, "verify": {0, 3, 11}, "diff": {0, 3, 9}, "prune": {0}}
"""Exit statuses that a command may have while steps come and go. 3: what it looks at was deleted meanwhile; 11: of the
external step-0 there are no digests."""


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_commands_at_a_run_that_saves_find_no_damage_and_prune_nothing_else(
    memory_path: Path, mode: str, tally: Any
) -> None:
    storage = LocalStorage(memory_path)
    save_arrays(storage, "run/step-0", {"w": np.zeros(3, "float32")})
    (memory_path / "run" / "step-0" / "milepost.json").unlink()  # as stock DCP leaves it: not Milepost's to delete
    (memory_path / "run" / "step-0" / "milepost.digests").unlink()
    (memory_path / "run" / "step-0" / "milepost.shards").unlink()
    saver = Child(partial(keep_saving, memory_path, mode))
    assert saver.receive() == "ready"
    lookers = {command: Child(partial(keep_looking, memory_path, command)) for command in ALLOWED}
    last = saver.receive()
    (memory_path / "over").touch()
    answers = {command: child.receive() for command, child in lookers.items()}
    assert [child.end() for child in (saver, *lookers.values())] == [0] * 5
    assert last, "a save failed"
    tried = 0
    for command, answer in answers.items():
        outcomes = json.loads(answer)
        assert isinstance(outcomes, dict), (command, outcomes)
        tried += sum(outcomes.values())
        assert sum(outcomes.get(status, 0) for status in ("0", "9", "11")) > 0, (command, outcomes)
    entries = {entry.step: entry.state for entry in catalog.scan(storage, "run")}
    assert entries.pop(0) == "external"
    assert entries.pop(PINNED) == "committed"
    assert set(entries.values()) == {"committed"}
    assert {int(last), int(last) - 1} <= set(entries) <= {int(last) - n for n in range(4)}
    for step in (PINNED, *entries):
        assert run_command("verify", str(memory_path / "run" / f"step-{step}"))[0] == 0
    assert not [name for name in os.listdir(memory_path / "run") if name.startswith((".attempt", ".deleting", ".lock"))]
    tally(
        f"ls, verify, diff and prune during {NUM_SAVES} saves ({mode}): nothing false", tried=tried, lost=0, seed=SEED
    )


class DeletesAt(WrappedStorage):
    """The step is gone, or another save is in its place, before operation ``at``."""

    def __init__(self, inner: LocalStorage, at: int, *, replace: bool):
        super().__init__(inner)
        self._count = 0
        self._at = at
        self._replace = replace

    def around(self, operation: Operation, act: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        if self._count == self._at:
            if self._replace:
                save_arrays(self.inner, "run/step-1", {"w": np.ones((5, 9), "float32")}, num_ranks=2, now=2.0)
            else:
                self.inner.remove_tree("run/step-1")
        self._count += 1
        return act()

    @property
    def is_done(self) -> bool:
        return self._count <= self._at


@pytest.mark.parametrize("replaced", [False, True])
def test_a_step_deleted_at_any_moment_of_a_verification_is_reported_as_such(
    memory_path: Path, replaced: bool, tally: Any
) -> None:
    storage = LocalStorage(memory_path)
    num_refused = 0
    for k in range(100):
        save_arrays(storage, "run/step-1", {"w": np.zeros((4, 6), "float32")}, num_ranks=2, now=1.0)
        watching = DeletesAt(storage, k, replace=replaced)
        try:
            report = verify_in(watching, "run/step-1", num_threads=1)
        except CheckpointNotFoundError as error:
            num_refused += 1 if re.search("deleted or replaced|no such folder", error.message) else -100
        else:
            assert report.is_sound, (k, report.problems)
        if watching.is_done:
            break
    assert num_refused >= (1 if replaced else 5)
    assert k > 8
    tally(f"a step {'replaced' if replaced else 'deleted'} at any read of its verification: no damage", tried=k, lost=0)
