"""Reading boxes of stored tensors, whatever file they are in, and checking every byte on the way.

A ``Source`` knows for each tensor which stretches of which files hold it; folders of Hugging Face, DCP folders and
``.pt`` files differ only in how that is found out (``open``). ``names.assembled`` puts
recipes on top, so that a tensor of another program reads like a stored one.
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
    """Anything that boxes of tensors can be read from, by several threads at once."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor there is."""
        ...

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """Fill ``out`` (shape ``box.sizes``, any layout) with a box of tensor ``key``, cast to ``out``'s dtype."""
        ...

    def unit_rows(self, key: str) -> int:
        """Number of rows (of the last dim but one) that belong together: a box that cuts them costs extra reads."""
        ...


class Renamed:
    """Tensors of ``base`` under other keys: ``names`` maps those to the stored ones."""

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
    """One stored box: its row-major bytes begin ``start`` bytes into what ``reader`` reads."""

    box: Box
    reader: BlockReader
    start: int = 0


@dataclass(frozen=True, slots=True)
class TensorStretches:
    """A tensor and the stretches that make it up."""

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
        self._read_from: dict[int, BlockReader] = {}  # of those whose data has digests

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        stored = array_dtype(self.tensors[key].dtype)
        for stretch in self._stored[key].stretches:
            common = stretch.box.intersect(box)
            if common is None:
                continue
            if stretch.reader.has_digests:
                self._read_from[id(stretch.reader)] = stretch.reader
            target = out[common.relative_to(box).index()]
            direct = target.dtype == stored and target.flags.c_contiguous
            raw = target if direct else np.empty(common.sizes, stored)
            view, size, position = raw_bytes(raw), stored.itemsize, 0
            for start, stop in contiguous_runs(common.relative_to(stretch.box), stretch.box.sizes):
                part = view[position : position + (stop - start) * size]
                stretch.reader.read(stretch.start + start * size, part)
                position += len(part)
            if not direct:
                cast_into(target, raw)

    def unit_rows(self, key: str) -> int:
        """See :class:`Readable`."""
        return 1

    def check_digests(self) -> int:
        """Check what was read against the recorded digests; returns how many bytes they are of.

        What a digest is of is checked as a whole: where only a part was read, the rest is read for it now.

        Raises:
            DigestMismatchError: naming file, key and byte range.
        """
        return sum(reader.finish() for reader in self._read_from.values())

    def check(self, key: str) -> None:
        """Check what was read of one tensor, as :meth:`check_digests` does of all."""
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


def cast_into(target: Array, values: Array) -> None:
    """Copy with torch's rules for a change of dtype: to nearest even, overflow to infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, values, casting="unsafe")


def total_nbytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of tensors."""
    return sum(Box.whole(t.shape).numel * itemsize(t.dtype) for t in tensors)


def array_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of torch's ``name``. Raises ConversionError where numpy has none."""
    found = numpy_dtype(name)
    if found is None:
        raise ConversionError(f"tensors of dtype {name} can't be converted: numpy has no such dtype")
    return found


def as_bytes(array: Array) -> Bytes:
    """The memory of a C-contiguous array as a flat array of bytes."""
    return array.reshape(-1).view(np.uint8)


def raw_bytes(array: Array) -> memoryview:
    """The memory of a C-contiguous array."""
    return memoryview(as_bytes(array))  # type: ignore[arg-type]
