"""A ``.pt`` file of many tensors: torch's files are located, and torch loads ours."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.errors import FormatError
from milepost.format.digest import crc32
from milepost.format.torch_file import locate_tensors, plan_torch_file
from milepost.format.zip_directory import CENTRAL_HEADER

TENSORS = {
    "a": torch.arange(15.0).reshape(3, 5),
    "b": torch.arange(7).bfloat16(),
    "scalar": torch.tensor(3),
    "f8": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 4),
}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def written(tensors: dict[str, torch.Tensor], shared: dict[str, str]) -> bytes:
    layout = plan_torch_file(
        {k: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in tensors.items()}, shared
    )
    data = bytearray(layout.nbytes)
    for key, offset in layout.data_offsets.items():
        assert offset % 64 == 0
        data[offset : offset + len(raw(tensors[key]))] = raw(tensors[key])
    for offset, part in layout.frame({key: crc32(raw(tensor)) for key, tensor in tensors.items()}):
        data[offset : offset + len(part)] = part
    return bytes(data)


def located(data: bytes) -> dict[str, Any]:
    return locate_tensors(lambda offset, nbytes: data[offset : offset + nbytes], len(data))


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_loads_what_is_laid_out_here(tmp_path: Path, mmap: bool):
    path = tmp_path / "model.pt"
    path.write_bytes(written(TENSORS, {}))
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == list(TENSORS)
    assert all(same(loaded[key], tensor) for key, tensor in TENSORS.items())


def test_tensors_that_share_a_storage_share_it_after_loading(tmp_path: Path):
    path = tmp_path / "model.pt"
    path.write_bytes(written(TENSORS, {"tied": "a"}))
    loaded = torch.load(path, weights_only=True)
    assert loaded["tied"].data_ptr() == loaded["a"].data_ptr()
    assert path.stat().st_size < len(written(TENSORS, {})) + 400


def test_every_entry_has_its_true_crc(tmp_path: Path):
    path = tmp_path / "model.pt"
    path.write_bytes(written(TENSORS, {}))
    assert zipfile.ZipFile(path).testzip() is None


def test_headers_for_more_than_4_gib_are_those_of_zip64():
    layout = plan_torch_file({"huge": ("uint8", (5 << 30,)), "after": ("float32", (2,))})
    frame = dict(layout.frame({"huge": 1, "after": 2}))
    end = max(frame)
    # zipfile needs only the directory: the data in between may be a hole.
    file = _Sparse(frame, layout.nbytes)
    infos = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    assert infos["archive/data/0"].file_size == 5 << 30
    assert infos["archive/data/1"].header_offset > 5 << 30
    assert end + len(frame[end]) == layout.nbytes
    found = locate_tensors(file.read_at, layout.nbytes)
    assert found["after"].data_offset == layout.data_offsets["after"]
    assert found["huge"].data_nbytes == 5 << 30


class _Sparse(io.RawIOBase):
    """A file of which only some parts exist; the rest is zeros."""

    def __init__(self, parts: dict[int, bytes], nbytes: int):
        self.parts, self.nbytes, self.position = parts, nbytes, 0

    def read_at(self, offset: int, nbytes: int) -> bytes:
        found = bytearray(nbytes)
        for start, part in self.parts.items():
            low, high = max(start, offset), min(start + len(part), offset + nbytes)
            if low < high:
                found[low - offset : high - offset] = part[low - start : high - start]
        return bytes(found)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.nbytes)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        size = self.nbytes - self.position if size < 0 else min(size, self.nbytes - self.position)
        data = self.read_at(self.position, size)
        self.position += size
        return data


def test_what_torch_saves_is_located_by_its_path():
    module = torch.nn.Sequential(OrderedDict(lin=torch.nn.Linear(3, 4), norm=torch.nn.LayerNorm(4)))
    buffer = io.BytesIO()
    torch.save({"model": module.state_dict(), "step": 3, "list": [torch.ones(2)], "lr": 0.1}, buffer)
    data = buffer.getvalue()
    found = located(data)
    assert list(found) == ["model.lin.weight", "model.lin.bias", "model.norm.weight", "model.norm.bias", "list.0"]
    place = found["model.lin.weight"]
    assert place.is_plain
    assert data[place.data_offset : place.data_offset + place.data_nbytes] == raw(module.lin.weight.detach())
    assert place.crc32 == crc32(raw(module.lin.weight.detach()))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    buffer = io.BytesIO()
    torch.save({"w": torch.ones(1), "x": Evil()}, buffer)
    with pytest.raises(FormatError, match=r"mkdir.*not allowed"):
        located(buffer.getvalue())
    assert not (tmp_path / "ran").exists()


def test_a_state_dict_that_unfolds_without_end_is_refused():
    node: list[Any] = []
    for _ in range(15):
        node = [node] * 20
    buffer = io.BytesIO()
    torch.save(node, buffer)
    with pytest.raises(FormatError, match="parts or"):
        located(buffer.getvalue())


@pytest.mark.parametrize("data", [b"", b"hello" * 100, pickle.dumps({"w": 1})])
def test_anything_but_a_torch_file_is_refused(data: bytes):
    with pytest.raises(FormatError):
        located(data)


def test_storages_that_overlap_are_refused():
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, buffer)
    data = bytearray(buffer.getvalue())
    assert list(located(bytes(data))) == ["a", "b"]
    line = data.rindex(b"archive/data/0") - CENTRAL_HEADER.size  # of the directory: the last mention
    for field in (20, 24):  # the two sizes
        data[line + field : line + field + 4] = (200).to_bytes(4, "little")
    with pytest.raises(FormatError, match="'a' and 'b' overlap"):
        located(bytes(data))


def test_a_truncated_file_is_refused():
    data = written(TENSORS, {})
    for nbytes in (len(data) - 1, len(data) // 2, 100):
        with pytest.raises(FormatError):
            located(data[:nbytes])
