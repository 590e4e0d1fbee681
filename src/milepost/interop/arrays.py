"""Stored tensors as numpy arrays, read on indexing, without torch (the idea is ``h5py``'s)."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex, TypeAlias

import numpy as np

from milepost.errors import CheckpointNotFoundError, near
from milepost.format.box import Box
from milepost.interop.weights.boxes import Array, Source, array_dtype
from milepost.interop.weights.open import open_all

Index: TypeAlias = "SupportsIndex | slice | Any"
"""Selection along one dim: a number or a slice; ``...`` stands for all remaining dims, None for a new one."""


class StoredArray:
    """One tensor of an open checkpoint. Indexing reads the selection, checks its digests and returns an array.

    bfloat16 and 8-bit floats are those of ``ml_dtypes``.
    """

    def __init__(self, opened: OpenCheckpoint, source: Source, key: str):
        self._opened = opened
        self._source = source
        self._key = key
        info = source.tensors[key]
        self.shape = info.shape
        self.dtype: np.dtype[Any] = array_dtype(info.dtype)

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return Box.whole(self.shape).numel

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"'{self._key}' has no dims")
        return self.shape[0]

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Array:
        """Return the elements selected by ``index`` (numbers, slices with any step, ``...``, None), like numpy.

        Raises:
            DigestMismatchError: bytes changed after they were written.
            IndexError: an index is out of range or of another type, or there are too many.
            ValueError: the checkpoint was closed.
            StorageError: a read failed or was short.
        """
        if self._opened.is_closed:  # its file descriptors may be another file's by now
            raise ValueError(f"{self._opened.path} was closed: index '{self._key}' before")
        offsets, sizes, then = list[int](), list[int](), list[Any]()
        for part in _by_dim(index, self.ndim):
            if part is None:
                then.append(None)
                continue
            start, stop, pick = _bounds(part, len(offsets), self.shape[len(offsets)])
            offsets.append(start)
            sizes.append(stop - start)
            then.append(pick)
        out = np.empty(sizes, self.dtype)
        if out.size:
            self._source.read_into(self._key, Box(tuple(offsets), tuple(sizes)), out)
            self._source.check(self._key)
        picked: Array = out[tuple(then)] if then else out[()]
        return picked

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError(f"'{self._key}' is on storage: reading it makes a copy")
        found = np.asarray(self[...], self.dtype)
        return found if dtype is None else found.astype(dtype)

    def __repr__(self) -> str:
        return f"<StoredArray '{self._key}' {self.dtype} {list(self.shape)}>"


def _by_dim(index: Any, ndim: int) -> list[Any]:
    """Expand the index to one entry per dim, and a None for each new one."""
    parts = list(index) if isinstance(index, tuple) else [index]
    gaps = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(gaps) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    count = len(parts) - len(gaps) - sum(part is None for part in parts)
    if count > ndim:
        raise IndexError(f"too many indices: the tensor has {ndim} dims, {count} were indexed")
    place = gaps[0] if gaps else len(parts)
    rest = [slice(None)] * (ndim - count)
    return [*parts[:place], *rest, *parts[place + len(gaps) :]]


def _bounds(part: Any, dim: int, size: int) -> tuple[int, int, Any]:
    """Return the range to read along a dim, and the index to apply to it."""
    if isinstance(part, slice):
        selected = range(size)[part]
        if not selected:
            return 0, 0, slice(None)
        low, high = min(selected[0], selected[-1]), max(selected[0], selected[-1])
        backwards = selected.step < 0
        return low, high + 1, slice(None, None, selected.step) if abs(selected.step) > 1 or backwards else slice(None)
    number = _whole_number(part)
    if not -size <= number < size:
        raise IndexError(f"index {number} is out of bounds for dim {dim} with size {size}")
    number %= size
    return number, number + 1, 0


def _whole_number(part: Any) -> int:
    """An index that numpy takes for a number. Raises IndexError for masks, lists and whatever else selects several."""
    try:
        if not isinstance(part, bool | np.bool_) and getattr(part, "dtype", None) != np.bool_:
            return operator.index(part)
    except TypeError:
        pass
    shown = " ".join(f"{part!r:.200}".split())
    raise IndexError(
        f"only integers, slices, '...' and None select elements of a stored tensor, not {shown:.100}: read what holds "
        "them, and select of the array"
    )


class OpenCheckpoint(Mapping[str, StoredArray]):
    """The tensors of a checkpoint by key, read on indexing. A context manager; safe to use from several threads.

    Keys of tensors whose dtype numpy lacks are included; accessing such a tensor raises ConversionError.
    """

    def __init__(self, source: Source):
        self._source = source
        self.is_closed = False

    @property
    def path(self) -> str:
        """The path that was opened."""
        return self._source.path

    def __getitem__(self, key: str) -> StoredArray:
        if key not in self._source.tensors:
            hint = near(key, self._source.tensors) if isinstance(key, str) else None
            raise KeyError(f"{self.path} has no tensor '{key}'" + (f"; did you mean '{hint}'?" if hint else ""))
        return StoredArray(self, self._source, key)

    def __contains__(self, key: object) -> bool:
        return key in self._source.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)

    def __repr__(self) -> str:
        return f"<OpenCheckpoint {self.path}: {len(self)} tensors>"

    def close(self) -> None:
        """Close the files."""
        self.is_closed = True
        self._source.close()

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str]) -> OpenCheckpoint:
    """Open the tensors at ``path`` for reading with numpy; torch is not needed.

    ``path`` is a step of Milepost, torchtitan or stock DCP (all its tensors, the optimizer's too), a Hugging Face
    folder, a ``.pt`` or a ``.safetensors`` file, on a disk or in an object store. Only metadata that locates the
    tensors is read. Public as ``milepost.open``.

    Raises:
        CheckpointNotFoundError: there is nothing, or nothing in a known format.
        CheckpointDamagedError: files are missing, truncated or malformed.
        ConversionError: tensors are stored in a form that can't be read in part (strides).
    """
    if not os.fspath(path):
        raise CheckpointNotFoundError("the path is empty: give a step, a Hugging Face folder or a file", path="")
    return OpenCheckpoint(open_all(path))
