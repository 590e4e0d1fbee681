"""Which ranks a waiting rank takes for dead: those whose process on this machine has ended before it signed off."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from milepost.collective.comm import SingleProcess
from milepost.errors import SaveError
from milepost.format.box import Box
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import begin_attempt, new_save_id
from milepost.run.owner import Owner, this_process
from milepost.run.signoff import SignOff, segment_of, sign_off
from milepost.saving.job import SaveJob
from milepost.saving.peers import GRACE_S, LOOK_S, Peers, PeerWatch
from milepost.storage import LocalStorage
from milepost.tensors.plan import TensorSpec, lay_out_file

PLAN = lay_out_file(0, [(TensorSpec("w", "float32", (1,), (Box.whole((1,)),)), Box.whole((1,)))], ())


class Two(SingleProcess):
    """Rank 0 of two; the job's store holds what rank 1 has posted."""

    world_size = 2

    def __init__(self, other: Owner | None):
        self._posted = {" process of rank 1": other.dump().decode()} if other is not None else {}

        self.num_looked_up = 0

    def look_up(self, name: str) -> str | None:
        self.num_looked_up += 1
        return self._posted.get(name)


class Waiting:
    """Rank 0 waits for ``other``."""

    def __init__(self, folder: Path, other: Owner | None, hosts: tuple[str, ...] = ()):
        self.storage = LocalStorage(folder)
        self.save_id = new_save_id()
        self.attempt = begin_attempt(self.storage, "run/step-1", self.save_id)
        job = SaveJob("run/step-1", self.attempt, self.save_id, 0, 2, PLAN, SaveInfo(step=1, kind="full"), None, 1.0)
        job = replace(job, hosts=hosts)
        self.comm = Two(other)
        self.now_s = 0.0
        self.watch = PeerWatch(Peers(self.comm), self.storage, job, clock=lambda: self.now_s)

    def go_on(self) -> None:
        """Look for long enough to be sure."""
        for _ in range(3):
            self.now_s += max(LOOK_S, GRACE_S)
            self.watch.check()


@pytest.fixture(scope="module")
def dead() -> Owner:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return replace(this_process(0.0), pid=process.pid, started="1")


def test_a_dead_one_is_named_after_a_grace(memory_path: Path, dead: Owner) -> None:
    waiting = Waiting(memory_path, dead)
    waiting.now_s = LOOK_S
    waiting.watch.check()  # what it did last may not be visible yet
    with pytest.raises(
        SaveError, match=rf"rank 1 \(process {dead.pid} on .*\) died before its part was written"
    ) as found:
        waiting.go_on()
    assert found.value.rank == 1


def test_others_are_waited_for(memory_path: Path, dead: Owner) -> None:
    """One that lives, that is unknown, or on another machine, even if that is a clone of this one."""
    for other in (this_process(0.0), None, replace(dead, host="other"), replace(dead, boot_id="of a clone")):
        Waiting(memory_path, other).go_on()


def test_ranks_of_other_machines_are_not_looked_up(memory_path: Path, dead: Owner) -> None:
    here = this_process(0.0).host
    waiting = Waiting(memory_path, dead, hosts=(here, "elsewhere"))
    waiting.go_on()
    assert waiting.comm.num_looked_up == 0
    for hosts in ((here, here), (here, "")):  # the second: not known
        with pytest.raises(SaveError, match="rank 1"):
            Waiting(memory_path, dead, hosts=hosts).go_on()


def test_one_that_has_done_its_part_may_end(memory_path: Path, dead: Owner) -> None:
    waiting = Waiting(memory_path, dead)
    sign_off(waiting.storage, waiting.attempt, SignOff(1, waiting.save_id, segment_of(())))
    waiting.go_on()
