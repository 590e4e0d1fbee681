"""Reading boxes of stored tensors, whatever file they are in, and checking every byte on the way.

A ``Source`` knows for each tensor which stretches of which files hold it; folders of Hugging Face, DCP folders and
``.pt`` files differ only in how that is found out (``sources.py``). ``assembled`` puts a recipe of ``rules.py`` on
top, so that a tensor of another program reads like a stored one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from milepost.errors import ConversionError, DigestMismatchError
from milepost.format import digest
from milepost.format.box import Box, contiguous_runs
from milepost.format.dtype import itemsize, numpy_dtype
from milepost.format.manifest import BLOCK_NBYTES
from milepost.interop.names.rules import Op, Piece, Recipe
from milepost.storage.base import ReadHandle

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


@dataclass(frozen=True, slots=True)
class Stretch:
    """One stored box: its row-major bytes begin at ``offset`` of ``file`` (an index). Digests are None if unknown."""

    box: Box
    file: int
    offset: int
    nbytes: int
    crc32: int | None = None
    block_crcs: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor and the stretches that make it up."""

    info: TensorInfo
    stretches: tuple[Stretch, ...]


class Source:
    """Tensors in open files. Takes ownership of ``files``.

    While it is read it keeps the CRC-32 of every stretch of bytes that passed, so that ``check_digests`` afterwards
    costs no second read.
    """

    def __init__(self, path: str, kind: str, files: list[ReadHandle], tensors: Mapping[str, Stored]):
        self.path = path
        self.kind = kind
        self._files = files
        self.tensors: Mapping[str, TensorInfo] = {key: stored.info for key, stored in tensors.items()}
        self._stretches = {key: stored.stretches for key, stored in tensors.items()}
        self._seen: dict[tuple[str, int], PassedBytes] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(s.nbytes for stretches in self._stretches.values() for s in stretches)

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        stored = array_dtype(self.tensors[key].dtype)
        for index, stretch in enumerate(self._stretches[key]):
            common = stretch.box.intersect(box)
            if common is None:
                continue
            target = out[common.relative_to(box).index()]
            direct = target.dtype == stored and target.flags.c_contiguous
            raw = target if direct else np.empty(common.sizes, stored)
            self._read_runs(key, index, common, raw)
            if not direct:
                cast_into(target, raw)

    def unit_rows(self, key: str) -> int:
        """See :class:`Readable`."""
        return 1

    def _read_runs(self, key: str, index: int, common: Box, raw: Array) -> None:
        """Fill contiguous ``raw`` with the box ``common`` of one stretch, noting the CRCs of what passes."""
        stretch = self._stretches[key][index]
        size = raw.dtype.itemsize
        view = raw_bytes(raw)
        position = 0
        for start, stop in contiguous_runs(common.relative_to(stretch.box), stretch.box.sizes):
            part = view[position : position + (stop - start) * size]
            self._files[stretch.file].read_into(stretch.offset + start * size, [part])
            if stretch.crc32 is not None:
                self._passed(key, index).add(start * size, part)
            position += len(part)

    def _passed(self, key: str, index: int) -> PassedBytes:
        with self._lock:
            return self._seen.setdefault((key, index), PassedBytes())

    def check_digests(self) -> int:
        """Compare what was read with the recorded CRC-32s; returns how many bytes were compared.

        A CRC is of a whole stretch: one that was read in part, or in parts that overlap, is read again.

        Raises:
            DigestMismatchError: naming file, key and byte range.
        """
        checked = 0
        for (key, index), passed in self._seen.items():
            stretch = self._stretches[key][index]
            handle = self._files[stretch.file]
            if not passed.tile(stretch.nbytes):
                passed = self._read_again(stretch, handle)
            _compare(key, stretch, handle.path, passed.blocks(stretch.nbytes))
            checked += stretch.nbytes
        return checked

    def _read_again(self, stretch: Stretch, handle: ReadHandle) -> PassedBytes:
        passed = PassedBytes()
        buffer = memoryview(bytearray(min(stretch.nbytes, BLOCK_NBYTES)))
        for start in range(0, stretch.nbytes, BLOCK_NBYTES):
            part = buffer[: min(stretch.nbytes - start, BLOCK_NBYTES)]
            handle.read_into(stretch.offset + start, [part])
            passed.add(start, part)
        return passed

    def close(self) -> None:
        """Close the files."""
        for handle in self._files:
            handle.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PassedBytes:
    """CRC-32s of the parts of one run of bytes that passed by, in any order, cut at the digests' block boundaries."""

    __slots__ = ("_lock", "_parts")

    def __init__(self) -> None:
        self._parts: dict[int, tuple[int, int]] = {}  # start -> (nbytes, crc32)
        self._lock = threading.Lock()

    def add(self, start: int, data: memoryview) -> None:
        """Note ``data``, which stands at ``start``. A part that passes twice counts once."""
        found = {}
        position = 0
        while position < len(data):
            room = BLOCK_NBYTES - (start + position) % BLOCK_NBYTES
            part = data[position : position + room]
            found[start + position] = (len(part), digest.crc32(part))
            position += len(part)
        with self._lock:
            self._parts.update(found)

    def tile(self, nbytes: int) -> bool:
        """Whether the noted parts make up a run of ``nbytes``, each byte once."""
        end = 0
        for start, (length, _) in sorted(self._parts.items()):
            if start != end:
                return False
            end += length
        return end == nbytes

    def blocks(self, nbytes: int) -> list[int]:
        """The CRC-32 of each block of a run of ``nbytes`` that the parts tile."""
        crcs = [0] * digest.num_blocks(nbytes)
        for start, (length, crc) in sorted(self._parts.items()):
            index = start // BLOCK_NBYTES
            crcs[index] = digest.combine(crcs[index], crc, length)
        return crcs

    def crc32(self) -> int:
        """The CRC-32 of all parts together, which must tile a run of bytes."""
        value = 0
        for _, (length, crc) in sorted(self._parts.items()):
            value = digest.combine(value, crc, length)
        return value


def _compare(key: str, stretch: Stretch, path: str, blocks: list[int]) -> None:
    found = digest.combine_blocks(blocks, stretch.nbytes)
    if found == stretch.crc32 or stretch.crc32 is None:
        return
    start, stop, expected = 0, stretch.nbytes, stretch.crc32
    if stretch.block_crcs is not None:
        for index, (crc, wanted) in enumerate(zip(blocks, stretch.block_crcs, strict=True)):
            if crc != wanted:
                start, found, expected = index * BLOCK_NBYTES, crc, wanted
                stop = min(start + BLOCK_NBYTES, stretch.nbytes)
                break
    begin, end = stretch.offset + start, stretch.offset + stop
    raise DigestMismatchError(
        f"{path} is damaged: bytes {begin} to {end} of tensor '{key}' have CRC-32 {found:08x}, {expected:08x} was "
        "written; convert another step",
        path=path,
        key=key,
        byte_range=(begin, end),
        expected=expected,
        found=found,
    )


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
