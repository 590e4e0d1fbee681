"""On one process: the saved state is restored bit for bit, and stock DCP reads and writes the same folders."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

import milepost
from milepost.collective.comm import SingleProcess
from milepost.errors import SaveError, StateMismatchError
from milepost.format.dtype import DTYPES
from milepost.format.manifest import BLOCK_NBYTES
from milepost.run import checkpoint_record
from milepost.run.assemble import SaveInfo
from milepost.saving.request import SaveRequest
from milepost.saving.save import Saver
from milepost.storage import LocalStorage
from milepost.tensors.state import flatten

pytestmark = [
    # Logged by stock DCP whenever it runs in one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

STOCK_CANNOT_SAVE = {"bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"}
"""Their sizes are unknown to DCP's planner (``torch._utils._element_size``)."""


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits of any dtype, those of NaNs included."""
    kind: torch.dtype = getattr(torch, dtype)
    high = 2 if dtype == "bool" else 256
    raw = torch.randint(0, high, (math.prod(shape) * kind.itemsize,), dtype=torch.uint8)
    return torch.empty(0, dtype=kind).set_(raw.untyped_storage(), 0, shape)  # type: ignore[call-overload]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bytes in row-major order."""
    tensor = tensor.detach().contiguous()
    start = tensor.storage_offset() * tensor.element_size()
    raw = torch.empty(0, dtype=torch.uint8)
    return raw.set_(tensor.untyped_storage(), start, (tensor.numel() * tensor.element_size(),))  # type: ignore[call-overload]


def every_form(dtype: str) -> dict[str, torch.Tensor]:
    """Tensors of one dtype in every form that memory can have."""
    return {
        "plain": random_tensor(dtype, (5, 6)),
        "transposed": random_tensor(dtype, (7, 4)).t(),
        "every_other": random_tensor(dtype, (9, 6))[::2, 1::2],
        "inner": random_tensor(dtype, (6, 5))[2:4],
        "scalar": random_tensor(dtype, ()),
        "empty": random_tensor(dtype, (0, 3)),
        "one": random_tensor(dtype, (1, 1, 1)),
    }


def blank(value: Any) -> Any:
    """The same structure with other contents."""
    if isinstance(value, torch.Tensor):
        out = torch.empty(value.shape, dtype=value.dtype)
        out.untyped_storage().fill_(0)
        return out
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, dict | list | torch.Tensor) for item in value):
        return [blank(item) for item in value]
    return "to be replaced"


def assert_same(found: Any, expected: Any) -> None:
    """Equal in structure, types and bits."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(bits(found), bits(expected))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(found) is type(expected)
        assert found == expected or found != found


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return tmp_path / "step-1"


def test_a_dtype_that_this_torch_lacks_is_named(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    milepost.save(step, {"w": torch.empty(3, dtype=torch.bits16), "b": torch.ones(3)})
    state = {"w": torch.zeros(3), "b": torch.zeros(3)}
    monkeypatch.delattr(torch, "bits16")  # as in an older torch
    assert milepost.verify(step).verdict == "ok"
    with pytest.raises(milepost.FormatError, match=r"has no dtype bits16.*newer torch"):
        milepost.load(step, state)
    with pytest.raises(milepost.FormatError, match=r"has no dtype bits16.*newer torch"):
        milepost.load(step)
    assert not state["b"].any()


def test_every_dtype_in_every_form(step: Path) -> None:
    """We save: both read. DCP saves: we read. Bit for bit, of all dtypes that ``torch.save`` takes."""
    state = {dtype: every_form(dtype) for dtype in DTYPES if hasattr(torch, dtype)}
    milepost.save(step, state)
    ours, stock = blank(state), blank(state)
    milepost.load(step, ours)
    assert_same(ours, state)
    dcp.load(stock, checkpoint_id=step)
    assert_same(stock, state)

    common = {dtype: forms for dtype, forms in state.items() if dtype not in STOCK_CANNOT_SAVE}
    external = step.with_name("step-2")
    dcp.save(common, checkpoint_id=external)
    into = blank(common)
    milepost.load(external, into)
    assert_same(into, common)


def test_into_tensors_of_every_form(step: Path) -> None:
    """The memory that is loaded into may be strided too."""
    state = {dtype: every_form(dtype) for dtype in ("float32", "bfloat16", "uint16", "float4_e2m1fn_x2", "bits16")}
    milepost.save(step, state)
    into = {dtype: {name: torch.empty_strided((), ()) for name in forms} for dtype, forms in state.items()}
    for dtype, forms in state.items():
        for name, tensor in forms.items():
            column_major = blank(random_tensor(dtype, tuple(reversed(tensor.shape))))
            into[dtype][name] = column_major.permute(tuple(reversed(range(tensor.ndim))))
    milepost.load(step, into)
    assert_same(into, state)


NESTED: dict[str, Any] = {
    "flat": torch.arange(5),
    "dict": {"tensor": torch.ones(2, 3), "deeper": {"tensor": torch.zeros(1), "number": 7}},
    "list": [torch.arange(3), {"a": torch.arange(2), "b": "text"}, [torch.ones(1), [1, 2]], 5],
    "values": [1, [2, 3], "text", None],
    "tuple": (1, (2.5, "x")),
    "empty_list": [],
    "none": None,
    "bool": True,
    "int": -(1 << 80),
    "float": [math.inf, -0.0, math.nan, 5e-324],
    "text": "ünïcode \U0001f600",
    "bytes": bytes(range(256)),
    "ordered": OrderedDict(b=1, a=torch.arange(2)),
    "tuple_of_tensors": (torch.arange(3), torch.ones(2)),
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "with.dots": {"in.keys": torch.ones(1)},
    "keys": {1: torch.arange(1), "2": 3},
}


def test_nested_state_in_both_directions(step: Path) -> None:
    milepost.save(step, NESTED)
    for read in (lambda into: milepost.load(step, into), lambda into: dcp.load(into, checkpoint_id=step)):
        into = blank(NESTED)
        read(into)
        assert_same(into, NESTED)
    external = step.with_name("step-2")
    dcp.save(NESTED, checkpoint_id=external)
    into = blank(NESTED)
    milepost.load(external, into)
    assert_same(into, NESTED)


def test_keys_and_paths_are_those_of_stock_dcp(step: Path) -> None:
    milepost.save(step, NESTED)
    dcp.save(NESTED, checkpoint_id=step.with_name("step-2"))
    ours, stock = (FileSystemReader(folder).read_metadata() for folder in (step, step.with_name("step-2")))
    assert ours.state_dict_metadata.keys() == stock.state_dict_metadata.keys()
    assert ours.planner_data == stock.planner_data


def test_dcp_to_torch_reads_our_folder(step: Path) -> None:
    """The command line of stock PyTorch makes one ``torch.save`` file of it, with the structure that was saved."""
    milepost.save(step, NESTED)
    merged = step.with_name("merged.pt")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(step), str(merged)],
        check=True,
        timeout=100,
    )
    found = torch.load(merged, weights_only=True)
    expected = {**NESTED, "keys": {str(key): value for key, value in NESTED["keys"].items()}}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same(found[key], dict(value) if key == "ordered" else value)


def test_every_record_is_a_torch_save_file(step: Path) -> None:
    """Cut out of its file, each item is a zip that ``torch.load`` and ``zipfile`` take, CRCs included."""
    milepost.save(step, {**NESTED, "dtypes": {dtype: every_form(dtype) for dtype in DTYPES if hasattr(torch, dtype)}})
    storage = LocalStorage(step.parent)
    manifest = checkpoint_record.read_manifest(storage, step.name)
    entries = [(key, shard) for key, tensor in manifest.tensors.items() for shard in tensor.shards]
    for key, entry in [*entries, *manifest.objects.items()]:
        data = (step / entry.file).read_bytes()[entry.record_offset : entry.record_offset + entry.record_nbytes]
        value = torch.load(io.BytesIO(data), weights_only=True)
        if key in manifest.tensors:
            tensor = manifest.tensors[key]
            assert (tuple(value.shape), f"torch.{tensor.dtype}") == (tensor.shape, str(value.dtype))
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None


def test_python_zipfile_command_takes_a_record(step: Path) -> None:
    milepost.save(step, {"w": torch.randn(300, 400)})
    shard = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name).tensors["w"].shards[0]
    record = step.with_name("w.zip")
    data = (step / shard.file).read_bytes()
    record.write_bytes(data[shard.record_offset : shard.record_offset + shard.record_nbytes])
    done = subprocess.run(
        [sys.executable, "-m", "zipfile", "-t", str(record)], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "Done testing\n"


def test_large_tensors_of_many_blocks(step: Path) -> None:
    """More than one digest block, buffer and thread group, with and without a copy on the way."""
    rows = 3 * BLOCK_NBYTES // 4096 + 7
    state = {
        "plain": torch.randn(rows, 1024),
        "transposed": torch.randn(1024, rows).t(),
        "long": torch.arange(5_000_001, dtype=torch.int32),
        "small": torch.arange(3),
        "cut": torch.randn(2, rows // 2 + 1, 1200)[:, :, 7:1031],
        "last": {f"{n}": torch.full((n, n), n) for n in range(1, 60)},
    }
    milepost.save(step, state)
    ours, stock = blank(state), blank(state)
    report = milepost.load(step, ours)
    assert_same(ours, state)
    dcp.load(stock, checkpoint_id=step)
    assert_same(stock, state)
    assert report.wanted_nbytes == sum(t.nbytes for t in [*state["last"].values(), *list(state.values())[:5]])
    assert report.wanted_nbytes <= report.read_nbytes <= 1.001 * report.wanted_nbytes


class Counter:
    """A stateful object, as a training loop has them."""

    def __init__(self, count: int):
        self.count = count
        self.window = torch.full((3,), count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.window = state["window"].clone()


def test_objects_with_state_dict(step: Path) -> None:
    """Saved through ``state_dict()`` and given back through ``load_state_dict()``, as stock DCP does."""
    milepost.save(step, {"counter": Counter(3), "w": torch.ones(2)})
    for read in (lambda into: milepost.load(step, into), lambda into: dcp.load(into, checkpoint_id=step)):
        counter = Counter(0)
        into = {"counter": counter, "w": torch.zeros(2)}
        read(into)
        assert into["counter"] is counter
        assert (counter.count, counter.window.tolist()) == (3, [3, 3, 3])


def test_part_of_a_checkpoint_can_be_loaded(step: Path) -> None:
    milepost.save(step, {"a": torch.ones(2), "b": {"c": torch.ones(3), "d": 4}})
    into = {"b": {"d": 0}}
    with pytest.raises(StateMismatchError, match=r'give allow_unexpected=\["a", "b.c"\]') as caught:
        milepost.load(step, into)
    assert caught.value.unexpected == ("a", "b.c")
    assert into == {"b": {"d": 0}}
    report = milepost.load(step, into, allow_unexpected=["a", "b.*"])
    assert into == {"b": {"d": 4}}
    assert report.unexpected == ("a", "b.c")
    assert [str(passed) for passed in report.let_pass] == [
        "allow_unexpected a: 1 key left out: a",
        "allow_unexpected b.*: 1 key left out: b.c",
    ]


def test_module_and_its_parameters(step: Path) -> None:
    """Parameters that need gradients are filled where they are."""
    saved, fresh = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    milepost.save(step, {"model": saved.state_dict(keep_vars=True)})
    pointer = fresh.weight.data_ptr()
    milepost.load(step, {"model": fresh.state_dict(keep_vars=True)})
    assert_same(fresh.state_dict(), saved.state_dict())
    assert fresh.weight.data_ptr() == pointer
    assert fresh.weight.requires_grad


def test_casts_are_made_and_reported(step: Path) -> None:
    state = {"w": torch.randn(5, 7), "n": torch.arange(9), "same": torch.ones(2)}
    milepost.save(step, state)
    into = {
        "w": torch.zeros(7, 5, dtype=torch.bfloat16).t(),
        "n": torch.zeros(9, dtype=torch.int32),
        "same": blank(state["same"]),
    }
    report = milepost.load(step, into)
    assert report.cast == ("n: int64 -> int32", "w: float32 -> bfloat16")
    assert_same(into, {"w": state["w"].bfloat16(), "n": state["n"].int(), "same": state["same"]})


def test_one_report_of_all_that_does_not_fit(step: Path) -> None:
    """Before a byte is read: missing keys with near names, shapes, kinds. Nothing is changed."""
    milepost.save(
        step,
        {
            "layers": {"0": {"weight": torch.ones(2, 3)}},
            "shape": torch.ones(4, 5),
            "kind": torch.ones(2),
            "packed": random_tensor("float4_e2m1fn_x2", (4,)),
            "value": 3,
            "tensor": torch.ones(1),
            "fits": torch.ones(3),
        },
    )
    into: dict[str, Any] = {
        "layers": {"0": {"wieght": torch.zeros(2, 3)}},
        "shape": torch.zeros(5, 4),
        "kind": torch.zeros(2, dtype=torch.int64),
        "packed": torch.zeros(4),
        "value": torch.zeros(1),
        "tensor": 3,
        "fits": torch.zeros(3),
    }
    with pytest.raises(StateMismatchError) as caught:
        milepost.load(step, into)
    error = caught.value
    assert error.missing == ("layers.0.wieght",)
    assert error.unexpected == ("layers.0.weight",)
    assert error.mismatched == (
        "kind: dtype float32 in the checkpoint, int64 here",
        "packed: dtype float4_e2m1fn_x2 in the checkpoint, float32 here",
        "shape: shape [4, 5] in the checkpoint, [5, 4] here",
        "tensor: a tensor in the checkpoint, not a tensor here",
        "value: not a tensor in the checkpoint, a tensor here",
    )
    assert "layers.0.wieght (did you mean 'layers.0.weight', which it has?)" in error.message
    assert "nothing was changed" in error.message
    assert into["fits"].tolist() == [0, 0, 0]


def test_missing_keys_may_be_let_pass(step: Path) -> None:
    milepost.save(step, {"a": torch.ones(2)})
    into = {"a": torch.zeros(2), "b": torch.full((1,), 7.0), "c": 8}
    report = milepost.load(step, into, strict=False)
    assert report.missing == ("b", "c")
    assert (into["a"].tolist(), into["b"].tolist(), into["c"]) == ([1, 1], [7], 8)


class OfTheUser:
    """A class that only the user's program knows."""


@pytest.mark.parametrize("value", [OfTheUser(), [1, OfTheUser()], lambda: None, len, {"deep": OfTheUser()}])
def test_values_that_need_code_to_load_are_refused(step: Path, value: Any) -> None:
    with pytest.raises(SaveError, match=r"^part\.value.* holds a .*can't be loaded without running code") as caught:
        milepost.save(step, {"w": torch.ones(1), "part": {"value": value}})
    assert caught.value.key is not None
    assert caught.value.key.startswith("part.value")
    assert not step.exists()
    assert list(step.parent.iterdir()) == []


def test_two_values_with_one_key_are_refused(step: Path) -> None:
    with pytest.raises(SaveError, match=r"'a\.b'.*rename one"):
        milepost.save(step, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})


def test_empty_dicts_are_remembered(step: Path) -> None:
    """They have no key, as in stock DCP, but the manifest records their paths."""
    state = {"part": {"empty": {}, "n": 1}, "list": [{}, torch.ones(1)], "w": torch.ones(2)}
    milepost.save(step, state)
    into = blank(state)
    milepost.load(step, into)
    assert_same(into, state)
    manifest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    assert manifest.extra["empty_mappings"] == [["part", "empty"], ["list", 0]]
    without_list = {key: value for key, value in state.items() if key != "list"}
    milepost.save(step, without_list)
    stock = blank(without_list)
    dcp.load(stock, checkpoint_id=step)
    assert_same(stock, without_list)


def test_save_replaces_an_existing_checkpoint(step: Path) -> None:
    milepost.save(step, {"a": torch.ones(2), "b": torch.ones(3)})
    report = milepost.save(step, {"a": torch.zeros(2)})
    into = {"a": torch.ones(2)}
    assert milepost.load(step, into).unexpected == ()
    assert into["a"].tolist() == [0, 0]
    assert report.path == str(step)
    assert [entry.name for entry in step.parent.iterdir()] == ["step-1"]


def test_plan_is_reused_while_the_structure_stays(tmp_path: Path) -> None:
    """From the second save on, whatever the values are; a new one for other keys, shapes, dtypes or nesting."""
    saver = Saver(LocalStorage(tmp_path), SingleProcess())

    def reused(state: dict[str, Any]) -> bool:
        report = saver.save(SaveRequest("step-1", lambda: state, SaveInfo(step=1, kind="state")))
        into = blank(state)
        milepost.load(tmp_path / "step-1", into)
        assert_same(into, state)
        paths = checkpoint_record.read_manifest(LocalStorage(tmp_path), "step-1").paths
        assert paths == FileSystemReader(tmp_path / "step-1").read_metadata().planner_data == flatten(state).paths
        return report.reused_plan

    assert not reused({"w": torch.ones(2), "n": 1})
    assert reused({"w": torch.zeros(2), "n": "a much longer value"})
    assert not reused({"w": torch.zeros(3), "n": 1})
    assert not reused({"w": torch.zeros(3, dtype=torch.bfloat16), "n": 1})
    assert not reused({"w": torch.zeros(3, dtype=torch.bfloat16), "m": 1})
    assert not reused({"w": {"0": torch.zeros(3)}})
    assert reused({"w": {"0": torch.ones(3)}})
    assert not reused({"w": [torch.ones(3)]})


# ---- dcp.save and dcp.load with our storage classes ----


def test_plugin_in_both_directions(step: Path) -> None:
    """Our writer: all three readers. Stock's writer: our reader."""
    state = {**NESTED, "forms": every_form("float32"), "half": every_form("bfloat16")}
    dcp.save(state, storage_writer=milepost.StorageWriter(step))
    assert (step / "milepost.json").exists()
    readers = {
        "ours": lambda into: milepost.load(step, into),
        "plugin": lambda into: dcp.load(into, storage_reader=milepost.StorageReader(step)),
        "stock": lambda into: dcp.load(into, checkpoint_id=step),
    }
    for read in readers.values():
        into = blank(state)
        read(into)
        assert_same(into, state)
    external = step.with_name("step-2")
    dcp.save(state, checkpoint_id=external)
    into = blank(state)
    dcp.load(into, storage_reader=milepost.StorageReader(external))
    assert_same(into, state)


def test_plugin_checks_digests(step: Path) -> None:
    dcp.save({"w": torch.ones(1000)}, storage_writer=milepost.StorageWriter(step))
    shard = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name).tensors["w"].shards[0]
    data = bytearray((step / shard.file).read_bytes())
    data[(shard.data_offset or 0) + 100] ^= 1
    (step / shard.file).write_bytes(data)
    with pytest.raises(dcp.api.CheckpointException, match=r"digest mismatch in 'w', .*changed after they were written"):
        dcp.load({"w": torch.zeros(1000)}, storage_reader=milepost.StorageReader(step))


def test_plugin_refuses_values_that_need_code(step: Path) -> None:
    with pytest.raises(dcp.api.CheckpointException, match="value can't be loaded without running code"):
        dcp.save({"value": OfTheUser()}, storage_writer=milepost.StorageWriter(step))
    assert not step.exists()


def test_one_writer_object_saves_again_and_elsewhere(step: Path) -> None:
    writer = milepost.StorageWriter(step)
    for number in range(3):
        dcp.save({"n": torch.tensor(number)}, storage_writer=writer)
        into = {"n": torch.tensor(-1)}
        milepost.load(step, into)
        assert into["n"].item() == number
    dcp.save({"n": torch.tensor(7)}, storage_writer=writer, checkpoint_id=step.with_name("step-2"))
    assert sorted(entry.name for entry in step.parent.iterdir()) == ["step-1", "step-2"]


def test_thousands_of_small_tensors_load_in_place_and_as_a_whole(memory_path: Path) -> None:
    """Thousands of keys at once; an empty target, and one missing key, are refused."""
    state = {f"layers.{n}.scale": torch.full((2,), float(n)) for n in range(5000)}
    milepost.save(memory_path / "step-1", state)
    assert all(map(torch.equal, milepost.load(memory_path / "step-1").values(), state.values()))
    into = {key: torch.zeros(2) for key in state}
    milepost.load(memory_path / "step-1", into)
    assert all(map(torch.equal, into.values(), state.values()))
    with pytest.raises(StateMismatchError, match="nothing was loaded"):
        milepost.load(memory_path / "step-1", {})
    del into["layers.7.scale"]
    with pytest.raises(StateMismatchError, match="1 key of the checkpoint has no place"):
        milepost.load(memory_path / "step-1", into)


def test_one_key_that_does_not_fit_is_one(tmp_path: Path) -> None:
    milepost.save(tmp_path / "step-1", {"w": torch.ones(2)})
    with pytest.raises(StateMismatchError, match="\n  1 key does not fit:\n"):
        milepost.load(tmp_path / "step-1", {"w": torch.ones(3)})
