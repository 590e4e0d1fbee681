"""Many ranks: every layout that is saved loads onto every other, and stock DCP reads and writes the same folders."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

import milepost
from milepost.run import checkpoint_record
from milepost.storage import LocalStorage
from milepost.testing.world import run_world

State = dict[str, Any]
Place = Callable[[torch.Tensor], torch.Tensor]
"""From a whole tensor to this rank's part of it."""

WHOLE: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "even": ("float32", (8, 4)),
    "uneven": ("float32", (7, 5)),
    "row": ("bfloat16", (1, 3)),
    "three": ("int64", (3,)),
    "prime": ("float8_e4m3fn", (13, 11)),
    "deep": ("complex64", (2, 3, 5)),
    "scalar": ("float64", ()),
    "empty": ("float16", (0, 4)),
    "large": ("float32", (211, 517)),
}


def whole_tensors() -> dict[str, torch.Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, (dtype, shape) in WHOLE.items():
        kind: torch.dtype = getattr(torch, dtype)
        raw = torch.randint(0, 100, (math.prod(shape) * kind.itemsize,), dtype=torch.uint8, generator=generator)
        tensors[name] = torch.empty(0, dtype=kind).set_(raw.untyped_storage(), 0, shape)  # type: ignore[call-overload]
    return tensors


def placed(mesh: DeviceMesh, *placements: Placement) -> Place:
    def place(whole: torch.Tensor) -> torch.Tensor:
        # A dim that the tensor doesn't have can't be cut.
        fitting = [p if not isinstance(p, Shard) or p.dim < whole.ndim else Replicate() for p in placements]
        return distribute_tensor(whole, mesh, fitting, src_data_rank=None)

    return place


def fsdp_over_tensor_parallel(mesh: DeviceMesh) -> Place:
    """As ``fully_shard`` makes of a tensor-parallel parameter: ``_StridedShard`` where both cut dim 0."""

    def place(whole: torch.Tensor) -> torch.Tensor:
        if whole.ndim == 0 or whole.numel() == 0:
            return distribute_tensor(whole, mesh, [Replicate(), Replicate()], src_data_rank=None)
        split = distribute_tensor(whole, mesh["tp"], [Shard(0)], src_data_rank=None)
        module = nn.ParameterDict({"w": nn.Parameter(split, requires_grad=False)})
        fully_shard(module, mesh=mesh["dp"])
        return module["w"].detach()

    return place


def layouts() -> dict[str, Place]:
    """Every way in which this world can hold a tensor."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    found: dict[str, Place] = {
        "plain": lambda whole: whole.clone(),
        "rows": placed(line, Shard(0)),
        "columns": placed(line, Shard(1)),
    }
    if size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found |= {
            "hsdp": placed(square, Replicate(), Shard(0)),
            "hsdp of the other order": placed(square, Shard(0), Replicate()),
            "rows and columns": placed(square, Shard(0), Shard(1)),
            "rows twice": placed(square, Shard(0), Shard(0)),
            "fsdp over tp": fsdp_over_tensor_parallel(square),
        }
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    data = local(tensor).detach().contiguous()
    start = data.storage_offset() * data.element_size()
    raw = torch.empty(0, dtype=torch.uint8)
    return raw.set_(data.untyped_storage(), start, (data.numel() * data.element_size(),))  # type: ignore[call-overload]


def assert_equal(found: State, expected: State, what: str) -> None:
    for key, tensor in expected.items():
        assert torch.equal(bits(found[key]), bits(tensor)), f"{what}: {key} on rank {dist.get_rank()}"


def blank(tensors: Mapping[str, torch.Tensor], place: Place) -> State:
    return {key: place(torch.zeros_like(tensor)) for key, tensor in tensors.items()}


READ: dict[str, Callable[[State, Path], object]] = {
    "ours": lambda into, path: milepost.load(path, into),
    "stock": lambda into, path: dcp.load(into, checkpoint_id=path),
    "plugin": lambda into, path: dcp.load(into, storage_reader=milepost.StorageReader(path)),
}


def every_layout_onto_every_other(folder: Path) -> list[tuple[str, str]]:
    warnings.simplefilter("ignore")
    tensors, places = whole_tensors(), layouts()
    for saved, place in places.items():
        state = {key: place(tensor) for key, tensor in tensors.items()}
        ours, stock = folder / f"ours {saved}", folder / f"stock {saved}"
        milepost.save(ours, state)
        dcp.save(state, checkpoint_id=stock)
        for wanted, other in places.items():
            reads = [(ours, "ours")]
            if wanted in (saved, "plain"):
                reads += [(ours, "stock"), (stock, "ours")]
            expected = {key: other(tensor) for key, tensor in tensors.items()}
            for path, reader in reads:
                into = blank(tensors, other)
                READ[reader](into, path)
                assert_equal(into, expected, f"{path.name} read by {reader} onto {wanted}")
    return [(saved, wanted) for saved in places for wanted in places]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_onto_every_other(tmp_path: Path, world_size: int) -> None:
    """Ours read by both, stock's read by us, bit for bit: even and uneven shards, empty ones, every kind of mesh."""
    pairs = run_world(every_layout_onto_every_other, world_size, tmp_path, timeout_s=150)[0]
    assert len(pairs) == {2: 9, 4: 64}[world_size]


def test_a_world_of_another_size(tmp_path: Path) -> None:
    """Saved on four ranks, loaded on two and on one; each rank reads about what it holds."""
    run_world(save_rows, 4, tmp_path / "step-1")
    ratios = run_world(load_columns, 2, tmp_path / "step-1")
    assert max(ratios) < 1.1 * 2  # columns of row shards: whole rows are read, and blocks are small here
    tensors = whole_tensors()
    into = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    report = milepost.load(tmp_path / "step-1", into)
    assert report.read_nbytes < 1.1 * report.wanted_nbytes
    for key, tensor in tensors.items():
        assert torch.equal(bits(into[key]), bits(tensor))


def save_rows(path: Path) -> None:
    place = layouts()["rows"]
    milepost.save(path, {key: place(tensor) for key, tensor in whole_tensors().items()})


def load_columns(path: Path) -> float:
    tensors, place = whole_tensors(), layouts()["columns"]
    into = blank(tensors, place)
    report = milepost.load(path, into)
    assert_equal(into, {key: place(tensor) for key, tensor in tensors.items()}, "columns")
    return report.read_nbytes / report.wanted_nbytes


# ---- a model and its optimizer under fully_shard ----


def trained(mesh: DeviceMesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Nothing divides evenly, and there are fewer rows than ranks in one layer."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 3, bias=False), nn.Linear(3, 1))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for _ in range(2):
        model(torch.randn(5, 7)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "loop": {"step": 2, "seen": [1, 2, {"nested": torch.arange(3)}], "name": "run", "raw": b"\x00\xff"},
    }


def zeroed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, Mapping):
        return {key: zeroed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [zeroed(item) for item in value]
    return None


def assert_same(found: Any, expected: Any, what: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(bits(found), bits(expected)), what
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), what
        for key, value in expected.items():
            assert_same(found[key], value, f"{what}.{key}")
    elif isinstance(expected, list):
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{what}.{number}")
    else:
        assert found == expected, what


def model_in_every_direction(folder: Path) -> set[str]:
    warnings.simplefilter("ignore")
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,)) if size == 2 else init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    state = state_of(*trained(mesh))
    group = dist.new_group(backend="gloo")
    write: dict[str, Callable[[Path], object]] = {
        "ours": lambda path: milepost.save(path, state),
        "stock": lambda path: dcp.save(state, checkpoint_id=path),
        "plugin": lambda path: dcp.save(state, storage_writer=milepost.StorageWriter(path)),
        "async plugin": lambda path: dcp.async_save(
            state, storage_writer=milepost.StorageWriter(path), process_group=group
        ).result(timeout=60),
    }
    for writer, save in write.items():
        path = folder / writer
        save(path)
        for reader, load in READ.items():
            into = zeroed(state)
            load(into, path)
            assert_same(into, state, f"written by {writer}, read by {reader}: state")
    kinds = {path.name for path in folder.iterdir()}
    dist.barrier()
    return kinds


@pytest.mark.parametrize("world_size", [2, 4])
def test_model_and_optimizer_in_every_direction(tmp_path: Path, world_size: int) -> None:
    """FSDP2 on two ranks, HSDP on four: four ways to write, three ways to read, every pair bit for bit."""
    results = run_world(model_in_every_direction, world_size, tmp_path, timeout_s=120)
    assert results[0] == {"ours", "stock", "plugin", "async plugin"}
    for name in ("ours", "plugin", "async plugin"):
        manifest = checkpoint_record.read_manifest(LocalStorage(tmp_path), name)
        assert (manifest.world_size, manifest.objects.keys()) == (world_size, objects_of(tmp_path / "stock"))


def objects_of(path: Path) -> set[str]:
    metadata = dcp.FileSystemReader(path).read_metadata()
    return {key for key, entry in metadata.state_dict_metadata.items() if "Bytes" in type(entry).__name__}


def failing_plugin(folder: Path) -> str:
    """One rank fails in the middle of ``dcp.save``: all ranks raise, nothing remains, the next save works."""
    warnings.simplefilter("ignore")
    rank = dist.get_rank()
    dcp.save({"w": torch.ones(3)}, storage_writer=milepost.StorageWriter(folder / "step-1"))
    bad = {"w": torch.zeros(3), f"own{rank}": milepost.StateMismatchError("no plain value") if rank == 1 else 5}
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.save(bad, storage_writer=milepost.StorageWriter(folder / "step-1"))
    message = str(caught.value)
    del caught
    gc.collect()
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["step-1"]
    into = {"w": torch.zeros(3)}
    milepost.load(folder / "step-1", into)
    assert into["w"].tolist() == [1, 1, 1]
    dist.barrier()
    dcp.save({"w": torch.full((3,), 2.0)}, storage_writer=milepost.StorageWriter(folder / "step-1"))
    milepost.load(folder / "step-1", into)
    assert into["w"].tolist() == [2, 2, 2]
    return message


def test_plugin_when_one_rank_fails(tmp_path: Path) -> None:
    for message in run_world(failing_plugin, 2, tmp_path):
        assert "own1 can't be loaded without running code" in message
        assert "RANK 1" in message


# ---- who holds what ----


def pipeline_and_submesh(path: Path) -> tuple[float, list[float]]:
    """Keys that only one rank has, and a tensor on a mesh of some ranks."""
    rank = dist.get_rank()
    sub = DeviceMesh("cpu", [0, 2])
    local_part = torch.full((3,), float(rank)) if rank in (0, 2) else torch.empty(0)
    shared = DTensor.from_local(local_part, sub, [Shard(0)], shape=torch.Size([6]), stride=(1,))
    milepost.save(path, {f"stage{rank}": torch.full((4,), float(rank)), "sub": shared, "only": {f"n{rank}": rank}})
    into = {f"stage{(rank + 1) % 4}": torch.zeros(4), "sub": torch.zeros(6), "only": {f"n{(rank + 2) % 4}": None}}
    milepost.load(path, into)
    assert into["only"] == {f"n{(rank + 2) % 4}": (rank + 2) % 4}
    return into[f"stage{(rank + 1) % 4}"][0].item(), into["sub"].tolist()


def test_keys_of_one_rank_and_tensors_of_some(tmp_path: Path) -> None:
    """As pipeline stages bring them; any rank may load them."""
    results = run_world(pipeline_and_submesh, 4, tmp_path / "step-1")
    assert results == [(float((rank + 1) % 4), [0, 0, 0, 2, 2, 2]) for rank in range(4)]


def replicas(path: Path) -> None:
    milepost.save(path, {f"w{n}": torch.full((100 + n,), float(n)) for n in range(12)})


def test_replicas_are_written_once_and_by_all_ranks(tmp_path: Path) -> None:
    run_world(replicas, 4, tmp_path / "step-1")
    manifest = checkpoint_record.read_manifest(LocalStorage(tmp_path), "step-1")
    assert {key: len(tensor.shards) for key, tensor in manifest.tensors.items()} == {f"w{n}": 1 for n in range(12)}
    per_file = dict.fromkeys((f"__{rank}_0.distcp" for rank in range(4)), 0)
    for tensor in manifest.tensors.values():
        per_file[tensor.shards[0].file] += tensor.shards[0].data_nbytes
    assert max(per_file.values()) - min(per_file.values()) <= 4 * 111
