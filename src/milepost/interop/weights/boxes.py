"""Read boxes of stored tensors from any format, checking every byte.

A ``Source`` holds the file stretches of each tensor; Hugging Face folders, DCP folders and ``.pt`` files differ only in
how these are located (``open``). ``names.assembled`` applies recipes on top, so that another program's tensor reads
like a stored one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from milepost.errors import ConversionError
from milepost.format.box import Box, contiguous_runs
from milepost.format.dtype import itemsize, numpy_dtype
from milepost.storage.base import ReadHandle
from milepost.storage.open_files import OpenFiles
from milepost.verification.block_reader import BlockReader

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype (torch's name) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class Readable(Protocol):
    """Anything from which boxes of tensors can be read, by several threads at once."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors."""
        ...

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """Fill ``out`` (shape ``box.sizes``, any layout) with a box of tensor ``key``, cast to ``out``'s dtype."""
        ...

    def unit_rows(self, key: str) -> int:
        """Return the number of rows (of the last dim but one) in a unit: a box that splits one costs extra reads."""
        ...


class Renamed:
    """Tensors of ``base`` under other keys: ``names`` maps these to the stored ones."""

    def __init__(self, base: Readable, names: Mapping[str, str]):
        self._base = base
        self._names = names
        self.tensors: Mapping[str, TensorInfo] = {key: base.tensors[stored] for key, stored in names.items()}

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        self._base.read_into(self._names[key], box, out)

    def unit_rows(self, key: str) -> int:
        """See :class:`Readable`."""
        return self._base.unit_rows(self._names[key])


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """One stored box: its elements begin at byte ``start`` of ``reader``'s data, row-major."""

    box: Box
    reader: BlockReader
    start: int = 0
    axes: tuple[int, ...] = ()
    """The dims in the order in which they are stored; empty: as they are."""


@dataclass(frozen=True, slots=True)
class TensorStretches:
    """A tensor and its stretches."""

    info: TensorInfo
    stretches: tuple[Stretch, ...]


class Source:
    """Tensors in open files. Takes ownership of ``files``."""

    def __init__(
        self, path: str, kind: str, files: Sequence[ReadHandle | OpenFiles], tensors: Mapping[str, TensorStretches]
    ):
        self.path = path
        self.kind = kind
        self._files = files
        self.tensors: Mapping[str, TensorInfo] = {key: stored.info for key, stored in tensors.items()}
        self._stored = tensors
        self._read_from: dict[int, BlockReader] = {}  # readers whose data has digests

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        stored = array_dtype(self.tensors[key].dtype)
        for stretch in self._stored[key].stretches:
            common = stretch.box.intersect(box)
            if common is None:
                continue
            if stretch.reader.has_digests:
                self._read_from[id(stretch.reader)] = stretch.reader
            inner, shape, target = (
                common.relative_to(stretch.box),
                stretch.box.sizes,
                out[common.relative_to(box).index()],
            )
            if stretch.axes:
                order = stretch.axes
                inner = Box(_in_order(inner.offsets, order), _in_order(inner.sizes, order))
                shape, target = _in_order(shape, order), target.transpose(order)
            direct = target.dtype == stored and target.flags.c_contiguous
            raw = target if direct else np.empty(inner.sizes, stored)
            view, size, position = raw_bytes(raw), stored.itemsize, 0
            read = stretch.reader.read_scattered if stretch.axes else stretch.reader.read
            for start, stop in contiguous_runs(inner, shape):
                part = view[position : position + (stop - start) * size]
                read(stretch.start + start * size, part)
                position += len(part)
            if not direct:
                cast_into(target, raw)

    def unit_rows(self, key: str) -> int:
        """See :class:`Readable`."""
        return 1

    def check_digests(self) -> int:
        """Check the bytes read against the recorded digests; returns the number of bytes covered.

        If only a part of a digest's bytes was read, the rest is read now.

        Raises:
            DigestMismatchError: naming file, key and byte range.
        """
        return sum(reader.finish() for reader in self._read_from.values())

    def check(self, key: str) -> None:
        """Check the bytes read of one tensor, see :meth:`check_digests`."""
        for reader in {stretch.reader for stretch in self._stored[key].stretches}:
            if reader.has_digests:
                reader.finish()

    def close(self) -> None:
        """Close the files."""
        for handle in self._files:
            handle.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _in_order(values: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    return tuple(values[dim] for dim in order)


def cast_into(target: Array, values: Array) -> None:
    """Copy with torch's rules for dtype conversion: round to nearest even, overflow to infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, values, casting="unsafe")


def total_nbytes(tensors: Iterable[TensorInfo]) -> int:
    """Return the total size of tensors in bytes."""
    return sum(Box.whole(t.shape).numel * itemsize(t.dtype) for t in tensors)


def array_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of torch's ``name``. Raises ConversionError if numpy has none."""
    found = numpy_dtype(name)
    if found is None:
        raise ConversionError(f"tensors of dtype {name} can't be converted: numpy has no such dtype")
    return found


def as_bytes(array: Array) -> Bytes:
    """View the memory of a C-contiguous array as a flat array of bytes."""
    return array.reshape(-1).view(np.uint8)


def raw_bytes(array: Array) -> memoryview:
    """View the memory of a C-contiguous array."""
    return memoryview(as_bytes(array))  # type: ignore[arg-type]
