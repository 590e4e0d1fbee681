"""``.metadata``: stock DCP's is read without pickle, ours is read by stock DCP, and both hold the same."""

from __future__ import annotations

import copyreg
import dataclasses
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from manifests import Layout, StoredBox, lay_out
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from milepost.errors import FormatError
from milepost.format.box import Box
from milepost.format.dcp_metadata import DcpLocation, DcpMetadata, DcpTensor, manifest_from_metadata, parse_metadata
from milepost.format.dcp_writer import dump_metadata
from milepost.format.dtype import DTYPES
from milepost.format.record_reader import locate_tensor, read_object
from milepost.testing.world import run_world

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")

STATE: dict[str, Any] = {
    "model": {"w": torch.arange(12.0).reshape(3, 4), "scalar": torch.tensor(7), "empty": torch.zeros(0, 5)},
    "optimizer": {"groups": [{"lr": 0.1, "betas": (0.9, 0.95)}, {"lr": None}], "exp_avg": torch.ones(4).bfloat16()},
    "train_state": {"step": 500},
    "raw": b"\x00\xff",
    "é\n": True,
}


def sizes_of(folder: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.name != ".metadata"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    dcp.save(STATE, checkpoint_id=folder)
    return folder


def as_ours(value: metadata.Metadata) -> DcpMetadata:
    """Torch's own reading of ``.metadata``, as our types."""
    tensors = {
        key: DcpTensor(
            str(entry.properties.dtype).removeprefix("torch."),
            tuple(entry.size),
            tuple(Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks),
        )
        for key, entry in value.state_dict_metadata.items()
        if isinstance(entry, metadata.TensorStorageMetadata)
    }
    return DcpMetadata(
        tensors=tensors,
        objects=tuple(key for key in value.state_dict_metadata if key not in tensors),
        storage={
            (index.fqn, None if index.offset is None else tuple(index.offset)): DcpLocation(
                place.relative_path, place.offset, place.length
            )
            for index, place in value.storage_data.items()
        },
        paths=dict(value.planner_data),
        save_id=value.storage_meta.save_id,
        checkpoint_id=None if value.storage_meta.checkpoint_id is None else str(value.storage_meta.checkpoint_id),
        version=value.version,
    )


def test_stock_metadata_is_read_as_torch_reads_it(stock: Path):
    data = (stock / ".metadata").read_bytes()
    assert parse_metadata(data) == as_ours(pickle.loads(data))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_some_python_defaults_to_is_read(stock: Path, protocol: int):
    value = pickle.loads((stock / ".metadata").read_bytes())
    assert parse_metadata(pickle.dumps(value, protocol)) == as_ours(value)


def test_the_manifest_of_a_stock_folder_leads_to_every_value(stock: Path):
    manifest = manifest_from_metadata(parse_metadata((stock / ".metadata").read_bytes()), sizes_of(stock), step=3)
    assert (manifest.step, manifest.kind) == (3, "full")
    shard = manifest.tensors["model.w"].shards[0]
    record = (stock / shard.file).read_bytes()[shard.record_offset :][: shard.record_nbytes]
    found = locate_tensor(lambda offset, nbytes: record[offset : offset + nbytes], len(record))
    raw = record[found.data_offset :][: found.data_nbytes]
    assert raw == STATE["model"]["w"].numpy().tobytes()
    assert (shard.data_offset, shard.crc32, shard.data_nbytes) == (None, None, len(raw))
    for key, wanted in (
        ("train_state.step", 500),
        ("optimizer.groups.0.betas", (0.9, 0.95)),
        ("raw", b"\x00\xff"),
        ("é\n", True),
    ):
        entry = manifest.objects[key]
        stored = (stock / entry.file).read_bytes()[entry.record_offset :][: entry.record_nbytes]
        assert read_object(stored) == wanted
    assert manifest.paths["optimizer.groups.1.lr"] == ("optimizer", "groups", 1, "lr")


def test_a_state_without_optimizer_is_not_taken_for_one_to_resume_from(tmp_path: Path):
    for state, kind in (({"w": torch.zeros(1)}, "model"), ({"rng": {"seed": torch.zeros(1)}}, "state")):
        dcp.save(state, checkpoint_id=tmp_path / kind)
        metadata = parse_metadata((tmp_path / kind / ".metadata").read_bytes())
        assert manifest_from_metadata(metadata, sizes_of(tmp_path / kind)).kind == kind


def _save_sharded(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = torch.arange(35.0).reshape(5, 7)
    state = {
        "grid": distribute_tensor(full, mesh, [Shard(0), Shard(1)]),
        "rows": distribute_tensor(full, mesh["dp"], [Shard(0)]),
        "strided": distribute_tensor(full, mesh, [Shard(0), Shard(0)]),
        "copies": distribute_tensor(full, mesh, [Replicate(), Replicate()]),
        "short": distribute_tensor(torch.ones(1), mesh["dp"], [Shard(0)]),
        "nested": {"list": [1, {"lr": 0.5}]},
    }
    dcp.save(state, checkpoint_id=folder)


def test_sharded_uneven_and_replicated_tensors_of_four_ranks_are_read(tmp_path: Path):
    run_world(_save_sharded, 4, str(tmp_path))
    data = (tmp_path / ".metadata").read_bytes()
    ours = parse_metadata(data)
    assert ours == as_ours(pickle.loads(data))
    manifest = manifest_from_metadata(ours, sizes_of(tmp_path))
    assert {key: len(entry.shards) for key, entry in manifest.tensors.items()} == {
        "grid": 4,
        "rows": 2,
        "strided": 4,
        "copies": 1,
        "short": 1,
    }


# ---- ours, read by torch ----


def pieces_of(tensor: torch.Tensor, cuts: list[int], axis: int = 0) -> list[StoredBox]:
    """Shards of a tensor along a dim, each in its own file."""
    pieces, start = [], 0
    for number, size in enumerate(cuts):
        part = tensor.narrow(axis, start, size).contiguous()
        offsets = [0] * tensor.dim()
        offsets[axis] = start
        data = part.view(torch.uint8).numpy().tobytes() if part.numel() else b""
        pieces.append(StoredBox(Box(tuple(offsets), tuple(part.shape)), data, f"__{number}_0.distcp"))
        start += size
    return pieces


W = torch.randn(7, 3)
V = torch.randn(2, 6).bfloat16()


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, Layout]:
    layout = lay_out(
        {
            "model.w": ("float32", (7, 3), pieces_of(W, [3, 0, 4])),
            "model.v": ("bfloat16", (2, 6), pieces_of(V, [1, 5], axis=1)),
            "scalar": ("int64", (), [StoredBox(Box((), ()), (11).to_bytes(8, "little"))]),
            "empty": ("float32", (0, 5), [StoredBox(Box((0, 0), (0, 5)), b"")]),
            "k" * 300: ("uint8", (1,), [StoredBox(Box((0,), (1,)), b"\7")]),
        },
        {"optimizer.groups.0.lr": 0.1, "train_state": {"step": 5, "names": ["a", b"b"]}},
        paths={
            "model.w": ("model", "w"),
            "model.v": ("model", "v"),
            "optimizer.groups.0.lr": ("optimizer", "groups", 0, "lr"),
        },
    )
    for name, content in layout.files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".metadata").write_bytes(dump_metadata(layout.manifest))
    return tmp_path, layout


def test_stock_dcp_loads_our_folder(ours: tuple[Path, Layout]):
    state = {
        "model": {"w": torch.zeros(7, 3), "v": torch.zeros(2, 6).bfloat16()},
        "scalar": torch.tensor(0),
        "empty": torch.zeros(0, 5),
        "k" * 300: torch.zeros(1, dtype=torch.uint8),
        "optimizer": {"groups": [{"lr": 0.0}]},
    }
    dcp.load(state, checkpoint_id=ours[0])
    assert torch.equal(state["model"]["w"], W)
    assert torch.equal(state["model"]["v"], V)
    assert state["scalar"].item() == 11
    assert state["k" * 300].item() == 7
    assert state["optimizer"]["groups"][0]["lr"] == 0.1


def test_dcp_to_torch_rebuilds_the_nested_state_from_our_folder(ours: tuple[Path, Layout], tmp_path: Path):
    dcp_to_torch_save(str(ours[0]), tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", weights_only=True)
    assert torch.equal(state["model"]["w"], W)
    assert state["optimizer"]["groups"][0]["lr"] == 0.1
    assert state["train_state"] == {"step": 5, "names": ["a", b"b"]}


def test_our_metadata_unpickles_to_what_stock_dcp_makes_of_the_same_state(stock: Path):
    """Same classes, same attributes, same values; only the ids of save and place differ."""
    wanted = filesystem.FileSystemReader(stock).read_metadata()
    manifest = manifest_from_metadata(parse_metadata((stock / ".metadata").read_bytes()), sizes_of(stock))
    found = pickle.loads(dump_metadata(manifest))
    assert found.state_dict_metadata == wanted.state_dict_metadata
    assert found.planner_data == wanted.planner_data
    assert found.storage_data == wanted.storage_data
    assert {index: index.index for index in found.storage_data} == {index: index.index for index in wanted.storage_data}
    assert found.version == wanted.version == filesystem.CURRENT_DCP_VERSION
    assert found.storage_meta == metadata.StorageMeta(save_id=wanted.storage_meta.save_id)
    for ours, theirs in ((found, wanted), (found.storage_meta, wanted.storage_meta)):
        assert vars(ours).keys() == vars(theirs).keys()


def test_our_metadata_comes_back_through_our_reader(ours: tuple[Path, Layout]):
    folder, layout = ours
    manifest = manifest_from_metadata(parse_metadata((folder / ".metadata").read_bytes()), sizes_of(folder))
    assert manifest.paths == layout.manifest.paths
    assert manifest.save_id == layout.manifest.save_id
    for key, entry in layout.manifest.tensors.items():
        stored = [shard for shard in entry.shards if shard.box.numel] or entry.shards
        known = tuple(dataclasses.replace(shard, data_offset=None, crc32=None) for shard in stored)
        assert manifest.tensors[key] == dataclasses.replace(entry, shards=known)


def test_an_empty_shard_never_hides_a_full_one_that_begins_at_the_same_place(tmp_path: Path):
    layout = lay_out(
        {"w": ("float32", (7, 3), [*pieces_of(W, [7]), StoredBox(Box((0, 0), (0, 3)), b"", "__1_0.distcp")])}
    )
    found = pickle.loads(dump_metadata(layout.manifest))
    assert [place.relative_path for place in found.storage_data.values()] == ["__0_0.distcp"]


@pytest.mark.parametrize("dtype", [name for name in DTYPES if hasattr(torch, name)])
def test_every_dtype_goes_both_ways(dtype: str):
    raw = bytes(2 * DTYPES[dtype].itemsize)
    layout = lay_out({"w": (dtype, (2,), [StoredBox(Box((0,), (2,)), raw)])})
    data = dump_metadata(layout.manifest)
    assert pickle.loads(data).state_dict_metadata["w"].properties == metadata.TensorProperties(getattr(torch, dtype))
    assert parse_metadata(data).tensors["w"].dtype == dtype


def test_writing_and_reading_never_imports_torch():
    code = (
        "import sys; from milepost.format.dcp_metadata import parse_metadata, manifest_from_metadata\n"
        "from milepost.format.dcp_writer import dump_metadata; from manifests import lay_out\n"
        "layout = lay_out({}, {'a': 1}); parsed = parse_metadata(dump_metadata(layout.manifest))\n"
        "manifest_from_metadata(parsed, {n: len(c) for n, c in layout.files.items()}); sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=60, check=False, cwd=Path(__file__).parent).returncode == 0
    )


# ---- what other versions of torch and Python write ----


def stock_metadata(**changes: object) -> metadata.Metadata:
    value = metadata.Metadata(
        state_dict_metadata={
            "w": metadata.TensorStorageMetadata(
                metadata.TensorProperties(),
                torch.Size([4]),
                [metadata.ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))],
            )
        },
        planner_data={"w": ("w",)},
        storage_data={metadata.MetadataIndex("w", [0], 0): filesystem._StorageInfo("a.distcp", 0, 900)},
    )
    return dataclasses.replace(value, **changes)


def test_metadata_of_torch_2_2_without_storage_meta_and_version_is_read():
    value = stock_metadata()
    del value.__dict__["storage_meta"], value.__dict__["version"]
    parsed = parse_metadata(pickle.dumps(value))
    assert (parsed.save_id, parsed.version) == (None, None)
    assert parsed.tensors["w"].shape == (4,)


def test_tensor_properties_from_their_place_in_torch_2_2_are_read():
    data = pickle.dumps(stock_metadata(), protocol=2)
    old = data.replace(
        b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties\n",
    ).replace(
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nMEM_FORMAT_ENCODING\n",
    )
    assert old != data
    assert parse_metadata(old) == parse_metadata(data)


def test_an_enum_pickled_as_early_python_3_11_does_is_read():
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    by_name = {metadata._MEM_FORMAT_ENCODING: lambda member: (getattr, (type(member), member.name))}
    pickler.dispatch_table = copyreg.dispatch_table | by_name
    pickler.dump(stock_metadata())
    assert b"getattr" in buffer.getvalue()
    assert parse_metadata(buffer.getvalue()).tensors["w"].dtype == "float32"


def test_a_path_of_python_3_13_is_read():
    value = stock_metadata(storage_meta=metadata.StorageMeta(PosixPath("/data/run/step-5"), "id"))
    data = pickle.dumps(value, protocol=2).replace(b"cpathlib\n", b"cpathlib._local\n")
    assert parse_metadata(data).checkpoint_id == "/data/run/step-5"
    relative = pickle.dumps(stock_metadata(storage_meta=metadata.StorageMeta(PosixPath("run/5"))))
    assert parse_metadata(relative).checkpoint_id == "run/5"


def test_planner_data_of_another_form_is_passed_over():
    assert parse_metadata(pickle.dumps(stock_metadata(planner_data=["x", 1.5]))).paths == {}
    assert parse_metadata(pickle.dumps(stock_metadata(planner_data={"w": 1.5, 3: ("w",)}))).paths == {}
    assert parse_metadata(pickle.dumps(stock_metadata(planner_data=OrderedDict(w=("a", 0))))).paths == {"w": ("a", 0)}


def test_items_transformed_by_an_extension_are_refused():
    places = {metadata.MetadataIndex("w", [0]): filesystem._StorageInfo("a.distcp", 0, 900, ["stream.zstd"])}
    with pytest.raises(FormatError, match="zstd"):
        manifest_from_metadata(parse_metadata(pickle.dumps(stock_metadata(storage_data=places))), {"a.distcp": 900})


@pytest.mark.parametrize("name", ["../a.distcp", "/etc/passwd", "sub/a.distcp", ".metadata", "milepost.json"])
def test_names_that_leave_the_folder_or_name_its_index_are_refused(name: str):
    places = {metadata.MetadataIndex("w", [0]): filesystem._StorageInfo(name, 0, 900)}
    parsed = parse_metadata(pickle.dumps(stock_metadata(storage_data=places)))
    with pytest.raises(FormatError):
        manifest_from_metadata(parsed, {name: 900})


def test_a_place_beyond_its_file_a_gap_and_an_overlap_are_refused():
    parsed = parse_metadata(pickle.dumps(stock_metadata()))
    with pytest.raises(FormatError, match="which has 899 bytes"):
        manifest_from_metadata(parsed, {"a.distcp": 899})
    with pytest.raises(FormatError, match="not a data file"):
        manifest_from_metadata(parsed, {})
    gap = dataclasses.replace(parsed, tensors={"w": dataclasses.replace(parsed.tensors["w"], shape=(5,))})
    with pytest.raises(FormatError, match="1 of 5 elements are in no shard"):
        manifest_from_metadata(gap, {"a.distcp": 900})
    missing = dataclasses.replace(parsed, storage={})
    with pytest.raises(FormatError, match="no location is recorded for 'w'"):
        manifest_from_metadata(missing, {"a.distcp": 900})
    shared = dataclasses.replace(
        parsed, objects=("o",), storage={**parsed.storage, ("o", None): DcpLocation("a.distcp", 899, 1)}
    )
    with pytest.raises(FormatError, match="overlap"):
        manifest_from_metadata(shared, {"a.distcp": 900})


def test_sparse_layouts_are_refused():
    properties = metadata.TensorProperties(layout=torch.sparse_coo)
    entry = metadata.TensorStorageMetadata(properties, torch.Size([4]), [])
    with pytest.raises(FormatError, match="sparse"):
        parse_metadata(pickle.dumps(stock_metadata(state_dict_metadata={"w": entry})))


def test_an_error_names_the_file_and_the_class():
    data = pickle.dumps(stock_metadata(planner_data=Fraction(1)))
    with pytest.raises(FormatError, match=r"step-5/\.metadata: .*'fractions\.Fraction'") as caught:
        parse_metadata(data, "step-5/.metadata")
    assert caught.value.path == "step-5/.metadata"
