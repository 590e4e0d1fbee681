"""Slabs, file images and the bound on memory."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.errors import ConversionError, StorageError
from milepost.format.box import Box, contiguous_runs, cut_into_slabs
from milepost.format.digest import crc32
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import model_args
from milepost.interop.names.rules import correspond
from milepost.interop.options import DEFAULT_BUDGET_NBYTES
from milepost.interop.weights import stream
from milepost.interop.weights.boxes import Array, TensorInfo
from milepost.interop.weights.stream import PassedBytes, PlacedTensor, SlabReader, write_image
from milepost.storage import LocalStorage


class Counted:
    """Tensors whose bytes follow from their position."""

    def __init__(self, tensors: Mapping[str, TensorInfo], fail_at: str = ""):
        self.tensors = tensors
        self.fail_at = fail_at

    def unit_rows(self, key: str) -> int:
        return 1

    def whole(self, key: str) -> Array:
        shape = self.tensors[key].shape
        return (np.arange(np.prod(shape), dtype=np.uint32) + len(key)).reshape(shape)

    def read_into(self, key: str, box: Box, out: Array) -> None:
        if key == self.fail_at:
            raise StorageError("the source is gone", operation="read", path=key)
        out[...] = self.whole(key)[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    element_nbytes=st.sampled_from([1, 2, 4]),
    unit=st.sampled_from([1, 2, 8]),
    limit=st.sampled_from([8, 64, 1000]),
)
def test_slabs_tile_a_tensor_in_order_and_keep_units_together(
    shape: list[int], element_nbytes: int, unit: int, limit: int
):
    if len(shape) > 1:
        shape[-2] *= unit
    else:
        unit = 1
    slabs = list(cut_into_slabs(shape, element_nbytes, limit, unit))
    end = 0
    for slab in slabs:
        assert list(contiguous_runs(slab.box, tuple(shape))) == [
            (slab.start // element_nbytes, (slab.start + slab.nbytes) // element_nbytes)
        ]
        assert slab.start == end
        assert slab.nbytes <= slabs[0].nbytes
        end += slab.nbytes
        if unit > 1:
            assert slab.box.offsets[-2] % unit == 0
            assert slab.box.sizes[-2] % unit == 0
    assert end == np.prod(shape, dtype=int) * element_nbytes


@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_an_image_holds_every_tensor_at_its_place(
    tmp_path: Path, memory_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
):
    monkeypatch.setattr(stream, "SLAB_NBYTES", 100_000)
    monkeypatch.setattr(stream, "TASK_NBYTES", 900_000)
    monkeypatch.setattr(stream, "BUFFER_NBYTES", 250_000)
    shapes = {"a": (1000, 77), "b": (3,), "c": (2, 5, 70_001), "empty": (0, 4), "d": (1234,), "e": (1, 3_000_000)}
    content = Counted({key: TensorInfo("uint32", shape) for key, shape in shapes.items()})
    offset, placed = 1004, []
    for index, key in enumerate(shapes):
        placed.append(PlacedTensor(key, offset))
        offset += content.whole(key).nbytes + (0, 12, 100_000)[index % 3]  # adjacent, a short gap, a long gap
    storage = LocalStorage(tmp_path if folder == "disk" else memory_path)
    with storage.open_write("image", offset) as handle:
        passed = write_image(handle, placed, SlabReader(content, 64 << 20))
        handle.write(0, [b"\x07" * 1004])
        handle.sync()
    data = storage.read("image")
    assert data[:1004] == b"\x07" * 1004
    for place in placed:
        raw = content.whole(place.key).tobytes()
        assert data[place.offset : place.offset + len(raw)] == raw, place.key
        assert passed[place.key].crc32() == crc32(raw)


def test_a_failure_on_one_thread_is_raised_and_ends_the_others(memory_path: Path):
    tensors = {f"t{i:03}": TensorInfo("uint32", (9 << 20,)) for i in range(40)}
    content = Counted(tensors, fail_at="t003")
    announced: list[int] = []
    reader = SlabReader(content, 256 << 20, announced.append)
    with LocalStorage(memory_path).open_write("image", 40 * (36 << 20)) as handle, pytest.raises(StorageError):
        write_image(handle, [PlacedTensor(key, i * (36 << 20)) for i, key in enumerate(tensors)], reader)
    assert sum(announced) < 20 * (36 << 20)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("milepost-convert")]


@pytest.mark.parametrize(
    ("model", "flavor"),
    [("llama3", "1B"), ("llama3", "70B"), ("llama3", "405B"), ("qwen3", "235B-A22B")],
)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_memory_does_not_grow_with_the_model(model: str, flavor: str, dtype: str | None):
    args = model_args(model, flavor)
    family = family_of(model, args)
    theirs = correspond(family, family.scheme("hf"), args)
    stored = Counted({key: TensorInfo("bfloat16", shape) for key, shape in theirs.theirs.items()})
    for names in ("milepost", "hf", "torchtitan-0.3"):
        target = correspond(family, family.scheme(names), args).into_theirs()
        content = Assembled(Assembled(stored, theirs.into_ours()), target, dtype)
        reader = SlabReader(content, DEFAULT_BUDGET_NBYTES)
        assert reader.peak_nbytes <= DEFAULT_BUDGET_NBYTES
        assert reader.num_threads >= 2


def test_a_budget_below_one_slab_is_refused():
    content = Counted({"a": TensorInfo("float32", (4 << 20,))})
    with pytest.raises(ConversionError, match="too small"):
        SlabReader(content, 1 << 20)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.lists(st.integers(0, 300), max_size=6), st.randoms())
def test_digests_of_parts_in_any_order_are_those_of_the_whole(data: bytes, cuts: list[int], random):  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("milepost.interop.weights.stream.BLOCK_NBYTES", 64)
        bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        parts = list(itertools.pairwise(bounds))
        random.shuffle(parts)
        passed = PassedBytes()
        for low, high in parts:
            passed.add(low, memoryview(data)[low:high])
        assert passed.crc32() == crc32(data)
