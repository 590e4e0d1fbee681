"""Follow the elements of tensors through a program that only moves them, without data.

On the meta device this costs nothing. A view shows by its strides which elements of its memory it has; a copy or a
concatenation gets memory of its own, of which is noted what each part was copied from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from milepost.format.box import Box
from milepost.interop.names.rules import Op


@dataclass(frozen=True, slots=True)
class Moved:
    """A box of a result and the box of an original with the same elements; ``op`` converts the result's to the
    original's (of heads of ``head_dim`` rows)."""

    box: Box
    key: str
    original: Box
    op: Op = Op.SAME
    head_dim: int = 0


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, notes from what the copies of ``originals`` (contiguous, on the meta device) are made."""

    def __init__(self, originals: Mapping[str, torch.Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys = {_memory(tensor): key for key, tensor in originals.items()}
        self._originals = originals
        self._made: dict[int, tuple[torch.Tensor, list[tuple[Box, torch.Tensor]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            (copied,) = args
            return copied.view(copied.shape) if copied.is_contiguous() else self._joined([copied], 0)
        if func is torch.ops.aten.cat.default:
            return self._joined(*args, **(kwargs or {}))
        if func is torch.ops.aten.stack.default:
            tensors, *dims = args
            dim = dims[0] if dims else (kwargs or {}).get("dim", 0)
            return self._joined([tensor.unsqueeze(dim) for tensor in tensors], dim)
        return func(*args, **(kwargs or {}))

    def _joined(self, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """Return a new tensor that is ``tensors`` along ``dim``."""
        first = tensors[0]
        dim %= first.dim()
        sizes = list(first.shape)
        sizes[dim] = sum(tensor.shape[dim] for tensor in tensors)
        made = torch.empty(sizes, dtype=first.dtype, device="meta")
        parts, start = [], 0
        for tensor in tensors:
            offsets = tuple(start if number == dim else 0 for number in range(first.dim()))
            parts.append((Box(offsets, tuple(tensor.shape)), tensor))
            start += tensor.shape[dim]
        self._made[_memory(made)] = made, parts
        return made

    def moves(self, result: torch.Tensor) -> list[Moved] | None:
        """Return from which elements ``result`` is made; None if some are not an original's, or are otherwise moved."""
        memory = _memory(result)
        if memory in self._keys:
            key = self._keys[memory]
            return list(_within(key, tuple(self._originals[key].shape), result)) or None
        if memory not in self._made:
            return None
        made, parts = self._made[memory]
        whole = tuple(made.shape)
        found = list(_within("", whole, result))
        if not found:
            return self._heads(result, parts)
        (place,) = found
        moves: list[Moved] = []
        for box, part in parts:
            common = box.intersect(place.original)
            if common is None:
                continue
            inner = self.moves(part[common.relative_to(box).index()])
            placed = _placed(inner or (), common.relative_to(place.original), place, result.dim())
            moves += placed
            if inner is None or len(placed) != len(inner):
                return None
        return moves

    def _heads(self, result: torch.Tensor, parts: Sequence[tuple[Box, torch.Tensor]]) -> list[Moved] | None:
        """Return the moves of a tensor whose rows were exchanged within heads: by a view as [.., x, y, ..], transposed.

        Source: ``PermuteForRope`` and ``Interleave`` of transformers' ``core_model_loading``.
        """
        (_, part), *others = parts
        key = self._keys.get(_memory(part))
        if others or key is None or part.storage_offset() or not result.is_contiguous():
            return None
        shape = tuple(self._originals[key].shape)
        if tuple(result.shape) != shape or part.numel() != result.numel():
            return None
        for dim in range(len(shape)):
            inner, rest = math.prod(shape[dim + 1 :]), len(shape) - dim - 1
            *outer, y, x = tuple(part.shape)[: part.dim() - rest]
            lead = outer[dim:]
            if len(lead) > 1 or tuple(outer[:dim]) != shape[:dim] or math.prod((*lead, y, x)) != shape[dim]:
                continue
            # Row j * x + i of the result is the original's row i * y + j.
            strides = _strides(shape)
            heads = [x * y * inner] if lead else []
            wanted = [*strides[:dim], *heads, inner, y * inner, *strides[dim + 1 :]]
            if list(part.stride()) == wanted and 2 in (x, y):
                return list(_by_outer(key, shape, dim, Op.TO_PAIRS if y == 2 else Op.TO_HALVES, x * y))
        return None


def _by_outer(key: str, shape: tuple[int, ...], dim: int, op: Op, head_dim: int) -> Iterator[Moved]:
    """Yield a move for each index of the dims before ``dim``, along which the heads are."""
    for outer in product(*map(range, shape[:dim])):
        box = Box((*outer, *(0 for _ in shape[dim:])), (*(1 for _ in outer), *shape[dim:]))
        yield Moved(box, key, box, op, head_dim)


def _placed(inner: Iterable[Moved], at: Box, place: Moved, ndim: int) -> list[Moved]:
    """Return moves of a part as moves of the result: ``at`` is the part's place in it, before a transposition."""
    found = []
    for move in inner:
        box = move.box.shifted(at.offsets)
        lead = len(box.sizes) - ndim
        if any(size != 1 for size in box.sizes[: max(lead, 0)]):
            continue
        box = Box((0,) * -lead + box.offsets[max(lead, 0) :], (1,) * -lead + box.sizes[max(lead, 0) :])
        if place.op is Op.TRANSPOSED:
            if move.op not in (Op.SAME, Op.TRANSPOSED):
                continue
            op = Op.SAME if move.op is Op.TRANSPOSED else Op.TRANSPOSED
            move = replace(move, op=op)
            box = Box(_swapped(box.offsets), _swapped(box.sizes))
        found.append(replace(move, box=box))
    return found


def _within(key: str, shape: tuple[int, ...], view: torch.Tensor) -> Iterator[Moved]:
    """Yield the box of a row-major tensor of ``shape`` that ``view`` shows, perhaps with the last two dims exchanged.

    Yields nothing if it shows something else.
    """
    strides, sizes, order = _strides(shape), [1] * len(shape), list[int]()
    whole = Box.whole(tuple(view.shape))
    if view.numel() == 0:
        if tuple(view.shape) == shape:
            yield Moved(whole, key, whole)
        return
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            continue
        dims = [dim for dim, own in enumerate(strides) if own == stride and shape[dim] > 1 and dim not in order]
        if not dims:
            return
        order.append(dims[0])
        sizes[dims[0]] = size
    offsets, rest = list[int](), int(view.storage_offset())
    for stride in strides:
        offset, rest = divmod(rest, stride)
        offsets.append(offset)
    box = Box(tuple(offsets), tuple(sizes))
    shown, op = tuple(sizes), Op.SAME
    if order != sorted(order):
        shown, op = _swapped(tuple(sizes)), Op.TRANSPOSED
        if order[:-2] != sorted(order[:-2]) or sorted(order[-2:]) != [len(shape) - 2, len(shape) - 1]:
            return
    if box.inside(shape) and _without_leading_ones(shown) == _without_leading_ones(view.shape):
        yield Moved(whole, key, box, op)


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _swapped(values: tuple[int, ...]) -> tuple[int, ...]:
    return (*values[:-2], values[-1], values[-2])


def _without_leading_ones(sizes: Sequence[int]) -> tuple[int, ...]:
    first = next((number for number, size in enumerate(sizes) if size != 1), len(sizes))
    return tuple(sizes[first:])


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
