"""The contract of stock DCP: our writer and reader against stock's, in all combinations.

The cases are our own, after the behaviour that PyTorch's tests of ``torch.distributed.checkpoint`` pin down.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, _load_state_dict_from_keys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import milepost
from milepost import StorageReader, StorageWriter
from milepost.errors import ConfigError, SaveError, StateMismatchError
from milepost.testing.world import run_world
from milepost.verification.verify import verify

Make = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore:Detected an exist")
both_ways = pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pytest.param(StorageWriter, StorageReader, id="ours"),
        pytest.param(FileSystemWriter, FileSystemReader, id="stock"),
        pytest.param(StorageWriter, FileSystemReader, id="ours-to-stock"),
        pytest.param(FileSystemWriter, StorageReader, id="stock-to-ours"),
    ],
)
any_writer = pytest.mark.parametrize("writer", [StorageWriter, FileSystemWriter], ids=["ours", "stock"])


@pytest.fixture(autouse=True)
def no_cached_plans() -> Iterator[None]:
    """Stock's planner keeps plans in the class."""
    yield
    for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
        getattr(SavePlanner, f"_cached_{name}").clear()


def save(writer: Any, state: dict[str, Any], **options: Any) -> Any:
    return dcp.save(state, storage_writer=writer, no_dist=True, **options)


def load(reader: Any, state: dict[str, Any], **options: Any) -> None:
    dcp.load(state, storage_reader=reader, no_dist=True, **options)


def everything(reader: Any) -> dict[str, Any]:
    """All that a checkpoint holds, nested as it was."""
    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit; some dtypes can't be compared."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8)) if one.numel() else True


# ---- what is kept ----


@both_ways
def test_tensors_of_every_kind_come_back(memory_path: Path, writer: Make, reader: Make) -> None:
    grid = torch.arange(24.0).reshape(4, 6)
    state = {
        "plain": grid,
        "transposed": grid.t(),
        "strided": grid[:, ::2],
        "a view": grid[1:3],
        "nothing": torch.empty(0, 3),
        "parameter": nn.Parameter(grid * 2),
        **{
            str(dtype): torch.arange(1, 9).to(dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool)
        },
        "complex": torch.complex(grid, -grid),
        "eighth": torch.arange(8.0).to(torch.float8_e5m2),
    }
    save(writer(memory_path / "c"), state)
    into = {key: torch.zeros_like(value, memory_format=torch.contiguous_format) for key, value in state.items()}
    load(reader(memory_path / "c"), into)
    for key, value in state.items():
        assert same(into[key], value.detach()), key


@pytest.mark.parametrize("reader", [StorageReader, FileSystemReader], ids=["ours", "stock"])
def test_a_lazily_conjugated_tensor_comes_back_as_its_values(memory_path: Path, reader: Make) -> None:
    value = torch.complex(torch.arange(3.0), torch.ones(3))
    save(StorageWriter(memory_path / "c"), {"lazy": value.conj(), "negated": value.conj().imag})
    into = {"lazy": torch.zeros_like(value), "negated": torch.zeros(3)}
    load(reader(memory_path / "c"), into)
    assert torch.equal(into["lazy"], value.conj().resolve_conj())
    assert torch.equal(into["negated"], -torch.ones(3))


@both_ways
def test_nested_state_and_values_come_back(memory_path: Path, writer: Make, reader: Make) -> None:
    state = {
        "model": {"layers": [{"w": torch.ones(2)}, {"w": torch.zeros(3)}]},
        "epoch": 3,
        "lr": 0.25,
        "name": "run",
        "betas": (0.9, 0.95),
        "nothing": None,
        "history": [1, [2, "x"], {"k": 1.5}],
    }
    save(writer(memory_path / "c"), state)
    found = everything(reader(memory_path / "c"))
    assert found.pop("model")["layers"][1]["w"].equal(torch.zeros(3))
    assert found == {key: value for key, value in state.items() if key != "model"}


@both_ways
def test_a_stateful_object_gives_and_takes_its_state(memory_path: Path, writer: Make, reader: Make) -> None:
    class Counter:
        def __init__(self, count: int) -> None:
            self.count, self.sums = count, torch.full((3,), float(count))

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "sums": self.sums}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count, self.sums = state["count"], state["sums"]

    save(writer(memory_path / "c"), {"counter": Counter(7)})
    into = Counter(0)
    load(reader(memory_path / "c"), {"counter": into})
    assert (into.count, into.sums.tolist()) == (7, [7.0, 7.0, 7.0])


@both_ways
def test_bytes_and_allowed_classes_are_kept(memory_path: Path, writer: Make, reader: Make) -> None:
    args = argparse.Namespace(lr=0.5, name="run")
    with torch.serialization.safe_globals([argparse.Namespace]):
        save(writer(memory_path / "c"), {"raw": io.BytesIO(b"abc"), "bytes": b"\0\xff" * 9, "args": args})
        into: dict[str, Any] = {"raw": io.BytesIO(), "bytes": b"", "args": argparse.Namespace()}
        load(reader(memory_path / "c"), into)
    assert into["raw"].getvalue() == b"abc"
    assert (into["bytes"], into["args"]) == (b"\0\xff" * 9, args)


@both_ways
def test_a_load_casts_to_the_dtype_that_it_fills(memory_path: Path, writer: Make, reader: Make) -> None:
    save(writer(memory_path / "c"), {"w": torch.tensor([1.0, 2.5, 1e9])})
    into = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    load(reader(memory_path / "c"), into)
    assert torch.equal(into["w"], torch.tensor([1.0, 2.5, 1e9]).bfloat16())


@both_ways
def test_a_part_of_the_keys_and_keys_that_are_missing(memory_path: Path, writer: Make, reader: Make) -> None:
    save(writer(memory_path / "c"), {"a": torch.ones(2), "b": torch.zeros(2)})
    into = {"a": torch.zeros(2)}
    load(reader(memory_path / "c"), into)
    assert into["a"].tolist() == [1, 1]
    with pytest.raises(CheckpointException, match="other"):
        load(reader(memory_path / "c"), {"other": torch.zeros(2)})
    into = {"a": torch.zeros(2), "other": torch.full((2,), 5.0)}
    load(reader(memory_path / "c"), into, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert (into["a"].tolist(), into["other"].tolist()) == ([1, 1], [5, 5])
    with pytest.raises((CheckpointException, ValueError), match=r"(?i)size|shape"):
        load(reader(memory_path / "c"), {"a": torch.zeros(3)})
    found = _load_state_dict_from_keys({"a"}, storage_reader=reader(memory_path / "c"))
    assert list(found) == ["a"]


@any_writer
def test_the_tools_of_stock_read_it(memory_path: Path, writer: Make) -> None:
    save(writer(memory_path / "c"), {"w": torch.arange(6.0), "step": 4})
    dcp_to_torch_save(memory_path / "c", memory_path / "c.pt")
    found = torch.load(memory_path / "c.pt", weights_only=True)
    assert (found["w"].tolist(), found["step"]) == ([0, 1, 2, 3, 4, 5], 4)


# ---- planners ----


class Renamed(DefaultSavePlanner):
    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        renamed = {f"new_{key}": value for key, value in state_dict.items()}
        super().set_up_planner(renamed, storage_meta, is_coordinator)


class Half(DefaultSavePlanner):
    """Casts, and changes its plan accordingly, as PyTorch's documentation shows it."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def transform_object(self, write_item: Any, object: Any) -> Any:
        given = super().transform_object(write_item, object)
        return given if write_item.type == WriteItemType.BYTE_IO else given.to(torch.float16)


class WithNotes(DefaultSavePlanner):
    """Keeps data of its own in the metadata, as PyTorch's documentation shows it."""

    def create_local_plan(self) -> SavePlan:
        return dataclasses.replace(super().create_local_plan(), planner_data="of this rank")

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        self.flatten_state_dict = False
        plans, metadata = super().create_global_plan(all_plans)
        return plans, dataclasses.replace(metadata, planner_data=[plan.planner_data for plan in all_plans])


class Changed(DefaultSavePlanner):
    """Changes tensors, and leaves its plan as it was."""

    def __init__(self, change: Callable[[torch.Tensor], Any], *, at: str):
        super().__init__()
        self.change, self.at = change, at

    def transform_object(self, write_item: Any, object: Any) -> Any:
        given = super().transform_object(write_item, object)
        is_it = self.at == "transform_object" and isinstance(given, torch.Tensor)
        return self.change(given) if is_it else given

    def resolve_data(self, write_item: Any) -> Any:
        given = super().resolve_data(write_item)
        is_it = self.at == "resolve_data" and isinstance(given, torch.Tensor)
        return self.change(given) if is_it else given


@both_ways
def test_planners_that_rename_and_cast(memory_path: Path, writer: Make, reader: Make) -> None:
    state = {"w": torch.tensor([1.0, 2.0, 3.5]), "step": 1}
    save(writer(memory_path / "r"), state, planner=Renamed())
    assert everything(reader(memory_path / "r"))["new_w"].equal(state["w"])
    save(writer(memory_path / "h"), state, planner=Half())
    found = everything(reader(memory_path / "h"))
    assert found["w"].equal(torch.tensor([1.0, 2.0, 3.5], dtype=torch.float16))
    assert found["step"] == 1


@pytest.mark.parametrize("reader", [StorageReader, FileSystemReader], ids=["ours", "stock"])
def test_a_planner_that_keeps_data_of_its_own(memory_path: Path, reader: Make) -> None:
    metadata = save(StorageWriter(memory_path / "c"), {"w": torch.ones(2)}, planner=WithNotes())
    assert metadata.planner_data == ["of this rank"]
    assert StorageReader(memory_path / "c").read_metadata().planner_data == ["of this rank"]
    into = {"w": torch.zeros(2)}
    load(reader(memory_path / "c"), into)
    assert into["w"].tolist() == [1, 1]


@pytest.mark.parametrize("at", ["transform_object", "resolve_data"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to(torch.float16),
        lambda tensor: tensor.double(),
        lambda tensor: tensor.view(torch.int32),
        lambda tensor: tensor.t(),
        lambda tensor: tensor[:1],
        lambda tensor: torch.cat([tensor, tensor]),
        lambda tensor: tensor.flatten(),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.numpy(),
    ],
    ids=["half", "double", "as ints", "transposed", "shorter", "longer", "flat", "sparse", "no tensor"],
)
def test_a_planner_that_deviates_from_its_plan_is_refused(memory_path: Path, change: Any, at: str) -> None:
    state = {"fine": torch.ones(2, 3), "step": 1}
    with pytest.raises(CheckpointException) as raised:
        save(StorageWriter(memory_path / "c"), state, planner=Changed(change, at=at))
    (error,) = raised.value.failures.values()
    assert isinstance(error[0], SaveError)
    assert error[0].key == "fine"
    assert not (memory_path / "c").exists()


def test_a_planner_whose_values_are_not_bytes_is_refused(memory_path: Path) -> None:
    class Raw(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            given = super().resolve_data(write_item)
            return given.getvalue() if isinstance(given, io.BytesIO) else given

    with pytest.raises(CheckpointException, match="step: the save planner gives a bytes"):
        save(StorageWriter(memory_path / "c"), {"step": 1}, planner=Raw())


def test_a_load_planner_that_gives_another_shape_is_refused(memory_path: Path) -> None:
    class Wider(DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return super().resolve_tensor(read_item).expand(2, 3)

    save(StorageWriter(memory_path / "c"), {"w": torch.ones(3)})
    with pytest.raises(CheckpointException) as raised:
        load(StorageReader(memory_path / "c"), {"w": torch.zeros(3)}, planner=Wider())
    (error,) = raised.value.failures.values()
    assert isinstance(error[0], StateMismatchError)


@both_ways
def test_cached_plans_lead_to_the_save_that_they_are_used_for(memory_path: Path, writer: Make, reader: Make) -> None:
    for number in range(3):
        state = {"w": torch.full((3,), float(number)), "step": number}
        save(writer(memory_path / f"c{number}"), state, planner=DefaultSavePlanner(enable_plan_caching=True))
    state = {"w": torch.full((5,), 9.0), "step": 9, "more": torch.ones(1)}  # another plan
    save(writer(memory_path / "c3"), state, planner=DefaultSavePlanner(enable_plan_caching=True))
    for number, value in enumerate((0, 1, 2, 9)):
        found = everything(reader(memory_path / f"c{number}"))
        assert (found["w"][0].item(), found["step"]) == (value, value)


# ---- arguments and attributes ----


@any_writer
def test_the_arguments_of_stock_are_taken(memory_path: Path, writer: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "milepost")
    made = writer(
        memory_path / "c",
        single_file_per_rank=False,
        sync_files=False,
        thread_count=3,
        per_thread_copy_ahead=1,
        cache_staged_state_dict=False,
        overwrite=False,
        serialization_format=SerializationFormat.TORCH_SAVE,
    )
    save(made, {"a": torch.ones(3), "b": torch.zeros(4), "c": 5})
    assert everything(StorageReader(memory_path / "c"))["c"] == 5
    with pytest.raises(CheckpointException, match="overwrite"):
        save(writer(memory_path / "c", overwrite=False), {"a": torch.ones(3)})
    assert everything(StorageReader(memory_path / "c"))["c"] == 5
    save(writer(memory_path / "c"), {"a": torch.ones(3)})
    assert list(everything(StorageReader(memory_path / "c"))) == ["a"]


def test_hints_are_noted_once_and_the_rest_is_refused_by_name(
    memory_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milepost.interop.dcp.arguments._noted", set())
    caplog.set_level("INFO", "milepost")
    for _ in range(2):
        StorageWriter(memory_path / "c", sync_files=False)
    assert sum("sync_files=False" in record.message for record in caplog.records) == 1
    with pytest.raises(ConfigError, match=r"_extensions=.*serialization_format=.*thread: there is no such argument"):
        StorageWriter(
            memory_path / "c", _extensions=[object()], serialization_format=SerializationFormat.SAFETENSORS, thread=1
        )
    with pytest.raises(ConfigError, match="thread_count of at least 1"):
        StorageWriter(memory_path / "c", thread_count=0)
    with pytest.raises(ConfigError, match="_extension_registry"):
        StorageReader(memory_path / "c", _extension_registry=object())


@both_ways
def test_the_attributes_of_stock_are_there(memory_path: Path, writer: Make, reader: Make) -> None:
    saver = writer(memory_path / "c")
    assert saver.save_id
    metadata = save(saver, {"w": torch.ones(2), "step": 1})
    assert saver.path == memory_path / "c"
    assert str(saver.checkpoint_id) == str(memory_path / "c")
    assert saver.fs.exists(memory_path / "c")
    assert saver.storage_meta().save_id == saver.save_id
    assert (metadata.version, metadata.storage_meta.save_id) == ("1.0.0", saver.save_id)
    assert {place.relative_path for place in metadata.storage_data.values()} == {"__0_0.distcp"}
    loader = reader(memory_path / "c")
    found = loader.read_metadata()
    assert (found.storage_meta.load_id, found.storage_meta.save_id) == (loader.load_id, saver.save_id)
    assert found.version == "1.0.0"
    assert {index.fqn for index in found.storage_data} == {"w", "step"}
    assert found.state_dict_metadata.keys() == {"w", "step"}
    assert loader.path == memory_path / "c"
    assert loader.fs.exists(memory_path / "c")


@both_ways
def test_an_object_is_used_for_one_folder_after_the_other(memory_path: Path, writer: Make, reader: Make) -> None:
    saver, loader = writer(memory_path / "0"), reader(memory_path / "0")
    for number in range(3):
        dcp.save({"w": torch.full((2,), float(number))}, storage_writer=saver, checkpoint_id=memory_path / str(number))
    for number in range(3):
        into = {"w": torch.zeros(2)}
        dcp.load(into, storage_reader=loader, checkpoint_id=memory_path / str(number))
        assert into["w"].tolist() == [number, number]


@both_ways
def test_a_save_without_collectives_from_one_process(memory_path: Path, writer: Make, reader: Make) -> None:
    save(writer(memory_path / "c"), {"w": torch.ones(2), "step": 2}, use_collectives=False)
    into = {"w": torch.zeros(2), "step": 0}
    load(reader(memory_path / "c"), into)
    assert (into["w"].tolist(), into["step"]) == ([1, 1], 2)


@both_ways
def test_an_asynchronous_save_keeps_the_values_of_its_moment(memory_path: Path, writer: Make, reader: Make) -> None:
    state = {"w": torch.ones(1000), "step": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        future = dcp.async_save(state, storage_writer=writer(memory_path / "c"), no_dist=True)
    state["w"].zero_()
    future.result(timeout=60)  # type: ignore[union-attr]
    into = {"w": torch.zeros(1000), "step": 0}
    load(reader(memory_path / "c"), into)
    assert (into["w"].sum().item(), into["step"]) == (1000, 1)


# ---- several ranks ----


class Fails(DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("rank 1 is out of luck")
        return super().resolve_data(write_item)


def on_two_ranks(folder: Path) -> list[str]:
    """Every case with every writer and reader in one world; returns the differences."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(35.0).reshape(7, 5)
    wrong = []
    pairs = [(w, r) for w in (StorageWriter, FileSystemWriter) for r in (StorageReader, FileSystemReader)]
    for number, (writer, reader) in enumerate(pairs):
        path = folder / str(number)
        state = {
            "rows": distribute_tensor(whole, mesh, [Shard(0)]),
            "all": distribute_tensor(whole, mesh, [Replicate()]),
            "plain": torch.full((3,), 4.0),
            "step": 5,
        }
        for turn in range(2):  # the second with cached plans
            planner = DefaultSavePlanner(enable_plan_caching=True)
            dcp.save(state, storage_writer=writer(path / str(turn)), planner=planner)
            for placement in (Shard(0), Shard(1), Replicate()):
                into = {
                    "rows": distribute_tensor(torch.zeros(7, 5), mesh, [placement]),
                    "all": distribute_tensor(torch.zeros(7, 5), mesh, [placement]),
                    "plain": torch.zeros(3),
                    "step": 0,
                }
                dcp.load(into, storage_reader=reader(path / str(turn)))
                rows, every = into["rows"], into["all"]
                assert isinstance(rows, DTensor)
                assert isinstance(every, DTensor)
                if not (rows.full_tensor().equal(whole) and every.full_tensor().equal(whole)):
                    wrong.append(f"{writer.__name__} {reader.__name__} {placement}")
                if (into["plain"].tolist(), into["step"]) != ([4, 4, 4], 5):  # type: ignore[attr-defined]
                    wrong.append(f"{writer.__name__} {reader.__name__}: values")
        for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(SavePlanner, f"_cached_{name}").clear()
    saver = StorageWriter(folder / "fails")
    for planner in (Fails(), None):
        try:
            dcp.save({"w": distribute_tensor(whole, mesh, [Shard(0)])}, storage_writer=saver, planner=planner)
        except CheckpointException as error:
            if planner is None or list(error.failures) != [1]:
                wrong.append(f"unexpected failure: {error}")
        else:
            if planner is not None:
                wrong.append("no failure")
    try:
        dcp.save({"w": whole}, storage_writer=StorageWriter(folder / "local"), use_collectives=False)
        wrong.append("ranks for themselves were not refused")
    except SaveError:
        pass
    dist.barrier()
    dcp.save({"w": whole + dist.get_rank()}, storage_writer=FileSystemWriter(folder / "own"), use_collectives=False)
    into = {"w": torch.zeros(7, 5)}
    dcp.load(into, storage_reader=StorageReader(folder / "own"))
    if not into["w"].equal(whole + dist.get_rank()):
        wrong.append("a folder that each rank wrote for itself")
    return wrong


def test_two_ranks_with_every_writer_and_reader(memory_path: Path) -> None:
    assert run_world(on_two_ranks, 2, memory_path) == [[], []]
    assert verify(memory_path / "fails").verdict == "ok"
    assert not [path for path in memory_path.iterdir() if path.name.startswith(".milepost-attempt")]
    milepost.load(memory_path / "fails", {"w": torch.zeros(7, 5)})
