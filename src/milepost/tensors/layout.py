"""Convert tensors to boxes: the only module that handles DTensor, meshes and placements.

A rank's part of a tensor is a list of *pieces*: a box in the global tensor and the region of the rank's local tensor
that holds it. An evenly sharded DTensor is one piece; a ``_StridedShard`` (FSDP over TP on one dim) may be several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from milepost.errors import FormatError, SaveError
from milepost.format.box import Box
from milepost.format.dtype import DTYPES
from milepost.tensors.plan import Mesh, Spread, TensorSpec

Interval = tuple[int, int]
"""Start and length along one dim."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the global tensor, and the region ``local`` of the rank's local tensor that holds it, of equal sizes."""

    box: Box
    local: Box


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A rank's part of a tensor that is sharded unlike any DTensor: ``pieces`` map ``local`` to the global tensor."""

    local: torch.Tensor
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype


@dataclass(frozen=True, slots=True, eq=False)
class TensorLeaf:
    """A tensor of a state dict as one rank sees it.

    ``local`` shares memory with the caller's tensor, is detached, and is a plain tensor on any device. ``dtype`` is the
    stored one; ``local`` is cast to it when it is staged.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    local: torch.Tensor
    is_part: bool = False
    """True for a part of a composed tensor, which must keep its own dtype."""
    shard_of: str = ""
    """Key of the DTensor, for an inner tensor that each of its shards has whole (a table, a scale); otherwise empty."""
    spread: Spread | None = None
    """Placement on the mesh's ranks, for a DTensor with elements."""

    @property
    def spec(self) -> TensorSpec:
        boxes = (self.pieces[0].box,) if len(self.pieces) == 1 else tuple(p.box for p in self.pieces)
        return TensorSpec(self.key, dtype_name(self.dtype), self.shape, boxes, self.spread)

    def view_of(self, box: Box) -> torch.Tensor:
        """The part of ``local`` that holds the piece with this box; shares memory."""
        is_only = len(self.pieces) == 1 and self.pieces[0].box == box
        return self.view(0 if is_only else [piece.box for piece in self.pieces].index(box))

    def view(self, piece: int) -> torch.Tensor:
        """A view of the part of ``local`` that holds a piece."""
        region = self.pieces[piece].local
        if region.sizes == tuple(self.local.shape):
            return self.local
        return self.local[region.index()]


def arrived(tensor: torch.Tensor) -> torch.Tensor:
    """Wait for the result of an asynchronous collective; return any other tensor unchanged."""
    if isinstance(tensor, AsyncCollectiveTensor):
        found: torch.Tensor = tensor.wait()
        return found
    return tensor


def stored_as(leaf: TensorLeaf, dtype: torch.dtype) -> TensorLeaf:
    """The leaf, stored in ``dtype`` if it has a floating-point dtype and is not a part of another tensor."""
    return replace(leaf, dtype=dtype) if leaf.dtype.is_floating_point and not leaf.is_part else leaf


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """``bfloat16`` -> ``torch.bfloat16``.

    Raises:
        FormatError: this torch has no dtype of that name; a newer one stored the tensor.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise FormatError(f"torch {torch.__version__} has no dtype {name}: load this checkpoint with a newer torch")
    return found


def tensor_leaf(key: str, tensor: torch.Tensor | Placed) -> TensorLeaf:
    """The boxes that this rank holds of ``tensor``.

    Raises:
        SaveError: a kind of tensor whose bytes can't be stored as a box (sparse, quantized, meta, wrapper
            subclasses, partial sums, ...).
    """
    if isinstance(tensor, Placed):
        _check_kind(key, tensor.local)
        return TensorLeaf(key, tensor.dtype, tensor.shape, tensor.pieces, tensor.local.detach())
    if isinstance(tensor, DTensor):
        return _dtensor_leaf(key, tensor)
    _check_kind(key, tensor)
    shape, pieces = _whole(tensor.shape)
    return TensorLeaf(key, tensor.dtype, shape, pieces, tensor.detach())


@lru_cache(maxsize=4096)  # a model has few shapes
def _whole(size: torch.Size) -> tuple[tuple[int, ...], tuple[Piece]]:
    """Return the shape and the only piece of a tensor that a rank holds whole."""
    shape = tuple(size)
    box = Box.whole(shape)
    return shape, (Piece(box, box),)


def _dtensor_leaf(key: str, tensor: DTensor) -> TensorLeaf:
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    local = detached_local(tensor)
    _check_kind(key, local)
    shape = tuple(tensor.shape)
    if coordinate is None:  # this rank is not in the tensor's mesh
        spread = spread_of(mesh, tensor.placements) if tensor.numel() else None
        return TensorLeaf(key, tensor.dtype, shape, (), local, spread=spread)
    if any(isinstance(p, Partial) for p in tensor.placements):
        raise SaveError(
            f"{key} is a DTensor with a pending sum (placements {tensor.placements}); redistribute it first", key=key
        )
    if tensor.numel() == 0:  # nothing to place, but the tensor must be stored
        return TensorLeaf(key, tensor.dtype, shape, (Piece(Box.whole(shape), Box.whole(shape)),), local)
    pieces = shard_pieces(shape, tuple(mesh.shape), coordinate, tensor.placements)
    held = sum(p.box.numel for p in pieces)
    if held != local.numel():
        raise SaveError(
            f"{key}: placements {tensor.placements} on mesh {tuple(mesh.shape)} give rank coordinate "
            f"{tuple(coordinate)} {held} elements, but its local tensor {list(local.shape)} has {local.numel()}",
            key=key,
        )
    return TensorLeaf(key, tensor.dtype, shape, pieces, local, spread=spread_of(mesh, tensor.placements))


def detached_local(tensor: DTensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor, detached.

    ``tensor.detach().to_local()`` would take 0.3 ms per tensor, for DTensor's dispatcher and autograd.
    """
    return arrived(tensor._local_tensor.detach())


_meshes: WeakKeyDictionary[DeviceMesh, Mesh] = WeakKeyDictionary()
"""Cached: thousands of tensors share a mesh of thousands of ranks."""


def spread_of(mesh: DeviceMesh, placements: Sequence[Placement]) -> Spread:
    """Describe the placement of a DTensor on the ranks of ``mesh``."""
    known = _meshes.get(mesh)
    if known is None:
        known = _meshes[mesh] = Mesh.of(tuple(mesh.shape), mesh.mesh.flatten().tolist())
    return _spread(known, axis_cuts(placements))


@lru_cache(maxsize=256)
def _spread(mesh: Mesh, cuts: tuple[tuple[int, int] | None, ...]) -> Spread:
    """Return one object for equal values: plans recognise it without comparing."""
    return Spread(mesh, cuts)


def axis_cuts(placements: Sequence[Placement]) -> tuple[tuple[int, int] | None, ...]:
    """For each axis of a mesh, the sharded dim and the number of parts to split it into first; None for replicas."""
    return tuple(
        (p.dim, int(p.split_factor) if isinstance(p, _StridedShard) else 1)
        if isinstance(p, (Shard, _StridedShard))
        else None
        for p in placements
    )


def can_be_boxes(tensor: torch.Tensor) -> bool:
    """Return whether the elements of a tensor are stored as boxes (for a meta tensor: would be, if it had data)."""
    local = detached_local(tensor) if isinstance(tensor, DTensor) else arrived(tensor.detach())
    return (
        local.layout == torch.strided
        and not local.is_quantized
        and not is_traceable_wrapper_subclass(cast("object", local))
        and not local.is_conj()
        and not local.is_neg()
    )


def _check_kind(key: str, tensor: torch.Tensor) -> None:
    problem = problem_of(tensor)
    if problem:
        pass
    elif tensor.layout != torch.strided:
        problem = f"a {tensor.layout} tensor; store its parts (indices, values) as tensors of their own"
    elif tensor.is_quantized:
        problem = "a quantized tensor; store its integers, scales and zero points as tensors of their own"
    elif is_traceable_wrapper_subclass(cast("object", tensor)):
        problem = f"a {type(tensor).__name__} wrapped around other tensors; unwrap it first"
    elif tensor.is_conj() or tensor.is_neg():
        problem = "a lazily conjugated or negated view; call resolve_conj() and resolve_neg() first"
    if problem:
        raise SaveError(f"{key} is {problem}", key=key)


def problem_of(tensor: torch.Tensor) -> str:
    """Explain why a tensor can't be stored in any form, and what to write instead; empty if it can."""
    if tensor.is_nested:
        return "a nested tensor; store list(tensor.unbind())"
    if tensor.layout != torch.strided and str(tensor.layout) == "torch._mkldnn":
        return "a tensor in the layout of MKLDNN; store tensor.to_dense()"
    if tensor.is_meta:
        return "a meta tensor without data; initialise it first"
    if type(tensor).__torch_dispatch__ is not _NO_DISPATCH and not is_traceable_wrapper_subclass(
        cast("object", tensor)
    ):
        try:
            has_data = tensor.untyped_storage().data_ptr() != 0 or not tensor.numel()
        except RuntimeError:
            has_data = False
        if not has_data:
            return f"a {type(tensor).__name__}, whose elements are not its own; store the tensors that it is made of"
    if not tensor.is_quantized and dtype_name(tensor.dtype) not in DTYPES:
        return f"of dtype {dtype_name(tensor.dtype)}, of which torch has no data; store tensor.view(torch.uint8)"
    return ""


_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


def shard_pieces(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> tuple[Piece, ...]:
    """The pieces of a tensor of ``shape`` at ``coordinate`` of a mesh, for DTensor ``placements``.

    Each mesh dim shards the result of those before it (``torch.chunk`` semantics: the last shards may be smaller or
    empty). The order is left to right, except for a ``_StridedShard`` (FSDP over TP), whose ``split_factor`` means that
    mesh dims to its right are applied first. This agrees with ``fully_shard`` and ``full_tensor()``, also for uneven
    sizes. With a ``split_factor`` that fits no order, the dim is split into that many parts, and this rank has its
    chunk of each.
    """
    intervals: list[list[Interval]] = [[(0, size)] for size in shape]
    for mesh_dim, dim, split_factor in _cuts(mesh_shape, placements):
        whole = intervals[dim]
        taken: list[Interval] = []
        for part in range(split_factor):
            taken += _chunk(_chunk(whole, split_factor, part), mesh_shape[mesh_dim], coordinate[mesh_dim])
        intervals[dim] = _merge(taken)
    return tuple(_product(intervals))


def _cuts(mesh_shape: Sequence[int], placements: Sequence[Placement]) -> Iterator[tuple[int, int, int]]:
    """The cuts in order: the mesh dim, the tensor's dim, and the number of parts that it is split into first.

    The order is decoded as in ``DTensorSpec._maybe_convert_StridedShard_to_shard_order``: the mesh dims to the right
    that go before a ``_StridedShard`` are those whose sizes multiply to its ``split_factor``.
    """
    orders: dict[int, list[int]] = {}
    factors: dict[int, int] = {}
    decoded = True
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, (Shard, _StridedShard)):
            raise TypeError(f"placement {placement!r} does not place a stored tensor")
        factors[mesh_dim] = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        order = orders.setdefault(placement.dim, [])
        product, position = 1, 0
        while product != factors[mesh_dim] and position < len(order):
            product *= mesh_shape[order[position]]
            position += 1
        decoded = decoded and product == factors[mesh_dim]
        order.insert(position, mesh_dim)
    for dim, order in sorted(orders.items()):
        for mesh_dim in order if decoded else sorted(order):
            yield mesh_dim, dim, 1 if decoded else factors[mesh_dim]


def _chunk(intervals: Sequence[Interval], num_chunks: int, index: int) -> list[Interval]:
    """Chunk ``index`` of the concatenated ``intervals``, with the semantics of ``torch.chunk``."""
    total = sum(length for _, length in intervals)
    size = -(-total // num_chunks)
    start, stop = min(size * index, total), min(size * (index + 1), total)
    out = []
    position = 0
    for begin, length in intervals:
        low, high = max(start, position), min(stop, position + length)
        if low < high:
            out.append((begin + low - position, high - low))
        position += length
    return out


def _merge(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, length in intervals:
        if merged and merged[-1][0] + merged[-1][1] == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        elif length:
            merged.append((start, length))
    return merged


def _product(intervals: Sequence[Sequence[Interval]]) -> Iterator[Piece]:
    placed = []
    for dim in intervals:
        position = 0
        with_local = []
        for start, length in dim:
            with_local.append((start, position, length))
            position += length
        placed.append(with_local)
    for combination in itertools.product(*placed):
        sizes = tuple(length for _, _, length in combination)
        yield Piece(
            Box(tuple(start for start, _, _ in combination), sizes),
            Box(tuple(position for _, position, _ in combination), sizes),
        )
