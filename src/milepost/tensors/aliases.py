"""Tensors of a state that overlap in memory or have strides of their own, and new ones that are like them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, MutableMapping

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from milepost.tensors.layout import TensorLeaf, detached_local

Geometry = tuple[int, tuple[int, ...]]
"""The index of a tensor's first element in the memory that it shares, and its strides."""
MAX_SPREAD = 2
"""Memory that new tensors share has no more elements than this many times their own."""
Aliases = Mapping[str, Geometry | None]
"""Keys of tensors that overlap; None for all of them where they are one and the same."""


def find_aliases(leaves: Iterable[TensorLeaf]) -> dict[str, Aliases]:
    """Find the tensors that overlap in memory, by the first key of each group: of one dtype, plain or all alike."""
    by_memory: dict[tuple[torch.device, int], list[TensorLeaf]] = defaultdict(list)
    for leaf in leaves:
        if not leaf.is_part and leaf.local.numel() and (memory := memory_of(leaf.local)) is not None:
            by_memory[memory].append(leaf)
    found = {}
    for sharing in by_memory.values():
        for group in _overlapping(sharing) if len(sharing) > 1 else ():
            aliases = _described(group)
            if aliases is not None:
                found[group[0].key] = aliases
    return found


def find_permuted(leaves: Iterable[TensorLeaf]) -> dict[str, Aliases]:
    """Find tensors whose elements are in another order in memory (channels-last, transposed), each as a group."""
    found: dict[str, Aliases] = {}
    for leaf in leaves:
        if not leaf.is_part and _is_permuted(leaf):
            found[leaf.key] = {leaf.key: (0, leaf.local.stride())}
    return found


def _is_permuted(leaf: TensorLeaf) -> bool:
    local = leaf.local
    is_whole = leaf.spread is None and tuple(local.shape) == leaf.shape and local.numel() > 0
    return is_whole and not local.is_contiguous() and _span(local.shape, local.stride()) == local.numel()


def memory_of(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """Return the identity of a tensor's memory; None without any (meta tensors, wrappers)."""
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None
    return (tensor.device, pointer) if pointer else None


def _overlapping(leaves: Iterable[TensorLeaf]) -> list[list[TensorLeaf]]:
    """Groups of two and more, each in the order of the state."""
    order = {leaf.key: number for number, leaf in enumerate(leaves)}
    groups: list[list[TensorLeaf]] = []
    end = 0
    for leaf in sorted(leaves, key=lambda leaf: leaf.local.data_ptr()):
        if not groups or leaf.local.data_ptr() >= end:
            groups.append([])
        groups[-1].append(leaf)
        end = max(end, leaf.local.data_ptr() + _span(leaf.local.shape, leaf.local.stride()) * leaf.local.itemsize)
    return [sorted(group, key=lambda leaf: order[leaf.key]) for group in groups if len(group) > 1]


def _span(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Elements from the first to the last one of a strided tensor."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _described(group: list[TensorLeaf]) -> Aliases | None:
    first = group[0].local
    alike = {(leaf.local.data_ptr(), tuple(leaf.local.shape), leaf.local.stride(), leaf.spread) for leaf in group}
    if len({leaf.local.dtype for leaf in group} | {leaf.dtype for leaf in group}) > 1:
        return None
    if len(alike) == 1 and not _is_permuted(group[0]):
        return {leaf.key: None for leaf in group}
    if any(leaf.spread is not None or tuple(leaf.local.shape) != leaf.shape for leaf in group):
        return None
    start = min(leaf.local.data_ptr() for leaf in group)
    return {leaf.key: ((leaf.local.data_ptr() - start) // first.itemsize, leaf.local.stride()) for leaf in group}


def join_aliases(aliases: Aliases, tensors: MutableMapping[str, object], apart: Collection[str]) -> None:
    """Replace newly created ``tensors`` by others that overlap as recorded, except those of ``apart``."""
    wanted = {key: tensors.get(key) for key in aliases if key not in apart}
    found = {key: tensor for key, tensor in wanted.items() if isinstance(tensor, torch.Tensor)}
    if not found or len(found) < min(2, len(aliases)):
        return
    first = next(iter(found.values()))
    if len({(type(tensor), tensor.dtype, tensor.device) for tensor in found.values()}) > 1:
        return
    if all(aliases[key] is None for key in found):
        if len({(tensor.shape, _mesh_of(tensor)) for tensor in found.values()}) == 1:
            # A parameter's placements are better than those made up for state of another shape than its own.
            tensors.update(dict.fromkeys(found, min(found.values(), key=_local_numel)))
        return
    if isinstance(first, DTensor) or not all(_fits(found[key], aliases[key]) for key in found):
        return
    ends = [geometry[0] + _span(found[key].shape, geometry[1]) for key in found if (geometry := aliases[key])]
    numel = sum(tensor.numel() for tensor in found.values())
    if max(ends) > (MAX_SPREAD * numel if len(aliases) > 1 else numel):
        return
    memory = torch.empty(max(ends), dtype=first.dtype, device=first.device)
    views: dict[object, torch.Tensor] = {}
    for key, tensor in found.items():
        if (geometry := aliases[key]) is not None:
            view = memory.as_strided(tensor.shape, geometry[1], geometry[0])
            tensors[key] = views.setdefault((tensor.shape, geometry), view)  # one object where it was one


def _fits(tensor: torch.Tensor, geometry: Geometry | None) -> bool:
    """Return whether a recorded geometry is one of such a tensor, and of no absurd size."""
    if geometry is None or len(geometry[1]) != tensor.ndim or geometry[0] < 0 or not tensor.numel():
        return False
    return all(step > 0 or (step == 0 and size == 1) for size, step in zip(tensor.shape, geometry[1], strict=True))


def _mesh_of(tensor: torch.Tensor) -> DeviceMesh | None:
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def _local_numel(tensor: torch.Tensor) -> int:
    return (detached_local(tensor) if isinstance(tensor, DTensor) else tensor).numel()
