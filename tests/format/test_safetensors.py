"""The safetensors file against the reference implementation, and against malicious files."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.errors import FormatError
from milepost.format.safetensors import MAX_HEADER_NBYTES, parse_header, plan_layout, read_header
from milepost.storage import LocalStorage

ONE = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(folder: Path, header: Any, data_nbytes: int, *, length: int | None = None) -> Path:
    """A file whose header is ``header`` (JSON text, or a value) and whose length field may be wrong."""
    raw = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data_nbytes))
    return path


def read(path: Path) -> Any:
    with LocalStorage(path.parent).open_read(path.name) as handle:
        return read_header(handle)


def test_a_file_of_the_reference_implementation_is_read(tmp_path: Path):
    tensors = {
        "a.weight": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "f8": torch.randn(2, 2).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    header = read(path)
    assert header.metadata == {"format": "pt"}
    data = path.read_bytes()
    assert header.nbytes == len(data)
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert (found.dtype, found.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        assert data[found.offset : found.offset + found.nbytes] == raw


def test_a_file_laid_out_here_is_read_by_the_reference_implementation(tmp_path: Path):
    tensors = {"b": torch.arange(3).to(torch.int8), "a": torch.randn(3, 5), "c": torch.randn(2, 2).half()}
    layout = plan_layout({k: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in tensors.items()})
    data = bytearray(layout.nbytes)
    data[: len(layout.prefix)] = layout.prefix
    for name, tensor in tensors.items():
        place = layout.tensors[name]
        assert place.offset % tensor.element_size() == 0, "every tensor is aligned to its element size"
        data[place.offset : place.offset + place.nbytes] = tensor.numpy().tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["float32", "bfloat16", "uint8", "float64"]), st.lists(st.integers(0, 5), max_size=3)
        ),
        max_size=6,
    )
)
def test_any_layout_reads_back_as_it_was_planned(tensors: Any):
    layout = plan_layout(tensors)
    header = parse_header(layout.prefix[8:], file_nbytes=layout.nbytes, path="model.safetensors")
    assert header.tensors == layout.tensors
    assert len(layout.prefix) % 8 == 0


@pytest.mark.parametrize(
    ("header", "data_nbytes", "said"),
    [
        (ONE, 23, "truncated"),
        (ONE, 25, "outside all tensors"),
        ({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]}}, 28, "gap"),
        (ONE | {"v": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}, 24, "overlaps"),
        ({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}, 20, "needs 24 bytes"),
        ({"w": {"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]}}, 24, "shape"),
        ({"w": {"dtype": "F32", "shape": [2, 1 << 70], "data_offsets": [0, 24]}}, 24, "shape"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "shape"),
        ({"w": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, 4, "shape"),
        ({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, 4, "F99"),
        ({"w": {"dtype": "F32", "shape": [6]}}, 24, "data_offsets"),
        ({"__metadata__": {"format": 3}}, 0, "map of strings"),
        ('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},' * 2 + '"x": 1}', 4, "twice|JSON|Expecting"),
        ('{"w": {}, "w": {}}', 0, "occurs twice"),
        ("[1, 2]", 0, "'{'"),
        ("{" + "[" * 200_000, 0, "malformed"),
        ('{"w": ' + "9" * 10_000 + "}", 0, "malformed"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, header: Any, data_nbytes: int, said: str):
    path = write(tmp_path, header, data_nbytes)
    with pytest.raises(FormatError, match=said) as caught:
        read(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("length", [MAX_HEADER_NBYTES + 1, 1 << 63, (1 << 64) - 1, 1000])
def test_a_header_of_absurd_length_costs_nothing(tmp_path: Path, length: int):
    path = write(tmp_path, ONE, 24, length=length)
    started = time.monotonic()
    with pytest.raises(FormatError, match="truncated, or not a safetensors file"):
        read(path)
    assert time.monotonic() - started < 0.5


def test_a_file_too_short_for_a_header_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"abc")
    with pytest.raises(FormatError, match="3 bytes"):
        read(path)


def test_a_dtype_or_a_name_that_safetensors_does_not_have_is_refused():
    with pytest.raises(ValueError, match="complex128"):
        plan_layout({"w": ("complex128", (1,))})
    with pytest.raises(ValueError, match="__metadata__"):
        plan_layout({"__metadata__": ("float32", (1,))})


def test_a_header_of_very_many_tensors_takes_little_memory() -> None:
    entries = {f"layers.{i}.w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    tracemalloc.start()
    try:
        found = parse_header(raw, file_nbytes=8 + len(raw), path="many.safetensors")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.tensors) == 10_000
    assert peak < 9 * len(raw)  # and the file itself: less than ten times its size


def test_one_tensor_under_no_name_is_refused_and_any_name_is_allowed() -> None:
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    raw = json.dumps(entry).encode()
    with pytest.raises(FormatError, match="not tensors by name"):
        parse_header(raw, file_nbytes=9 + len(raw), path="x")
    names = ("dtype", "shape", "data_offsets")
    raw = json.dumps({n: entry | {"data_offsets": [i, i + 1]} for i, n in enumerate(names)}).encode()
    assert list(parse_header(raw, file_nbytes=11 + len(raw), path="x").tensors) == list(names)
