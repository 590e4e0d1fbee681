"""Hugging Face files under every layout: each rank reads its own ranges of them, and writes its own ranges of them."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from tiny_layouts import MODELS, Layout, build, on

from milepost.errors import ConversionError, DigestMismatchError, StateMismatchError
from milepost.format.box import Box
from milepost.format.shares import Share
from milepost.interop.convert import convert
from milepost.interop.hf.config import make_config
from milepost.interop.hf.load import load_hf
from milepost.interop.hf.save import HfTarget, commit_record, join_shares, plan_image, write_extras, write_part
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.rules import correspond
from milepost.interop.options import ConvertOptions
from milepost.interop.weights.open import open_weights
from milepost.run import catalog, commit
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import begin_attempt, new_save_id
from milepost.saving.stage import TensorBlocks
from milepost.saving.writer import FileImage
from milepost.storage import LocalStorage
from milepost.tensors.layout import TensorLeaf, dtype_name, stored_as
from milepost.tensors.plan import LocalLayout, WritePlan, lay_out_file, plan_save
from milepost.tensors.state import flatten
from milepost.testing.world import run_world
from milepost.train.parallel import Meshes
from milepost.training.modules import model_state

LAYOUTS = [
    on("llama3", "fsdp4"),
    on("llama3", "fsdp2 tp2"),
    on("llama3", "fsdp2 pp2", microbatch_size=1),
    on("llama3 tied", "tp2 pp2", schedule="GPipe"),
    on("llama3", "replicate2 fsdp2"),
    on("qwen3 moe", "fsdp4 ep4"),
    on("qwen3 moe", "fsdp2 tp2 ep2"),
]
MODEL_NAME = {"llama3": "llama3", "llama3 tied": "llama3", "qwen3": "qwen3", "qwen3 moe": "qwen3"}


def sizes(model: str) -> ModelArgs:
    # Heads of a width that ranks cut in the middle; fewer layers where no pipeline needs them.
    return replace(MODELS[model][1], n_layers=2)


def make_sources(folder: Path, model: str) -> None:
    """Random weights of a model: as Hugging Face files (``hf``) and as a ``.pt`` of ours (``ours.pt``)."""
    args = sizes(model)
    family = family_of(MODEL_NAME[model], args)
    shapes = correspond(family, family.scheme("hf"), args).theirs
    generator = torch.Generator().manual_seed(5)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    (folder / "hf").mkdir(parents=True)
    keys = list(tensors)
    weight_map = {key: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(keys)}
    for name in sorted(set(weight_map.values())):
        part = {key: tensors[key] for key in keys if weight_map[key] == name}
        safetensors.torch.save_file(part, folder / "hf" / name, metadata={"format": "pt"})
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "hf" / "config.json").write_text(json.dumps(make_config(family.name, args, "float32")))
    options = ConvertOptions(to="pt", model=MODEL_NAME[model], sizes=args)
    convert(folder / "hf", folder / "ours.pt", options)


def leaves_of(layout: Layout) -> dict[str, TensorLeaf]:
    meshes = Meshes.build(layout.degrees, "cpu")
    model = build(layout, meshes, batch=4, args=sizes(layout.model))
    return dict(flatten(model_state(model.parts)).tensors)


def wrong_leaves(leaves: dict[str, TensorLeaf], ours: dict[str, torch.Tensor]) -> list[str]:
    found = []
    for key, leaf in leaves.items():
        for index, piece in enumerate(leaf.pieces):
            box = piece.box
            expected = ours[key][tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
            if not torch.equal(leaf.view(index), expected):
                found.append(f"{key} {box}")
    return found


def save_as_hf(folder: Path, target: str, layout: Layout, leaves: dict[str, TensorLeaf], assets: str) -> None:
    """Save like ``HfForm``: one plan for all, each rank writes its ranges, one rank the frame and the commit."""
    specs: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(specs, flatten_layout(leaves))
    plans = plan_save(specs)  # type: ignore[arg-type]
    dtypes = {spec.key: spec.dtype for brought in specs for spec in brought.tensors}  # type: ignore[attr-defined]
    image = plan_image(HfTarget(model=MODEL_NAME[layout.model], args=sizes(layout.model), dtypes=dtypes, assets=assets))
    storage = LocalStorage(folder)
    save_ids = [new_save_id()]
    dist.broadcast_object_list(save_ids)
    attempts = [begin_attempt(storage, target, save_ids[0]) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(attempts)
    data = f"{attempts[0]}/data"
    rank = dist.get_rank()
    items = plans[rank].items
    shares = [write_part(storage, data, image, items, TensorBlocks(leaves), with_headers=rank == 0)]
    if dist.get_rank() == 0:
        shares.append(write_extras(storage, data, image))
    of_all: list[list[dict[str, Share]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, shares)
    if dist.get_rank() == 0:
        info = SaveInfo(step=7, kind="model", layout={"data_parallel_shard_degree": 4})
        record = commit_record(info, save_id=save_ids[0], world_size=dist.get_world_size(), now=time.time())
        commit.publish_files(storage, attempts[0], target, join_shares(image, list(itertools.chain(*of_all))), record)
    dist.barrier()


def flatten_layout(leaves: dict[str, TensorLeaf]) -> LocalLayout:
    return LocalLayout(tuple(leaf.spec for leaf in leaves.values()), ())


def walk(folder: Path) -> list[tuple[str, list[str], int]]:
    """For each layout: the differences on this rank after the load, and the bytes it read."""
    results = []
    for index, layout in enumerate(LAYOUTS):
        work = folder / layout.model
        leaves = leaves_of(layout)
        report = load_hf(work / "hf", MODEL_NAME[layout.model], sizes(layout.model), leaves)
        wrong = wrong_leaves(leaves, torch.load(work / "ours.pt", weights_only=True))
        results.append((str(layout), wrong, report.read_nbytes))
        save_as_hf(folder / f"out{index}", "step-7", layout, leaves, str(work / "hf"))
        half = {key: stored_as(leaf, torch.bfloat16) for key, leaf in leaves.items()}
        save_as_hf(folder / f"half{index}", "step-7", layout, half, "")
    return results


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def test_every_layout_reads_and_writes_hugging_face_files_by_ranges(memory_path: Path):
    for model in {layout.model for layout in LAYOUTS}:
        make_sources(memory_path / model, model)
    ranks = run_world(walk, 4, memory_path)
    for index, layout in enumerate(LAYOUTS):
        original = hf_tensors(memory_path / layout.model / "hf")
        total = sum(tensor.nbytes for tensor in original.values())
        for rank in ranks:
            name, wrong, read_nbytes = rank[index]
            assert name == str(layout)
            assert wrong == [], f"{layout}: differs from the converted checkpoint"
            if "fsdp4" in name and "moe" not in name:
                assert read_nbytes < total / 3, "a rank reads its own part, not everything"
        out = memory_path / f"out{index}" / "step-7"
        saved = hf_tensors(out)
        assert saved.keys() == original.keys(), layout
        assert all(torch.equal(saved[key], original[key]) for key in original), layout
        assert {file.name for file in out.glob("*.safetensors")} == {
            file.name for file in (memory_path / layout.model / "hf").glob("*.safetensors")
        }
        halved = hf_tensors(memory_path / f"half{index}" / "step-7")
        assert all(torch.equal(halved[key], original[key].bfloat16()) for key in original), layout
        info = catalog.examine(LocalStorage(memory_path / f"out{index}"), "step-7")
        assert info is not None
        assert (info.state, info.kind) == ("committed", "model")


def test_a_save_from_an_arena_gives_the_same_files(memory_path: Path):
    make_sources(memory_path, "llama3")
    args = sizes("llama3")
    ours = torch.load(memory_path / "ours.pt", weights_only=True)
    specs = flatten(ours).layout().tensors
    # Cut across heads and rows, as no even layout does.
    boxes = [(spec, box) for spec in specs for box in _thirds(spec.shape)]
    plan = lay_out_file(0, boxes, ())
    image = plan_image(
        HfTarget(model="llama3", args=args, dtypes={s.key: s.dtype for s in specs}, max_shard_nbytes=9000)
    )
    storage = LocalStorage(memory_path / "out")
    storage.make_folder("")
    write_part(storage, "", image, plan.items, FileImage(memoryview(_arena(plan, ours))), with_headers=True)
    write_extras(storage, "", image)
    saved, original = hf_tensors(memory_path / "out"), hf_tensors(memory_path / "hf")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in original)
    convert(memory_path / "out", memory_path / "again.pt", ConvertOptions(to="pt", model="llama3", sizes=args))


def _thirds(shape: Sequence[int]) -> list[Box]:
    if not shape or shape[0] < 3:
        return [Box.whole(shape)]
    cuts = [0, shape[0] // 3, shape[0] // 3 * 2 + 1, shape[0]]
    rest = tuple(shape[1:])
    return [Box((a, *(0 for _ in rest)), (b - a, *rest)) for a, b in itertools.pairwise(cuts)]


def _arena(plan: WritePlan, ours: dict[str, torch.Tensor]) -> np.ndarray:
    arena = np.zeros(plan.objects_offset, np.uint8)
    for item in plan.items:
        box = item.box
        part = ours[item.key][tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        raw = part.contiguous().reshape(-1).view(torch.uint8).numpy()
        arena[item.data_offset : item.data_offset + len(raw)] = raw
    return arena


def test_weights_that_do_not_fit_change_nothing(memory_path: Path):
    make_sources(memory_path, "llama3")
    args = sizes("llama3")
    state = {"norm.weight": torch.full((40,), 7.0), "output.weight": torch.full((101, 41), 7.0), "x": torch.zeros(1)}
    with pytest.raises(StateMismatchError) as caught:
        load_hf(memory_path / "hf", "llama3", args, flatten(state).tensors)
    assert caught.value.missing == ("x",)
    assert "output.weight: shape [101, 40] in the weights, [101, 41] here" in caught.value.message
    assert state["norm.weight"].eq(7).all()
    with pytest.raises(ConversionError, match="rope_theta"):
        load_hf(memory_path / "hf", "llama3", replace(args, rope_theta=1.0), flatten(state).tensors)
    with pytest.raises(ConversionError, match="vocabulary of 101, the model one of 100"):
        load_hf(memory_path / "hf", "llama3", replace(args, vocab_size=100), flatten(state).tensors)
    (memory_path / "hf/config.json").unlink(missing_ok=True)
    with pytest.raises(ConversionError, match=r"does not hold this llama3 model\. (?s:.*)set model\.name") as other:
        load_hf(memory_path / "hf", "llama3", replace(args, n_layers=3), flatten(state).tensors)
    assert "--model" not in other.value.message  # an option of `milepost convert`


def test_a_changed_byte_of_a_torch_file_is_found_by_a_rank_that_reads_a_part(memory_path: Path):
    args = sizes("llama3")
    family = family_of("llama3", args)
    state = {key: torch.zeros(shape) for key, shape in correspond(family, family.scheme("milepost"), args).ours.items()}
    state["norm.weight"] = torch.full_like(state["norm.weight"], 1234.5)
    file = memory_path / "model.pt"
    torch.save(state, file)
    leaves = flatten({"norm.weight": torch.zeros_like(state["norm.weight"])}).tensors
    load_hf(file, "llama3", args, leaves)
    assert torch.equal(leaves["norm.weight"].local, state["norm.weight"])
    data = bytearray(file.read_bytes())
    data[data.index(np.float32(1234.5).tobytes()) + 8] ^= 1
    file.write_bytes(data)
    with pytest.raises(DigestMismatchError, match=r"norm\.weight"):
        load_hf(file, "llama3", args, leaves)


def test_views_of_one_storage_are_checked_against_its_digest(memory_path: Path):
    base = torch.arange(1000.0)
    torch.save({"a": base[:400].view(20, 20), "b": base[400:]}, memory_path / "model.pt")
    data = bytearray((memory_path / "model.pt").read_bytes())
    data[data.index(np.float32(777.0).tobytes())] ^= 1
    (memory_path / "model.pt").write_bytes(data)
    with open_weights(memory_path / "model.pt").source as source:
        source.read_into("a", Box((0, 0), (20, 20)), np.empty((20, 20), np.float32))
        with pytest.raises(DigestMismatchError):
            source.check_digests()


def test_a_model_that_hugging_face_does_not_know_is_refused():
    args = sizes("llama3")
    family = family_of("llama3", args)
    dtypes = dict.fromkeys(correspond(family, family.scheme("hf"), args).ours, dtype_name(torch.float32))
    plan_image(HfTarget(model="llama3", args=args, dtypes=dtypes))
    del dtypes["norm.weight"]
    with pytest.raises(ConversionError, match=r"missing: norm\.weight"):
        plan_image(HfTarget(model="llama3", args=args, dtypes=dtypes | {"extra": "float32"}))
