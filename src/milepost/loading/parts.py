"""Load composed tensors: into the parts of the existing one, or else into a new one of the same class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from milepost.errors import ConfigError
from milepost.format.manifest import TensorEntry
from milepost.loading.target import Target
from milepost.tensors.layout import Piece, Placed, torch_dtype
from milepost.tensors.parts import (
    Cut,
    TensorForm,
    TensorParts,
    comes_apart,
    leaves,
    local_of,
    num_shards,
    place_rows,
    put_together,
    rows_at,
    shard_of,
    take_apart,
    take_apart_as,
)
from milepost.tensors.placements import make_sharded
from milepost.tensors.tree import Node, Ref, refs

MakeTensor = Callable[[str, TensorEntry], torch.Tensor]
LikeOf = Callable[[str], Any]


def want_node(target: Target, node: Node, make: MakeTensor | None = None, like_of: LikeOf = lambda key: None) -> None:
    """Request everything below a node of the tree, as it was stored.

    ``make`` creates the tensors to read into; ``like_of`` returns a model for composed tensors.
    """
    make = make if make is not None else target.new_tensor
    if isinstance(node, TensorParts):
        want_parts(target, node, like=like_of(node.key))
    elif isinstance(node, Mapping):
        for part in node.values():
            want_node(target, part, make, like_of)
    elif isinstance(node, list | tuple):
        for part in node:
            want_node(target, part, make, like_of)
    else:
        for key in refs(node):
            entry = target.entry(key)
            target.values[key] = None if entry is None else make(key, entry)


def want_parts(target: Target, node: TensorParts, *, live: Any = None, like: Any = None) -> bool:
    """Request a composed tensor, read into ``live`` if that has the stored form; returns whether it has.

    Otherwise a new one is built in the node's place, sharded and placed like ``like`` (for instance the parameter of an
    optimizer state), or complete on the CPU. If that is impossible, the parts are returned as a dict, or a mismatch is
    recorded.
    """
    like = live if isinstance(live, torch.Tensor) else like
    if isinstance(like, torch.Tensor) and tuple(like.shape) != node.form.shape:
        like = None if live is None else like
    if node.form.is_by_shard:
        return _want_shard(target, node, live, like)
    if isinstance(live, torch.Tensor) and comes_apart(live) and _want_in_place(target, node, live):
        node.tensor = live
        return True
    try:
        node.tensor = _fresh(target, node, like)
    except ConfigError as error:
        if target.keeps_parts:
            target.note(f"left as a dict of its parts ({error.message})", [node.key])
            for part in node.values():
                want_node(target, part)
        else:
            target.mismatched.append(f"{node.key}: {error.message}")
            target.leave(node)
    return False


def want_into_wrapper(target: Target, key: str, live: torch.Tensor) -> bool:
    """Request a plain stored tensor, read into a ``live`` one that only wraps a tensor; returns whether it does."""
    if target.entry(key) is None or not comes_apart(live):
        return False
    found = list(leaves(take_apart(key, live)))
    if len(found) != 1:
        return False
    _, part = found[0]
    if tuple(part.shape) != tuple(live.shape) or part.dtype != live.dtype:
        return False
    target.want(key, part, live=True)
    return True


def _want_in_place(target: Target, node: TensorParts, live: torch.Tensor) -> bool:
    """Request the parts of ``live`` if they are those that were stored, otherwise nothing."""
    if local_of(live).is_meta:
        return False
    found = take_apart_as(node.form, node.key, live)
    if found is None or not _same_form(found, node) or tuple(live.shape) != node.form.shape:
        return False
    parts = dict(leaves(found))
    stored = dict(leaves(node))
    entries = {path: target.entry(ref.key) for path, ref in stored.items() if isinstance(ref, Ref)}
    if parts.keys() != entries.keys() or not all(_is_alike(parts[path], entry) for path, entry in entries.items()):
        return False
    for path, ref in stored.items():
        target.want(ref.key, parts[path], live=True)
    return True


def _same_form(one: TensorParts, node: Node) -> bool:
    if not isinstance(node, TensorParts):
        return False
    if (one.form.class_name, one.form.context) != (node.form.class_name, node.form.context):
        return False
    return all(_same_form(part, node.get(name)) for name, part in one.items() if isinstance(part, TensorParts))


def _is_alike(part: Any, entry: TensorEntry | None) -> bool:
    return entry is not None and part.dtype == torch_dtype(entry.dtype) and tuple(part.shape) == entry.shape


# ---- new ones ----


def _fresh(target: Target, node: TensorParts, like: Any) -> torch.Tensor:
    """Create a tensor of the stored form and request its parts; raises ConfigError if that is impossible."""
    form = node.form
    device = _device_of(like)
    if not isinstance(like, DTensor):
        return _put(target, node, form, None, form.shape, device)
    mesh, coordinate = like.device_mesh, like.device_mesh.get_coordinate()
    if num_shards(like) == 1:
        local = _put(target, node, form, None, form.shape, device)
    else:
        rows = rows_at(form.shape, tuple(mesh.shape), coordinate, like.placements) if coordinate is not None else None
        if rows is None or not form.cuts:
            raise ConfigError(
                f"a tensor of class {form.kind} was saved {'by rows' if form.cuts else 'whole'}, and can't be cut for "
                f"the placements {like.placements} of this run"
            )
        local = _put(target, node, form, rows, (rows.box.sizes[0], *form.shape[1:]), device)
    stride = torch.empty(form.shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=torch.Size(form.shape), stride=stride
    )


def _device_of(like: Any) -> torch.device:
    local = local_of(like) if isinstance(like, torch.Tensor) else None
    return local.device if local is not None and not local.is_meta else torch.device("cpu")


def _put(
    target: Target,
    node: TensorParts,
    form: TensorForm,
    rows: Piece | None,
    shape: tuple[int, ...],
    device: torch.device,
    prefix: str = "",
) -> torch.Tensor:
    """Compose new parts and request them, for ``rows`` of the tensor or all of it."""
    parts: dict[str, torch.Tensor] = {}
    wanted: list[tuple[str, torch.Tensor | Placed]] = []
    for name, part in node.items():
        if isinstance(part, TensorParts):
            inner = (rows.box.sizes[0], *part.form.shape[1:]) if rows is not None else part.form.shape
            parts[name] = _put(target, part, part.form, rows, inner, device, f"{prefix}{name}.")
            continue
        key = part.key if isinstance(part, Ref) else f"{node.key}.{name}"
        entry = target.entry(key)
        if entry is None:
            raise ConfigError(
                f"{key}, of which a tensor of class {form.kind} is made, is not a tensor in the checkpoint"
            )
        tensor, placed = _empty(key, entry, form, form.cuts.get(name, "whole"), rows, device)
        parts[name] = tensor
        wanted.append((key, placed))
    made = put_together(form, parts, shape)
    for key, placed in wanted:
        target.want(key, placed, live=False)
    return made


def _empty(
    key: str, entry: TensorEntry, form: TensorForm, cut: Cut, rows: Piece | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | Placed]:
    """Create a part, with its place in the stored one."""
    dtype = torch_dtype(entry.dtype)
    if rows is None or cut == "whole":
        tensor = torch.empty(entry.shape, dtype=dtype, device=device)
        return tensor, tensor
    num_rows = form.shape[0]
    size, rest = entry.shape[0], entry.shape[1:]
    begin, count = rows.box.offsets[0] * size, rows.box.sizes[0] * size
    if begin % num_rows or count % num_rows:
        raise ConfigError(
            f"{key}, of which a tensor of class {form.kind} is made, has {size} rows for the {num_rows} of the tensor, "
            f"and can't be cut for rows {rows.box.offsets[0]} to {rows.box.offsets[0] + rows.box.sizes[0]} of this rank"
        )
    tensor = torch.empty((count // num_rows, *rest), dtype=dtype, device=device)
    return tensor, place_rows(tensor, rows, num_rows)


# ---- by shard ----


def is_by_shard(node: Node) -> bool:
    """Return whether a node is a DTensor whose shards were stored separately."""
    return isinstance(node, TensorParts) and node.form.is_by_shard


def _want_shard(target: Target, node: TensorParts, live: Any, like: Any) -> bool:
    """Request this rank's shard of a DTensor whose shards were stored separately; returns whether in place."""
    if like is None and live is None and (text := target.placement_of(node.key)) is not None:
        like = make_sharded(text, target.meshes, node.form.shape, node.form.dtype)
    if like is None and live is None:
        for part in node.values():
            want_node(target, part)
        return False
    if not isinstance(like, DTensor) or num_shards(like) != node.form.context:
        here = f"{num_shards(like)} shards" if isinstance(like, DTensor) else "one tensor"
        target.mismatched.append(
            f"{node.key}: {node.form.context} shards that can't be resharded in the checkpoint, {here} here (resume on "
            "the same degrees of parallelism)"
        )
        target.leave(node)
        return False
    shard = shard_of(like)
    for name, part in node.items():
        if name != shard:
            target.leave(part)
    if shard is None or shard not in node:
        node.tensor = like
        return True
    part, local, is_in_place = node[shard], local_of(like), False
    if isinstance(part, TensorParts):
        is_in_place = want_parts(target, part, live=local if isinstance(live, DTensor) else None, like=local)
        made = part.tensor
    elif isinstance(live, DTensor) and not comes_apart(local):
        target.want(part.key, local, live=True)
        is_in_place, made = True, local
    else:
        entry = target.entry(part.key)
        dtype = torch_dtype(entry.dtype) if entry is not None else local.dtype
        made = torch.empty(entry.shape if entry is not None else local.shape, dtype=dtype, device=_device_of(like))
        target.want(part.key, made, live=False)
    if is_in_place:
        node.tensor = live
    elif made is not None:
        node.tensor = DTensor.from_local(
            made, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    return is_in_place
