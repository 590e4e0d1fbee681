"""Reading boxes of stored tensors, whatever file they are in, and checking every byte on the way.

A ``Source`` knows for each tensor which stretches of which files hold it; folders of Hugging Face, DCP folders and
``.pt`` files differ only in how that is found out (``open``). ``Assembled`` puts a recipe of ``names.rules`` on
top, so that a tensor of another program reads like a stored one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from milepost.errors import ConversionError
from milepost.format.box import Box, contiguous_runs
from milepost.format.dtype import itemsize, numpy_dtype
from milepost.interop.names.rules import Op, Piece, Recipe
from milepost.storage.base import ReadHandle
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
        """So many rows (of the last dim but one) belong together: a box that cuts them costs extra reads."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """One stored box: its row-major bytes begin ``start`` bytes into what ``reader`` reads."""

    box: Box
    reader: BlockReader
    start: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor and the stretches that make it up."""

    info: TensorInfo
    stretches: tuple[Stretch, ...]


class Source:
    """Tensors in open files. Takes ownership of ``files``."""

    def __init__(self, path: str, kind: str, files: Sequence[ReadHandle], tensors: Mapping[str, Stored]):
        self.path = path
        self.kind = kind
        self._files = files
        self.tensors: Mapping[str, TensorInfo] = {key: stored.info for key, stored in tensors.items()}
        self._stretches = {key: stored.stretches for key, stored in tensors.items()}

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        stored = array_dtype(self.tensors[key].dtype)
        for stretch in self._stretches[key]:
            common = stretch.box.intersect(box)
            if common is None:
                continue
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
        readers = {id(s.reader): s.reader for stretches in self._stretches.values() for s in stretches}
        return sum(reader.finish() for reader in readers.values() if reader.has_digests)

    def close(self) -> None:
        """Close the files."""
        for handle in self._files:
            handle.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Assembled:
    """Tensors that ``recipes`` put together from those of ``base``: the same boxes, under other names and orders."""

    def __init__(self, base: Readable, recipes: Mapping[str, Recipe], dtype: str | None = None):
        self._base = base
        self._recipes = recipes
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(recipe.dtype or dtype or base.tensors[recipe.pieces[0].source_key].dtype, recipe.shape)
            for key, recipe in recipes.items()
        }

    def unit_rows(self, key: str) -> int:
        """See :class:`Readable`."""
        units = [1]
        for piece in self._recipes[key].pieces:
            if piece.op is Op.TRANSPOSED:
                units.append(piece.target.sizes[-2])
            else:
                units.append(self._base.unit_rows(piece.source_key))
                units.append(1 if piece.op is Op.SAME else piece.head_dim)
        return math.lcm(*units)

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        recipe = self._recipes[key]
        if not recipe.pieces:
            out.fill(0)
        for piece in recipe.pieces:
            common = piece.target.intersect(box)
            if common is not None:
                self._read_piece(piece, common.relative_to(piece.target), out[common.relative_to(box).index()])

    def _read_piece(self, piece: Piece, part: Box, out: Array) -> None:
        """Fill ``out`` with the box ``part`` of a piece (in the piece's own coordinates)."""
        # Source and target differ at most in leading dims of size 1.
        ndim = len(piece.source.sizes)
        offsets, sizes = part.offsets[len(part.offsets) - ndim :], part.sizes[len(part.sizes) - ndim :]
        extra = len(piece.source.sizes) - len(piece.target.sizes)
        if extra > 0:
            offsets, sizes = (0,) * extra + part.offsets, (1,) * extra + part.sizes
        target = out.reshape(sizes) if out.flags.c_contiguous else _reshaped_view(out, sizes)
        if piece.op is Op.SAME:
            self._base.read_into(piece.source_key, Box(offsets, sizes).shifted(piece.source.offsets), target)
        elif piece.op is Op.TRANSPOSED:
            swapped = Box(_swap(offsets), _swap(sizes)).shifted(piece.source.offsets)
            self._base.read_into(piece.source_key, swapped, target.swapaxes(-1, -2))
        else:
            self._read_heads(piece, offsets, sizes, target)

    def _read_heads(self, piece: Piece, offsets: tuple[int, ...], sizes: tuple[int, ...], target: Array) -> None:
        """Read the whole heads that the wanted rows lie in, and reorder the rows of each."""
        head = piece.head_dim
        first = offsets[0] // head * head
        stop = -(-(offsets[0] + sizes[0]) // head) * head
        raw = np.empty((stop - first, *sizes[1:]), target.dtype)
        wanted = Box((first, *offsets[1:]), raw.shape).shifted(piece.source.offsets)
        self._base.read_into(piece.source_key, wanted, raw)
        inner = (2, head // 2) if piece.op is Op.TO_PAIRS else (head // 2, 2)
        reordered = raw.reshape(-1, *inner, *sizes[1:]).swapaxes(1, 2)  # (heads, ., ., columns)
        if sizes[0] == raw.shape[0] and target.flags.c_contiguous:
            target.reshape(reordered.shape)[...] = reordered
        else:
            begin = offsets[0] - first
            target[...] = reordered.reshape(raw.shape)[begin : begin + sizes[0]]


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


def _swap(values: tuple[int, ...]) -> tuple[int, ...]:
    return (*values[:-2], values[-1], values[-2])


def _reshaped_view(array: Array, sizes: tuple[int, ...]) -> Array:
    """``array`` with leading dims of size 1 added or dropped: a view, whatever its layout."""
    drop = array.ndim - len(sizes)
    view: Array = array[(0,) * drop] if drop > 0 else array[(np.newaxis,) * -drop]
    return view
