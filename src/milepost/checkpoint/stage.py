"""From tensors to the bytes that are written: in place where memory is right already, else through a bounded copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from milepost.checkpoint.layout import TensorLeaf
from milepost.checkpoint.plan import WriteItem
from milepost.format.box import Box
from milepost.format.manifest import BLOCK_NBYTES

SLAB_NBYTES = 8 << 20
"""Tensors that are not contiguous on the CPU are copied in slabs of at most about this size."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes. Shares memory; keeps the tensor alive.

    Goes through the storage, since ``view(torch.uint8)`` does not take every dtype and 0-d tensors.
    """
    raw = torch.empty(0, dtype=torch.uint8)
    offset = tensor.storage_offset() * tensor.element_size()
    raw.set_(tensor.untyped_storage(), offset, (tensor.numel() * tensor.element_size(),))  # type: ignore[call-overload]
    return memoryview(cast("Any", raw.numpy()))


def row_slabs(sizes: Sequence[int], itemsize: int, limit_nbytes: int) -> Iterator[Box]:
    """Cut a row-major region into boxes of at most ``limit_nbytes``, each contiguous in row-major order, ascending.

    A single row of the innermost dim that is longer is cut too.
    """
    dim, inner = len(sizes), itemsize
    while dim > 0 and inner * sizes[dim - 1] <= limit_nbytes:
        dim -= 1
        inner *= sizes[dim]
    if dim == 0:
        yield Box.whole(sizes)
        return
    # Dims below `dim` fit; dim - 1 is cut into steps; dims above are walked one index at a time.
    step = max(1, limit_nbytes // inner)
    for outer in _indices(sizes[: dim - 1]):
        for start in range(0, sizes[dim - 1], step):
            count = min(step, sizes[dim - 1] - start)
            yield Box(
                (*outer, start, *([0] * (len(sizes) - dim))),
                (*([1] * len(outer)), count, *sizes[dim:]),
            )


def _indices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    for head in range(sizes[0]):
        for tail in _indices(sizes[1:]):
            yield (head, *tail)


def region(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The view ``tensor[box]``."""
    return tensor[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]


class TensorBlocks:
    """A ``BlockSource`` that reads the leaves themselves: the caller must not change them meanwhile."""

    def __init__(self, leaves: Mapping[str, TensorLeaf]):
        self._leaves = leaves

    def blocks(self, item: WriteItem) -> Iterator[memoryview]:
        leaf = self._leaves[item.key]
        return tensor_blocks(leaf.view([piece.box for piece in leaf.pieces].index(item.box)), leaf.dtype)


def tensor_blocks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The row-major bytes of a tensor as ``dtype``, in blocks of ``BLOCK_NBYTES``; each valid until the next."""
    if tensor.numel() == 0:
        return
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype != dtype:
        yield from _copied_blocks(tensor, dtype)
        return
    memory = tensor_bytes(tensor)
    for start in range(0, len(memory), BLOCK_NBYTES):
        yield memory[start : start + BLOCK_NBYTES]


def _copied_blocks(view: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Blocks of a tensor that is strided, on another device or of another dtype, through a bounded copy."""
    block = bytearray(BLOCK_NBYTES)
    fill = 0
    for slab in row_slabs(tuple(view.shape), dtype.itemsize, SLAB_NBYTES):
        # `contiguous()` would return the view itself when it is one already; a copy on the CPU is what is wanted.
        data = tensor_bytes(region(view, slab).to(device="cpu", dtype=dtype).contiguous())
        start = 0
        while start < len(data):
            count = min(BLOCK_NBYTES - fill, len(data) - start)
            block[fill : fill + count] = data[start : start + count]
            fill += count
            start += count
            if fill == BLOCK_NBYTES:
                yield memoryview(block)
                fill = 0
    if fill:
        yield memoryview(block)[:fill]
