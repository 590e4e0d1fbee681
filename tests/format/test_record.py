"""Records: torch and zipfile read ours, and we find those of any torch."""

from __future__ import annotations

import io
import math
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from milepost.errors import FormatError
from milepost.format.digest import crc32
from milepost.format.dtype import DTYPES, itemsize
from milepost.format.record import DATA_ALIGNMENT, object_record, record_footer, strides_of, tensor_record
from milepost.format.record_reader import LocatedTensor, locate_tensor, read_object

SIZES = [(), (0,), (3,), (2, 3), (2, 0, 3), (1, 2, 3), (1, 2, 1, 4), (2, 2, 2, 2, 2), (300,)]


def raw_of(dtype: str, sizes: tuple[int, ...]) -> bytes:
    return bytes(i % 2 for i in range(math.prod(sizes) * itemsize(dtype)))


def tensor_of(dtype: str, sizes: tuple[int, ...]) -> torch.Tensor:
    raw = raw_of(dtype, sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32
        if not raw:
            return torch.empty(sizes, dtype=getattr(torch, dtype))
        return torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).reshape(sizes)


def our_record(dtype: str, sizes: tuple[int, ...], raw: bytes) -> bytes:
    layout = tensor_record(dtype, sizes)
    record = layout.header + raw + record_footer(layout, crc32(raw))
    assert len(record) == layout.nbytes
    assert layout.data_offset % DATA_ALIGNMENT == 0
    return record


def torch_record(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def locate(record: bytes) -> LocatedTensor:
    return locate_tensor(lambda offset, nbytes: record[offset : offset + nbytes], len(record))


@pytest.mark.parametrize("dtype", [name for name in DTYPES if hasattr(torch, name)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_torch_loads_our_record_of_every_dtype_and_shape(dtype: str, sizes: tuple[int, ...]):
    raw = raw_of(dtype, sizes)
    loaded = torch.load(io.BytesIO(our_record(dtype, sizes, raw)), weights_only=True)
    assert loaded.dtype == getattr(torch, dtype)
    assert tuple(loaded.shape) == sizes
    assert loaded.stride() == torch.empty(sizes).stride()
    assert bytes(loaded.untyped_storage()) == raw


@pytest.mark.parametrize("dtype", [name for name in DTYPES if hasattr(torch, name)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_our_pickle_is_byte_for_byte_that_of_torch_save(dtype: str, sizes: tuple[int, ...]):
    ours = zipfile.ZipFile(io.BytesIO(our_record(dtype, sizes, raw_of(dtype, sizes))))
    theirs = zipfile.ZipFile(io.BytesIO(torch_record(tensor_of(dtype, sizes))))
    for name in ("archive/data.pkl", "archive/byteorder", "archive/version"):
        assert ours.read(name) == theirs.read(name)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_zip_tools_find_our_record_sound(sizes: tuple[int, ...]):
    archive = zipfile.ZipFile(io.BytesIO(our_record("bfloat16", sizes, raw_of("bfloat16", sizes))))
    assert archive.testzip() is None
    assert archive.namelist()[-1] == "archive/data/0"
    assert all(entry.date_time[0] == 1980 for entry in archive.infolist())


@pytest.mark.parametrize("dtype", [name for name in DTYPES if hasattr(torch, name)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_elements_are_found_in_torchs_records_and_in_ours(dtype: str, sizes: tuple[int, ...]):
    raw = raw_of(dtype, sizes)
    for record in (torch_record(tensor_of(dtype, sizes)), our_record(dtype, sizes, raw)):
        found = locate(record)
        assert (found.dtype, found.sizes, found.crc32) == (dtype, sizes, crc32(raw))
        assert found.is_plain
        assert record[found.data_offset : found.data_offset + found.data_nbytes] == raw


def test_a_record_can_be_mapped_into_memory_from_a_file(tmp_path: Path):
    path = tmp_path / "item.pt"
    path.write_bytes(our_record("float32", (2, 3), torch.arange(6.0).numpy().tobytes()))
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(loaded, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("numel", [0xFFFFFFFF - 70_000, 0xFFFFFFFE, 1 << 32, (5 << 30) + 3])
def test_a_record_around_and_beyond_4_gib_is_read_by_torch_and_zipfile(tmp_path: Path, numel: int):
    path = tmp_path / "large.pt"
    layout = tensor_record("uint8", (numel,))
    with path.open("wb") as file:
        file.write(layout.header)
        file.seek(layout.data_offset + numel - 1)
        file.write(b"\x07")
        file.write(record_footer(layout, 0x12345678))
    assert path.stat().st_size == layout.nbytes
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert mapped.shape == (numel,)
    assert mapped[-1] == 7
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("archive/data/0")
        assert (entry.file_size, entry.CRC) == (numel, 0x12345678)
        assert archive.open(entry).read(2) == b"\0\0"
    with path.open("rb") as file:

        def read_at(offset: int, nbytes: int) -> bytes:
            file.seek(offset)
            return file.read(nbytes)

        found = locate_tensor(read_at, layout.nbytes)
    assert (found.data_offset, found.data_nbytes, found.crc32) == (layout.data_offset, numel, 0x12345678)


def test_a_view_of_a_larger_storage_is_found_with_its_strides():
    base = torch.arange(24.0).reshape(4, 6)
    found = locate(torch_record(base[1:, 2:].t()))
    assert (found.sizes, found.strides, found.storage_offset, found.data_nbytes) == ((4, 3), (1, 6), 8, 96)
    assert not found.is_plain


def test_a_parameter_and_a_tensor_that_requires_grad_are_found_as_tensors():
    assert locate(torch_record(torch.nn.Parameter(torch.zeros(3)))).sizes == (3,)
    assert locate(torch_record(torch.zeros(2, requires_grad=True))).sizes == (2,)


def test_a_record_written_without_crcs_has_none():
    torch.serialization.set_crc32_options(False)
    try:
        record = torch_record(torch.ones(4))
    finally:
        torch.serialization.set_crc32_options(True)
    assert locate(record).crc32 is None


def test_lazily_conjugated_tensors_are_refused_with_the_way_out():
    with pytest.raises(FormatError, match="resolve_conj"):
        locate(torch_record(torch.zeros(2, dtype=torch.complex64).conj()))


def test_a_big_endian_record_is_refused_as_such():
    record = io.BytesIO()
    with zipfile.ZipFile(record, "w") as archive:
        for entry in zipfile.ZipFile(io.BytesIO(torch_record(torch.ones(4)))).infolist():
            content = zipfile.ZipFile(io.BytesIO(torch_record(torch.ones(4)))).read(entry)
            archive.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else content)
    with pytest.raises(FormatError, match="big-endian"):
        locate(record.getvalue())


@pytest.mark.parametrize("value", [torch.zeros(2).to_sparse(), [torch.zeros(2)], {"a": 1}, torch.device("cpu"), "text"])
def test_anything_but_a_dense_tensor_is_refused(value: object):
    with pytest.raises(FormatError):
        locate(torch_record(value))


def test_finding_a_tensor_takes_few_small_reads_whatever_its_size():
    record = torch_record(torch.zeros(1 << 20))
    reads = []

    def read_at(offset: int, nbytes: int) -> bytes:
        reads.append(nbytes)
        return record[offset : offset + nbytes]

    locate_tensor(read_at, len(record))
    assert len(reads) <= 4
    assert sum(reads) <= 16 << 10


def test_any_flipped_byte_of_the_structure_is_refused_or_leaves_the_place_as_it_was():
    """A flip may change what is not used (dates, padding), but never make a reader return other data silently."""
    raw = raw_of("float32", (6,))
    record = our_record("float32", (6,), raw)
    wanted = locate(record)
    for position in range(len(record)):
        if wanted.data_offset <= position < wanted.data_offset + wanted.data_nbytes:
            continue
        damaged = bytearray(record)
        damaged[position] ^= 0x10
        try:
            found = locate(bytes(damaged))
        except FormatError:
            continue
        same_place = (found.data_offset, found.data_nbytes) == (wanted.data_offset, wanted.data_nbytes)
        same_type = (found.dtype, found.sizes, found.strides) == (wanted.dtype, wanted.sizes, wanted.strides)
        assert (same_place and same_type) or found.crc32 != crc32(damaged[found.data_offset :][: found.data_nbytes])


@pytest.mark.parametrize(
    ("dtype", "sizes"), [("float99", (2,)), ("float32", (-1,)), ("float32", (1,) * 65), ("int8", (1 << 63,))]
)
def test_records_that_cannot_be_are_refused(dtype: str, sizes: tuple[int, ...]):
    with pytest.raises(FormatError):
        tensor_record(dtype, sizes)


@pytest.mark.parametrize("sizes", [*SIZES, (0, 0, 4), (5, 1, 0)], ids=str)
def test_strides_are_those_of_torch(sizes: tuple[int, ...]):
    assert strides_of(sizes) == torch.empty(sizes).stride()


PLAIN = [
    None, True, False, 0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**63, -(2**100), 1.5, float("inf"),
    "", "é\ud800", b"", b"\x00\xff" * 3, [], [1, [2, []]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4),
    {}, {"a": 1, 2: (3,)}, OrderedDict(b=1, a=2), {"betas": (0.9, 0.95), "lr": 3e-4, "foreach": None, "name": "adamw"},
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: f"{value!r:.20}".encode("ascii", "replace").decode())
def test_a_plain_value_comes_back_through_torch_and_through_us(value: object):
    record = object_record(value)
    assert zipfile.ZipFile(io.BytesIO(record)).testzip() is None
    for loaded in (
        torch.load(io.BytesIO(record), weights_only=True),
        read_object(record),
        read_object(torch_record(value)),
    ):
        assert loaded == value
        assert type(loaded) is type(value)


class Text(str):
    pass


RECURSIVE: list[object] = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1), {1, 2}, 1j, Text("a"), {(1,): 2}, {None: 1}, {True: 1}, object(), range(3), 1 << 3000, RECURSIVE],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_is_left_to_torch_save(value: object):
    with pytest.raises(TypeError):
        object_record({"x": [value]})


@pytest.mark.parametrize("value", [torch.zeros(1), {1, 2}, 1j, torch.float32], ids=lambda value: type(value).__name__)
def test_what_is_not_plain_is_refused_when_read(value: object):
    with pytest.raises(FormatError):
        read_object(torch_record({"x": value}))


def test_a_shared_list_is_read_though_it_is_named_twice():
    shared = [1, 2]
    assert read_object(torch_record({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}


def test_a_damaged_object_is_refused():
    record = bytearray(object_record({"epoch": 17}))
    record[record.index(b"epoch")] ^= 1
    with pytest.raises(FormatError, match="CRC-32"):
        read_object(bytes(record))


def test_records_are_cheap_to_make():
    """A guard against milliseconds per item, not a benchmark."""
    started = time.process_time()
    for number in range(1000):
        object_record(number * 0.1)
        record_footer(tensor_record("float32", (number, 3)), number)
    assert time.process_time() - started < 1
