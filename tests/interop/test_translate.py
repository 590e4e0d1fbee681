"""A training checkpoint under torchtitan's names, read as ours: model, optimizer state and options, box by box."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import KINDS, Kind

from milepost.errors import ConversionError
from milepost.format.box import Box
from milepost.format.manifest import Manifest
from milepost.interop.convert import convert
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.families import family_of
from milepost.interop.names.rules import OWN, correspond
from milepost.interop.names.torchtitan import OPTIMIZER_NAMES
from milepost.interop.names.translate import translate
from milepost.interop.weights.boxes import Array, TensorInfo
from milepost.interop.weights.open import open_all
from milepost.loading.reader import read_tensors
from milepost.loading.values import read_objects
from milepost.parallelism.degrees import Degrees
from milepost.report.resume_plan import OF_TORCHTITAN, plan_resume
from milepost.run import checkpoint_record
from milepost.storage import LocalStorage
from milepost.tensors.layout import Piece, TensorLeaf
from milepost.tensors.read_plan import plan_load
from milepost.testing.sample import save_arrays
from milepost.verification.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CASES = [
    # kind, names of the model, names of the optimizer's state
    ("llama", "torchtitan-0.3", "torchtitan between releases (wqkv, lm_head, experts as in 0.2)"),
    ("llama-multi-head", "torchtitan-0.3", "torchtitan-0.3"),
    ("llama", OWN, OWN),
    ("qwen3-tied", "torchtitan-0.2", OWN),
    ("qwen3-moe", "torchtitan-0.2", "torchtitan-0.2"),
    ("qwen3-moe", "torchtitan-0.3", "torchtitan between releases (wqkv, lm_head, experts as in 0.3)"),
]


class InMemory:
    def __init__(self, arrays: Mapping[str, Array]):
        self._arrays = arrays
        self.tensors = {key: TensorInfo(array.dtype.name, array.shape) for key, array in arrays.items()}

    def read_into(self, key: str, box: Box, out: Array) -> None:
        out[...] = self._arrays[key][box.index()]

    def unit_rows(self, key: str) -> int:
        return 1


def ours(kind: Kind, seed: int) -> dict[str, Array]:
    family = family_of(kind.model, kind.args)
    rng = np.random.default_rng(seed)
    shapes = correspond(family, family.scheme(OWN), kind.args).ours
    return {key: rng.standard_normal(shape, dtype="float32") for key, shape in shapes.items()}


def theirs(kind: Kind, arrays: Mapping[str, Array], names: str) -> dict[str, Array]:
    family = family_of(kind.model, kind.args)
    content = Assembled(InMemory(arrays), correspond(family, family.scheme(names), kind.args).into_theirs())
    made = {key: np.empty(info.shape, info.dtype) for key, info in content.tensors.items()}
    for key, array in made.items():
        content.read_into(key, Box.whole(array.shape), array)
    return made


def save(
    folder: Path, kind: Kind, model_names: str, optimizer_names: str
) -> tuple[Manifest, dict[str, Array], dict[str, object]]:
    """The manifest of a step on three ranks, and all that it holds under our names."""
    model, averages = ours(kind, 1), ours(kind, 2)
    stored = theirs(kind, model, model_names)
    stepped = theirs(kind, averages, optimizer_names)
    stepped = {key: array for key, array in stepped.items() if "expert_bias" not in key}
    if kind.args.tied_embeddings:
        stepped.pop("output.weight", None)
    stored |= {f"optimizer.state.{key}.exp_avg": array for key, array in stepped.items()}
    stored |= {f"optimizer.state.{key}.step": np.array(7, "float32") for key in stepped}
    objects: dict[str, object] = {f"optimizer.param_groups.{key}.lr": 0.5 for key in stepped}
    others: dict[str, object] = {"train_state.step": 7, "dataloader.dp_rank_0": b"theirs", "lr_scheduler.last_epoch": 7}
    manifest = save_arrays(LocalStorage(folder), "step-7", stored, objects={**objects, **others}, num_ranks=3, step=7)
    wanted = model | {f"optimizer.state.{key}.exp_avg": array for key, array in averages.items()}
    wanted |= {f"optimizer.state.{key}.step": np.array(7, "float32") for key in averages}
    values = {f"optimizer.param_groups.{key}.lr": 0.5 for key in averages}
    return manifest, wanted, {**values, **others}


def some_box(shape: tuple[int, ...], rng: np.random.Generator) -> Box:
    offsets = tuple(int(rng.integers(0, size)) for size in shape)
    return Box(
        offsets, tuple(int(rng.integers(1, size - start + 1)) for start, size in zip(offsets, shape, strict=True))
    )


@pytest.mark.parametrize("is_external", [False, True])
@pytest.mark.parametrize(("name", "model_names", "optimizer_names"), CASES)
def test_every_box_is_what_ours_has_there(
    memory_path: Path, name: str, model_names: str, optimizer_names: str, is_external: bool
) -> None:
    kind = KINDS[name]
    recorded, wanted, values = save(memory_path, kind, model_names, optimizer_names)
    if is_external:
        for file in ("milepost.json", "milepost.shards", "milepost.digests"):
            (memory_path / "step-7" / file).unlink()
        recorded = checkpoint_record.read_manifest(LocalStorage(memory_path), "step-7")
    found = translate(recorded, kind.model, kind.args)
    if model_names == optimizer_names == OWN:
        assert found is None, "these are our names"
        return
    assert found is not None
    assert set(found.manifest.tensors) == set(wanted)
    assert set(found.manifest.objects) == set(values)
    assert found.tied == (("tok_embeddings.weight", "output.weight") if kind.args.tied_embeddings else None)
    storage, rng = LocalStorage(memory_path), np.random.default_rng(3)
    leaves = {}
    for key, array in wanted.items():
        boxes = [some_box(array.shape, rng) for _ in range(1)] if array.shape else [Box.whole(())]
        (box,) = boxes
        local = torch.full(box.sizes, torch.nan)
        leaves[key] = TensorLeaf(key, local.dtype, array.shape, (Piece(box, Box.whole(box.sizes)),), local)
    items = plan_load(recorded, [leaf.spec for leaf in leaves.values()], found.origins)
    read_tensors(storage, "step-7", items, leaves, checkpoint_record.read_digests(storage, "step-7", recorded))
    for key, leaf in leaves.items():
        assert np.array_equal(leaf.local.numpy(), wanted[key][leaf.pieces[0].box.index()]), key
    assert dict(read_objects(storage, "step-7", found.manifest, found.manifest.objects)) == values


@pytest.mark.parametrize(("name", "model_names", "optimizer_names"), CASES)
def test_a_plan_knows_the_names_that_a_load_does(
    memory_path: Path, name: str, model_names: str, optimizer_names: str
) -> None:
    kind = KINDS[name]
    manifest, wanted, _ = save(memory_path, kind, model_names, optimizer_names)
    degrees = Degrees(data_parallel_shard_degree=2)
    plan = plan_resume(manifest, degrees, model=kind.model, sizes=kind.args)
    assert (plan.missing, plan.unexpected, plan.misshapen) == ((), (), ())
    assert plan.refused == (OF_TORCHTITAN,)
    plan = plan_resume(manifest, degrees, model=kind.model, sizes=kind.args, excluded=("dataloader",))
    assert plan.fits
    assert sum(rank.wanted_nbytes for rank in plan.ranks) == sum(
        array.nbytes if array.shape else 2 * array.nbytes for array in wanted.values()
    )


def test_a_name_that_no_table_knows_is_left_for_the_load_to_refuse(memory_path: Path) -> None:
    kind = KINDS["llama"]
    manifest, _, _ = save(memory_path, kind, "torchtitan-0.3", "torchtitan-0.3")
    assert translate(manifest, "qwen3", KINDS["qwen3"].args) is None


@pytest.mark.parametrize(
    ("name", "names"),
    [("llama", "torchtitan-0.3"), ("qwen3-moe", "torchtitan-0.3"), ("qwen3-moe", "torchtitan-0.2")],
)
def test_a_training_step_is_converted_and_back_with_its_optimizer(memory_path: Path, name: str, names: str) -> None:
    kind = KINDS[name]
    of_optimizer = OPTIMIZER_NAMES.get(names, names)
    theirs_manifest, wanted, values = save(memory_path / "theirs", kind, names, of_optimizer)
    storage = LocalStorage(memory_path)
    objects = {key: value for key, value in values.items() if not key.startswith("dataloader")}
    save_arrays(storage, "ours/step-7", wanted, objects=values, num_ranks=2, step=7)
    options = kind.options("dcp", names=names, training_state=True, verify=True)
    report = convert(memory_path / "ours/step-7", memory_path / "made/step-7", options)
    assert report.verified
    assert "not converted: dataloader" in report.notes
    made, there = all_of(memory_path / "made/step-7"), all_of(memory_path / "theirs/step-7")
    assert made.keys() == there.keys()
    assert all(np.array_equal(made[key], there[key]) for key in made)
    manifest = checkpoint_record.read_manifest(storage, "made/step-7")
    assert manifest.kind == "full"
    assert set(manifest.objects) == {key for key in theirs_manifest.objects if not key.startswith("dataloader")}
    convert(memory_path / "made/step-7", memory_path / "back/step-7", kind.options("dcp", training_state=True))
    back = all_of(memory_path / "back/step-7")
    assert back.keys() == wanted.keys()
    assert all(np.array_equal(back[key], wanted[key]) for key in back)
    kept = checkpoint_record.read_manifest(storage, "back/step-7")
    assert dict(read_objects(storage, "back/step-7", kept, kept.objects)) == objects
    assert not verify(memory_path / "made/step-7").problems
    whole = {key: torch.empty(array.shape) for key, array in made.items()}
    dcp.load(whole, checkpoint_id=str(memory_path / "made/step-7"), no_dist=True)
    assert all(np.array_equal(whole[key].numpy(), made[key]) for key in made), "stock DCP reads it"


def all_of(folder: Path) -> dict[str, Array]:
    with open_all(folder) as source:
        found = {key: np.empty(info.shape, info.dtype) for key, info in source.tensors.items()}
        for key, array in found.items():
            source.read_into(key, Box.whole(array.shape), array)
    return found


def test_without_an_optimizer_there_is_no_training_state_to_convert(memory_path: Path) -> None:
    kind = KINDS["llama"]
    save_arrays(LocalStorage(memory_path), "step-1", ours(kind, 1), kind="model")
    with pytest.raises(ConversionError, match="holds no optimizer state: leave out --training-state"):
        convert(memory_path / "step-1", memory_path / "made", kind.options("dcp", training_state=True))
    assert not (memory_path / "made").exists()


def test_a_training_step_of_another_size_or_model_is_refused_and_not_cut_to_fit(memory_path: Path) -> None:
    kind = KINDS["llama"]
    arrays = ours(kind, 1)
    larger = arrays | {"layers.0.feed_forward.w1.weight": np.pad(arrays["layers.0.feed_forward.w1.weight"], (0, 2))}
    for name, held in (("larger", larger), ("another", {f"net.{key}": array for key, array in arrays.items()})):
        state = {f"optimizer.state.{key}.exp_avg": array for key, array in held.items()}
        save_arrays(LocalStorage(memory_path), f"{name}/step-7", held | state, step=7)
        asked = kind.options("dcp", names="torchtitan-0.3", training_state=True)
        with pytest.raises(ConversionError) as caught:
            convert(memory_path / name / "step-7", memory_path / "made", asked)
        assert any("feed_forward.w1.weight" in problem for problem in caught.value.problems)
        assert not (memory_path / "made").exists()


def test_a_schedule_of_torchtitan_0_2_finds_all_that_it_loads(memory_path: Path) -> None:
    kind = KINDS["llama"]
    arrays = ours(kind, 1)
    stored = arrays | {f"optimizer.state.{key}.exp_avg": array for key, array in arrays.items()}
    objects: dict[str, object] = {"lr_scheduler.last_epoch": 3, "train_state.step": 3}
    for key in arrays:
        objects |= {f"optimizer.param_groups.{key}.lr": 0.25, f"optimizer.param_groups.{key}.initial_lr": 0.5}
    storage = LocalStorage(memory_path)
    save_arrays(storage, "step-3", stored, objects=objects)
    convert(
        memory_path / "step-3", memory_path / "made", kind.options("dcp", names="torchtitan-0.2", training_state=True)
    )
    manifest = checkpoint_record.read_manifest(storage, "made")
    found = {
        key.removeprefix("lr_scheduler."): value
        for key, value in read_objects(storage, "made", manifest, manifest.objects)
        if key.startswith("lr_scheduler.")
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, functools.partial(lambda slope, step: 1 - slope * step, 0.1)
    )
    assert found.keys() == schedule.state_dict().keys()
    schedule.load_state_dict(found)
    assert schedule.get_last_lr() == [0.25]
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.5 * 0.6)]
