"""A power cut at every moment of a save as Hugging Face files, which two ranks write together.

What is there afterwards is compared byte for byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from two_ranks import Outcome, PairComm, run_pair

from milepost.format.box import Box
from milepost.interop.hf.form import HfForm
from milepost.interop.hf.save import HfTarget
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.rules import correspond
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import begin_attempt, new_save_id
from milepost.run.step_names import REPLACED_PREFIX
from milepost.saving.job import SaveJob, run_job
from milepost.storage import LocalStorage
from milepost.tensors.plan import LocalLayout, TensorSpec, WriteItem, plan_save
from milepost.testing.journal import Journal, Marked
from milepost.testing.powercut import Disk, FileTree, frozen

SEED = 22
CUTS = 20
STEP = "step-4"
ARGS = ModelArgs(
    dim=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    hidden_dim=24,
    vocab_size=640,
    max_seq_len=64,
    rope_theta=500_000.0,
    norm_eps=1e-5,
)


@dataclass(frozen=True)
class Constant:
    """Tensors all of one value."""

    value: float

    def blocks(self, item: WriteItem) -> Iterator[memoryview]:
        yield memoryview(np.full(item.data_nbytes // 4, self.value, np.float32)).cast("B")


def save(folder: Path, value: float, reported: Callable[[], None] = lambda: None) -> None:
    """By two ranks, of which each has half of the rows of every tensor, as several files that both write to."""
    storage = LocalStorage(folder)
    family = family_of("llama3", ARGS)
    shapes = correspond(family, family.scheme("hf"), ARGS).ours
    plans = plan_save([LocalLayout(tuple(half(key, shapes[key], rank) for key in shapes), ()) for rank in (0, 1)])
    form = HfForm(HfTarget(model="llama3", args=ARGS, dtypes=dict.fromkeys(shapes, "float32"), max_shard_nbytes=9000))
    save_id = new_save_id()
    begun = begin_attempt(storage, STEP, save_id)

    def act(comm: PairComm) -> None:
        info = SaveInfo(step=4, kind="model") if comm.rank == 0 else None
        job = SaveJob(STEP, begun, save_id, comm.rank, 2, plans[comm.rank], info, None, 20.0, form)
        run_job(storage, job, Constant(value), {}, detached=True)
        reported()

    assert run_pair(act) == [Outcome(), Outcome()]


def half(key: str, shape: tuple[int, ...], rank: int) -> TensorSpec:
    rows = shape[0] // 2
    box = Box((rank * rows, *(0,) * (len(shape) - 1)), (rows, *shape[1:]))
    return TensorSpec(key, "float32", shape, (box,))


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "renames"])
def test_a_power_cut_leaves_the_old_files_or_the_new(memory_path: Path, tally: Callable, can_exchange: bool) -> None:
    folder = memory_path / "disk"
    save(folder, 1.0)
    disk = Disk(folder)
    old = frozen(disk.seen())
    journal = Journal(memory_path / "journal", can_exchange=can_exchange)
    with journal.recording():
        save(folder, 2.0, lambda: journal.mark("reported"))
    new = frozen(Disk(folder).seen())
    assert len(dict(new)[STEP]) > 5  # type: ignore[arg-type]
    rng = random.Random(SEED)
    tried, wrong, allowed = 0, [], {old, new}
    for number, change in enumerate(journal.changes()):
        disk.apply(change)
        allowed = {new} if isinstance(change, Marked) else allowed
        trees = [disk.seen(), disk.durable(), *(disk.after_cut(rng) for _ in range(CUTS))]
        for found in {frozen(step_of(tree)) for tree in trees}:
            tried += 1
            if found not in allowed:
                wrong.append((number, change, found))
    print(wrong[:3])
    what = "power cut after each system call of a save as Hugging Face files on 2 ranks"
    tally(what, tried=tried, lost=len(wrong), seed=SEED)


def step_of(tree: FileTree) -> FileTree:
    """The step under the name by which the catalog knows it."""
    name = next((name for name in tree if name == STEP), None)
    name = name or next(name for name in tree if name.startswith(REPLACED_PREFIX))
    return {STEP: tree[name]}
