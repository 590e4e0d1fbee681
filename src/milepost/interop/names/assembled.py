"""Read one program's tensors as another's, by recipes of ``rules`` over the stored ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from milepost.format.box import Box
from milepost.interop.names.rules import MappedBox, Op, Recipe
from milepost.interop.weights.boxes import Array, Readable, TensorInfo


class Assembled:
    """Tensors assembled by ``recipes`` from those of ``base``, with other names and order of elements."""

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

    def _read_piece(self, piece: MappedBox, part: Box, out: Array) -> None:
        """Fill ``out`` with the box ``part`` of a piece (in the piece's coordinates)."""
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

    def _read_heads(self, piece: MappedBox, offsets: tuple[int, ...], sizes: tuple[int, ...], target: Array) -> None:
        """Read the heads that contain the requested rows, and reorder the rows of each."""
        head = piece.head_dim
        lead = next(dim for dim, size in enumerate(piece.source.sizes) if size != 1)  # heads are along the first other
        outer, offsets, sizes = offsets[:lead], offsets[lead:], sizes[lead:]
        target = _reshaped_view(target, sizes)
        first = offsets[0] // head * head
        stop = -(-(offsets[0] + sizes[0]) // head) * head
        raw = np.empty((stop - first, *sizes[1:]), target.dtype)
        wanted = Box((*outer, first, *offsets[1:]), ((1,) * lead + raw.shape)).shifted(piece.source.offsets)
        self._base.read_into(piece.source_key, wanted, raw.reshape(wanted.sizes))
        inner = (2, head // 2) if piece.op is Op.TO_PAIRS else (head // 2, 2)
        reordered = raw.reshape(-1, *inner, *sizes[1:]).swapaxes(1, 2)  # (heads, ., ., columns)
        if sizes[0] == raw.shape[0] and target.flags.c_contiguous:
            target.reshape(reordered.shape)[...] = reordered
        else:
            begin = offsets[0] - first
            target[...] = reordered.reshape(raw.shape)[begin : begin + sizes[0]]


def _swap(values: tuple[int, ...]) -> tuple[int, ...]:
    return (*values[:-2], values[-1], values[-2])


def _reshaped_view(array: Array, sizes: tuple[int, ...]) -> Array:
    """Return a view of ``array`` with leading dims of size 1 added or dropped, for any layout."""
    drop = array.ndim - len(sizes)
    view: Array = array[(0,) * drop] if drop > 0 else array[(np.newaxis,) * -drop]
    return view
