"""Composed tensors (subclasses with ``__tensor_flatten__``): decomposed when saved, and rebuilt when loaded.

Each inner tensor is stored under its own key below the composed tensor's, so that every reader finds it. The class and
its other data are recorded with the structure, as plain data. A load only rebuilds classes that the program has already
imported; it imports nothing, and calls nothing that the data names but the class itself.

A DTensor of composed tensors is stored by rows if the class supports slicing: a slice shows which inner tensors follow
the rows and which are the same on every rank (lookup tables). Otherwise each shard is stored separately.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from milepost.errors import ConfigError, FormatError, SaveError
from milepost.format.box import Box
from milepost.tensors.layout import Piece, Placed, arrived, shard_pieces
from milepost.tensors.part_context import from_plain, has_functions, to_plain
from milepost.tensors.registry import register_reader, register_value
from milepost.tensors.value_types import require

Cut = Literal["as outer", "by rows", "whole"]
"""Placement of an inner tensor on the ranks of the outer DTensor: like it, proportional to its rows, or replicated."""


@dataclass(frozen=True, slots=True)
class TensorForm:
    """The form of a tensor, apart from its parts."""

    class_name: str
    """``module:qualified name``; empty for a DTensor whose shards are stored separately."""
    context: Any
    """The class's data other than tensors, as plain data (see :func:`to_plain`); or the number of shards."""
    shape: tuple[int, ...]
    """Shape of the outer tensor, over all ranks."""
    dtype: torch.dtype
    cuts: Mapping[str, Cut] = dataclasses.field(default_factory=dict)
    """Placement of each attribute within a DTensor; empty without one."""

    @property
    def is_by_shard(self) -> bool:
        """True if the parts are the shards of a DTensor."""
        return not self.class_name

    @property
    def kind(self) -> str:
        """The name for messages."""
        return self.class_name.replace(":", ".") if self.class_name else f"DTensor of {self.context} unlike shards"


class TensorParts(dict[str, Any]):
    """The parts of a tensor by attribute, in a state dict or, as nodes, in a checkpoint's tree."""

    def __init__(self, form: TensorForm, parts: Any = (), *, key: str = ""):
        super().__init__(parts)
        self.form = form
        self.key = key
        """For a node: the key of its tensor."""
        self.tensor: torch.Tensor | None = None
        """For a node: its replacement once its parts are read."""


def comes_apart(tensor: object) -> bool:
    """Return whether a tensor is composed of others, possibly inside a DTensor."""
    if not isinstance(tensor, torch.Tensor) or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    local = local_of(tensor)
    return _is_made_of_others(local) and not local.is_nested


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor, detached; any other tensor as it is."""
    return arrived(tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor)


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a tensor's elements on this rank: the inner ones of a composed tensor."""
    local = local_of(tensor)
    if not comes_apart(local):
        yield local
        return
    names, _ = cast("Any", local).__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(local, name))


def _is_made_of_others(tensor: torch.Tensor) -> bool:
    return is_traceable_wrapper_subclass(cast("object", tensor)) and not isinstance(tensor, DTensor)


# ---- taking apart ----


def take_apart(key: str, tensor: torch.Tensor, *, by_shard: bool = False) -> TensorParts:
    """The parts of a composed tensor, sharing its memory. ``by_shard``: decompose any DTensor into its shards.

    Raises:
        SaveError: it keeps something that can't be stored as plain data.
    """
    if not isinstance(tensor, DTensor):
        if by_shard:
            raise SaveError(f"ranks hold tensors of different kinds under the key '{key}'; rename one of them", key=key)
        return _whole(key, tensor)
    if any(isinstance(p, Partial) for p in tensor.placements):
        raise SaveError(
            f"{key} is a DTensor with a pending sum (placements {tensor.placements}); redistribute it first", key=key
        )
    local, shard = local_of(tensor), shard_of(tensor)
    if shard is None:  # this rank is not in the tensor's mesh
        return TensorParts(TensorForm("", num_shards(tensor), tuple(tensor.shape), tensor.dtype))
    if not by_shard and num_shards(tensor) == 1:
        return _whole(key, local)
    rows = _rows_of(tensor)
    if not by_shard and rows is not None and _is_made_of_others(local):
        whole = _whole(key, local)
        cuts = _cuts(key, whole, local)
        if cuts is not None and _cut_evenly(whole, cuts, tensor.shape[0], rows):
            return _placed(whole, cuts, tensor.shape[0], rows)
    part = _whole(f"{key}.{shard}", local) if _is_made_of_others(local) else local
    return TensorParts(TensorForm("", num_shards(tensor), tuple(tensor.shape), tensor.dtype), {shard: part})


def take_apart_as(form: TensorForm, key: str, tensor: torch.Tensor) -> TensorParts | None:
    """The parts of a tensor, sharded by rows like those of the stored one; None if that is impossible."""
    local = local_of(tensor)
    if not _is_made_of_others(local):
        return None
    whole = _whole(key, local)
    if not isinstance(tensor, DTensor) or num_shards(tensor) == 1:
        return whole
    rows = _rows_of(tensor)
    if rows is None or form.cuts.keys() != {path for path, _ in leaves(whole)}:
        return None
    fits = _cut_evenly(whole, form.cuts, tensor.shape[0], rows)
    return _placed(whole, form.cuts, tensor.shape[0], rows) if fits else None


def _whole(key: str, tensor: torch.Tensor) -> TensorParts:
    names, context = cast("Any", tensor).__tensor_flatten__()
    kind = type(tensor)
    try:
        plain = to_plain(context, tensor)
    except TypeError as error:
        raise SaveError(
            f"{key} is a {kind.__qualname__} that keeps {error}; milepost.register_value() its class with encode and "
            "decode",
            key=key,
        ) from None
    form = TensorForm(f"{kind.__module__}:{kind.__qualname__}", plain, tuple(tensor.shape), tensor.dtype)
    inner = {name: getattr(tensor, name) for name in names}
    return TensorParts(
        form,
        {
            name: _whole(f"{key}.{name}", part) if _is_made_of_others(part) else part.detach()
            for name, part in inner.items()
        },
    )


def leaves(parts: TensorParts, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The plain tensors at the leaves of the parts, with their paths."""
    for name, part in parts.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(part, TensorParts):
            yield from leaves(part, path)
        else:
            yield path, part


def num_shards(tensor: DTensor) -> int:
    """The number of different shards of a DTensor; replicas count once."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not isinstance(placement, Replicate))


def shard_of(tensor: DTensor) -> str | None:
    """The name of the shard that this rank holds; None if the rank is not in the mesh."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    number = 0
    for size, here, placement in zip(tensor.device_mesh.shape, coordinate, tensor.placements, strict=True):
        if not isinstance(placement, Replicate):
            number = number * size + here
    return f"shard{number}"


def _rows_of(tensor: DTensor) -> Piece | None:
    """The piece of a DTensor that this rank holds, if it consists of complete rows."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or not tensor.ndim:
        return None
    return rows_at(tuple(tensor.shape), tuple(tensor.device_mesh.shape), coordinate, tensor.placements)


def rows_at(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: Any, placements: tuple[Placement, ...]
) -> Piece | None:
    """The piece at a coordinate of a mesh, if it consists of complete rows of the tensor."""
    if not all(isinstance(p, Replicate) or (isinstance(p, Shard) and p.dim == 0) for p in placements):
        return None
    pieces = shard_pieces(shape, mesh_shape, coordinate, placements)
    return pieces[0] if len(pieces) == 1 and pieces[0].box.sizes[1:] == shape[1:] else None


def _cuts(key: str, whole: TensorParts, local: torch.Tensor) -> dict[str, Cut] | None:
    """Determine from a slice of the rows how each part depends on them; None if that is impossible."""
    sizes = tuple(local.shape)
    if all(tuple(part.shape) == sizes for _, part in leaves(whole)):
        return {path: "as outer" for path, _ in leaves(whole)}
    rows = sizes[0]
    for count in dict.fromkeys(n for n in (rows // 2, rows // 4 * 2, *_powers_of_two(rows), 0) if n < rows):
        try:
            with torch.no_grad():
                piece = local[0:count]
            if type(piece) is not type(local) or tuple(piece.shape) != (count, *sizes[1:]):
                return None
            fewer = _whole(key, piece)
        except Exception:  # noqa: BLE001 - the class does not cut there; it may raise anything
            continue
        return _compared(whole, fewer, rows, count)
    return None


def _powers_of_two(limit: int) -> Iterator[int]:
    return (1 << n for n in reversed(range(limit.bit_length())))


def _compared(whole: TensorParts, fewer: TensorParts, rows: int, count: int) -> dict[str, Cut] | None:
    found: dict[str, Cut] = {}
    parts, others = list(leaves(whole)), dict(leaves(fewer))
    if not _alike_but_for_rows(whole, fewer) or len(parts) != len(others):
        return None
    for path, part in parts:
        other = others.get(path)
        if other is None or part.ndim != other.ndim:
            return None
        if part.shape == other.shape:
            found[path] = "whole"
        elif part.shape[1:] == other.shape[1:] and other.shape[0] * rows == part.shape[0] * count:
            found[path] = "by rows"
        else:
            return None
    return found


def _alike_but_for_rows(one: TensorParts, other: TensorParts) -> bool:
    if (one.form.class_name, one.form.context) != (other.form.class_name, other.form.context):
        return False
    nested = [(part, other.get(name)) for name, part in one.items() if isinstance(part, TensorParts)]
    return all(isinstance(more, TensorParts) and _alike_but_for_rows(part, more) for part, more in nested)


def _cut_evenly(whole: TensorParts, cuts: Mapping[str, Cut], num_rows: int, rows: Piece) -> bool:
    """Return whether each part begins and ends at this rank's rows."""
    begin, count = rows.box.offsets[0], rows.box.sizes[0]
    sizes = [part.shape[0] for path, part in leaves(whole) if cuts[path] != "whole"]
    return all(begin * size % count == 0 and num_rows * size % count == 0 for size in sizes)


def _placed(whole: TensorParts, cuts: Mapping[str, Cut], num_rows: int, rows: Piece) -> TensorParts:
    """The parts of this rank's rows, each placed in the part of all rows."""
    found: dict[str, Any] = {}
    for name, part in whole.items():
        if isinstance(part, TensorParts):
            inner = {path.removeprefix(f"{name}."): cut for path, cut in cuts.items() if path.startswith(f"{name}.")}
            found[name] = _placed(part, inner, num_rows, rows)
        else:
            found[name] = part if cuts[name] == "whole" else place_rows(part, rows, num_rows)
    shape = (num_rows, *whole.form.shape[1:])
    return TensorParts(dataclasses.replace(whole.form, shape=shape, cuts=dict(cuts)), found)


def place_rows(part: torch.Tensor, rows: Piece, num_rows: int) -> Placed:
    """A rank's part, placed in the part of all ``num_rows`` rows of the composed tensor."""
    begin = rows.box.offsets[0] * part.shape[0] // rows.box.sizes[0]
    size = num_rows * part.shape[0] // rows.box.sizes[0]
    rest = tuple(part.shape[1:])
    box = Box((begin, *(0 for _ in rest)), tuple(part.shape))
    return Placed(part, (size, *rest), (Piece(box, Box.whole(part.shape)),))


# ---- putting together ----


def put_together(form: TensorForm, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Rebuild a tensor of ``shape`` on this rank from its parts, sharing their memory.

    Raises:
        ConfigError: this program has not loaded the class, or the class does not take the parts.
    """
    kind = find_class(form.class_name)
    if kind is None:
        module = form.class_name.partition(":")[0]
        raise ConfigError(
            f"the checkpoint holds a tensor of class {form.kind}, which this program has not loaded: import {module} "
            "before it is loaded"
        )
    device = next((part.device for part in parts.values()), torch.device("cpu"))
    package = form.class_name.partition(".")[0].partition(":")[0]
    try:
        context = from_plain(form.context, shape, device, package)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise FormatError(
            f"what a tensor of class {form.kind} stores beside its parts is malformed: {error}"
        ) from error
    stride = torch.empty(shape, device="meta").stride()
    try:
        made = cast("Any", kind).__tensor_unflatten__(dict(parts), context, torch.Size(shape), stride)
    except Exception as error:
        raise ConfigError(
            f"a tensor of class {form.kind} can't be assembled: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, torch.Tensor) or tuple(made.shape) != tuple(shape):
        raise ConfigError(f"a tensor of class {form.kind} and shape {list(shape)} can't be assembled from its parts")
    return made


def find_class(class_name: str) -> type | None:
    """The tensor class of a name, if this program has imported it. Imports nothing."""
    pending: list[type] = [torch.Tensor]
    found = None
    while pending:
        kinds: list[type] = pending.pop().__subclasses__()
        for kind in kinds:
            pending.append(kind)
            if f"{kind.__module__}:{kind.__qualname__}" == class_name and hasattr(kind, "__tensor_unflatten__"):
                found = kind
    return found


# ---- as values ----

_TENSOR = "milepost.tensor"
_MALFORMED = "a composed tensor is malformed"


def _to_record(parts: TensorParts) -> Any:
    form = parts.form
    return (form.class_name, form.context, form.shape, form.dtype, dict(form.cuts)), dict(parts)


def _from_record(plain: Any) -> TensorParts:
    require(isinstance(plain, tuple) and len(plain) == 2 and type(plain[1]) is dict, _MALFORMED)
    require(isinstance(plain[0], tuple) and len(plain[0]) == 5, _MALFORMED)
    (class_name, context, shape, dtype, cuts), parts = plain
    require(type(class_name) is str and isinstance(dtype, torch.dtype) and type(cuts) is dict, _MALFORMED)
    require(type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape), _MALFORMED)
    require(all(type(name) is str for name in (*parts, *cuts)), _MALFORMED)
    require(class_name or (type(context) is int and context > 0), _MALFORMED)
    return TensorParts(TensorForm(class_name, context, shape, dtype, cuts), parts)


def _made_of(parts: Any) -> torch.Tensor:
    require(isinstance(parts, TensorParts) and not parts.form.is_by_shard, _MALFORMED)
    inner = {name: _made_of(part) if isinstance(part, TensorParts) else part for name, part in parts.items()}
    require(all(isinstance(part, torch.Tensor) for part in inner.values()), _MALFORMED)
    # Small tensors of one value may be views of one storage; a class may need each part to own its storage.
    own = {name: part.clone() if part.storage_offset() else part for name, part in inner.items()}
    return put_together(parts.form, own, parts.form.shape)


register_value(TensorParts, name="milepost.tensor_parts", encode=_to_record, decode=_from_record)
register_reader(_TENSOR, _made_of)


def as_value(tensor: torch.Tensor) -> tuple[str, TensorParts]:
    """The form of a composed tensor within a value: the name of its reader, and the reader's arguments."""
    parts = take_apart("a tensor", tensor)
    if has_functions(parts.form.context):
        raise TypeError("it holds functions: give it a place of its own in the state")
    return _TENSOR, parts
