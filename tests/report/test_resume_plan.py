"""``plan_resume`` against the reads of a real load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import milepost
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.manifest import BLOCK_NBYTES
from milepost.loading.policy import Policy
from milepost.parallelism.degrees import Degrees
from milepost.parallelism.placement import box_of, stages_of
from milepost.report.resume_plan import READ_BUFFER_NBYTES, parameter_of, plan_resume
from milepost.storage import LocalStorage
from milepost.tensors.plan import TensorSpec
from milepost.tensors.read_plan import plan_load
from milepost.testing.sample import Array, save_arrays


def test_what_is_planned_is_what_a_load_reads(memory_path: Path) -> None:
    """On one rank: whole tensors, and in pieces of a large one."""
    storage = LocalStorage(memory_path)
    arrays: dict[str, Array] = {"w": np.ones((1024, 5000), "float32"), "b": np.ones(7, "float32")}
    manifest = save_arrays(storage, "a", arrays, num_ranks=2)
    (planned,) = plan_resume(manifest, Degrees()).ranks
    report = milepost.load(memory_path / "a", {"w": torch.zeros(1024, 5000), "b": torch.zeros(7)})
    framing = report.read_nbytes - report.wanted_nbytes
    assert planned.wanted_nbytes == report.wanted_nbytes == planned.read_nbytes
    assert 0 <= framing < 4096  # headers and footers of four records
    assert (planned.num_files, planned.num_tensors, planned.buffer_nbytes) == (2, 2, 0)


def test_whole_blocks_are_read_for_a_part(memory_path: Path) -> None:
    manifest = save_arrays(LocalStorage(memory_path), "a", {"something": np.ones((3 << 20, 1), "float32")})
    first, second, third = plan_resume(manifest, Degrees(data_parallel_shard_degree=3)).ranks
    assert [rank.wanted_nbytes for rank in (first, second, third)] == [4 << 20] * 3
    assert [rank.read_nbytes for rank in (first, second, third)] == [BLOCK_NBYTES] * 3
    halves = plan_resume(manifest, Degrees(data_parallel_shard_degree=2)).ranks
    assert [rank.wanted_nbytes for rank in halves] == [6 << 20] * 2
    assert [rank.read_nbytes for rank in halves] == [2 * BLOCK_NBYTES] * 2
    assert halves[0].memory_nbytes == (6 << 20) + READ_BUFFER_NBYTES


def test_replicas_read_the_same_and_stages_only_their_layers(memory_path: Path) -> None:
    arrays: dict[str, Array] = {f"layers.{i}.attention.wq.weight": np.ones((8, 8), "float32") for i in range(4)}
    arrays["tok_embeddings.weight"] = np.ones((8, 8), "float32")
    arrays["output.weight"] = np.ones((8, 8), "float32")
    manifest = save_arrays(LocalStorage(memory_path), "a", arrays)
    ranks = plan_resume(manifest, Degrees(data_parallel_replicate_degree=2, pipeline_parallel_degree=2)).ranks
    assert [rank.num_tensors for rank in ranks] == [3, 3, 3, 3]
    assert [(rank.place.pp, rank.place.replica) for rank in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(data_parallel_shard_degree=3),
        Degrees(tensor_parallel_degree=2, data_parallel_shard_degree=2, pipeline_parallel_degree=2),
        Degrees(data_parallel_shard_degree=4, expert_parallel_degree=2),
    ],
)
def test_a_plan_is_the_sum_of_the_plans_of_each_tensor(memory_path: Path, degrees: Degrees) -> None:
    arrays: dict[str, Array] = {f"layers.{i}.attention.w{n}.weight": np.ones((12, 8)) for i in range(5) for n in "qko"}
    arrays |= {f"layers.{i}.moe.experts.w1": np.ones((4, 6, 2), "float32") for i in range(5)}
    arrays |= {"tok_embeddings.weight": np.ones((9, 8)), "norm.weight": np.ones(8), "output.weight": np.ones((9, 8))}
    arrays |= {f"optimizer.state.{key}.exp_avg": array for key, array in arrays.items()}
    arrays |= {f"optimizer.state.{key}.step": np.array(1.0) for key in arrays if not key.startswith("optimizer")}
    manifest = save_arrays(LocalStorage(memory_path), "a", arrays, num_ranks=3)
    plan = plan_resume(manifest, degrees)
    for rank in plan.ranks:
        (stage,) = stages_of(rank.place.pp, degrees, stages_per_rank=1, num_layers=5, tied=False)
        specs = []
        for key, entry in manifest.tensors.items():
            owner = parameter_of(key)
            assert owner is not None
            if stage.holds(owner):
                is_step = key.endswith(".step")
                box = Box.whole(()) if is_step else box_of(owner, entry.shape, degrees, rank.rank)
                specs.append(TensorSpec(key, entry.dtype, entry.shape, (box,) if box.numel else ()))
        items = plan_load(manifest, specs)
        assert rank.wanted_nbytes == sum(item.src.numel * itemsize(item.dtype) for item in items)
        assert rank.read_nbytes == sum(stop - start for item in items for start, stop in item.blocks(BLOCK_NBYTES))
        assert rank.num_files == len({item.shard.file for item in items})
        assert rank.num_tensors == sum(bool(spec.boxes) for spec in specs)


def test_missing_and_unexpected_keys_are_reported(memory_path: Path) -> None:
    arrays: dict[str, Array] = {f"layers.{i}.attention.wq.weight": np.ones((8, 8), "float32") for i in (0, 2)}
    arrays |= {f"optimizer.state.{key}.exp_avg": array for key, array in arrays.items()}
    arrays["optimizer.state.layers.0.attention.wq.weight.step"] = np.array(1.0, "float32")
    arrays["optimizer.state.gone.weight.step"] = np.array(1.0, "float32")
    manifest = save_arrays(LocalStorage(memory_path), "a", arrays, objects={"train_state.step": 1})
    plan = plan_resume(manifest, Degrees())
    assert not plan.fits
    assert plan.missing == (
        "layers.1.attention.wq.weight",
        "optimizer.state.layers.2.attention.wq.weight.step",
    )
    assert plan.unexpected == ("optimizer.state.gone.weight.step",)
    policy = Policy(allow_missing=("layers.1", "optimizer.*"), allow_unexpected=("optimizer.state.gone",))
    let = plan_resume(manifest, Degrees(), policy=policy)
    assert (let.missing, let.unexpected, let.fits) == ((), (), True)
    assert "allow_missing layers.1: 1 key left as it was: layers.1.attention.wq.weight" in let.notes


def test_what_the_trainer_would_refuse_does_not_fit(memory_path: Path) -> None:
    arrays: dict[str, Array] = {"layers.0.attention.wq.weight": np.ones((8, 8), "float32")}
    manifest = save_arrays(LocalStorage(memory_path), "a", arrays)
    stages = plan_resume(manifest, Degrees(pipeline_parallel_degree=2)).refused
    assert stages == (
        "parallelism.pipeline_parallel_degree 2 makes 2 stages (1 on each rank), but the model has only 1 layer",
    )
    plan = plan_resume(manifest, Degrees(tensor_parallel_degree=3), model="llama3", flavor="debugmodel")
    assert plan.refused[0] == "parallelism.tensor_parallel_degree 3 does not divide the model's 16 attention heads"
    assert not plan.fits
