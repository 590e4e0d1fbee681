"""Record the placements of a state's DTensors, and create new ones on a mesh of this run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

PLAIN = "plain"
"""Recorded for state of an optimizer that is no DTensor although others are."""
_SHARD = re.compile(r"(?:S|SS(\d{1,9})x)(\d{1,3})")


def describe_placements(tensor: DTensor) -> str | None:
    """Return the placements of a DTensor, with its mesh's axes and sizes; None for kinds that are not recorded."""
    placed = [_described(placement) for placement in tensor.placements]
    if None in placed:
        return None
    names = tensor.device_mesh.mesh_dim_names
    return json.dumps([list(names) if names else None, list(tensor.device_mesh.shape), placed])


def _described(placement: Placement) -> str | None:
    if isinstance(placement, _StridedShard):
        return f"SS{placement.split_factor}x{placement.dim}"
    if isinstance(placement, Shard):
        return f"S{placement.dim}"
    return "R" if isinstance(placement, Replicate) else None


def make_sharded(
    description: str, meshes: Sequence[DeviceMesh], shape: Sequence[int], dtype: torch.dtype
) -> DTensor | None:
    """Create a DTensor with the placements described, on one of ``meshes`` with such axes; None if there is none."""
    try:
        names, sizes, placed = json.loads(description)
        placements = [_placement(str(one), len(shape)) for one in placed]
    except (ValueError, TypeError):
        return None
    mesh = _find_mesh(meshes, tuple(names) if names else None, tuple(sizes), len(placements))
    if mesh is None:
        return None
    local_shape, _ = compute_local_shape_and_global_offset(tuple(shape), mesh, placements)
    whole = torch.empty(tuple(shape), device="meta")
    return DTensor.from_local(
        torch.empty(local_shape, dtype=dtype, device=mesh.device_type),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _placement(text: str, num_dims: int) -> Placement:
    found = _SHARD.fullmatch(text)
    if found is None and text != "R":
        raise ValueError(text)
    if found is None:
        return Replicate()
    split, dim = found.groups()
    if int(dim) >= num_dims:
        raise ValueError(text)
    return _StridedShard(int(dim), split_factor=int(split)) if split else Shard(int(dim))


def _find_mesh(
    meshes: Iterable[DeviceMesh], names: tuple[str, ...] | None, sizes: tuple[int, ...], ndim: int
) -> DeviceMesh | None:
    """Find the mesh with these axes: by their names, whatever the sizes.

    Axes without names are matched by their number, preferably with the same sizes.
    """
    known = list(dict.fromkeys(meshes))
    if names is None:
        alike = [mesh for mesh in known if mesh.ndim == ndim]
        return next((mesh for mesh in alike if tuple(mesh.shape) == sizes), alike[0] if len(alike) == 1 else None)
    for mesh in known:
        if mesh.mesh_dim_names == names:
            return mesh
    return next((mesh[names] for mesh in known if set(names) < set(mesh.mesh_dim_names or ())), None)


def meshes_of(tensors: Iterable[torch.Tensor]) -> list[DeviceMesh]:
    """Return the meshes of the DTensors among ``tensors``, each once."""
    return list(dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)))
