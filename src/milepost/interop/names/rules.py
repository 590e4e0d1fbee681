"""Two-way tables between our parameters and those of another program, and the engine that reads them.

A *family* lists our parameters with symbolic shapes. A *scheme* is one table of another program's names for them: each
row maps an external tensor's elements into ours. ``correspond`` fills in a model's sizes and returns links between
boxes; ``into_ours`` and ``into_theirs`` are the same links read in the two directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from milepost.format.box import Box
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.sizes import Sizes, sizes_of

OWN = "milepost"
"""The scheme of our own names."""


class Op(Enum):
    """The operation that converts the elements of a source box to those of a target box."""

    SAME = "same"
    TRANSPOSED = "transposed"
    """The last two dims are exchanged."""
    TO_PAIRS = "to pairs"
    """Rows of each head from Hugging Face's order (all first halves, then all second) to Meta's (interleaved)."""
    TO_HALVES = "to halves"
    """The inverse of ``TO_PAIRS``."""

    @property
    def inverse(self) -> Op:
        """The inverse op."""
        return {Op.TO_PAIRS: Op.TO_HALVES, Op.TO_HALVES: Op.TO_PAIRS}.get(self, self)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of our parameters. ``shape`` holds names of ``Sizes.named``; ``{layer}`` in ``key`` stands for each layer."""

    key: str
    shape: tuple[str, ...]
    layers: str = ""
    """The kind of layers with this parameter; empty: all layers."""
    when: str = ""
    """The feature that a model needs to have it; empty: all models."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Our tensor is slice ``index`` along a dim of theirs, whose slices have the sizes named by ``of``."""

    index: int
    of: tuple[str, ...]
    dim: int = -2


@dataclass(frozen=True, slots=True)
class QkvGroup:
    """Our projection is ``part`` (q, k, v) of a fused one: per key-value head its queries, key and value."""

    part: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: our key, their key, and the mapping between them.

    ``{expert}`` in ``theirs`` means that dim 0 of our tensor is one external tensor per expert. ``op`` converts theirs
    to ours.
    """

    ours: str
    theirs: str
    op: Op = Op.SAME
    part: Slice | QkvGroup | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """An external tensor that our models lack: written as zeros, ignored when read."""

    theirs: str
    shape: tuple[str, ...]
    dtype: str
    layers: str = ""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Another program's names for the parameters of a family."""

    name: str
    rows: tuple[Row, ...]
    constants: tuple[Constant, ...] = ()
    ignored: tuple[str, ...] = ()
    """Keys of recomputed buffers that may be present and are not read."""
    left_out: tuple[str, ...] = ()
    """Key prefixes of other parts (a vision tower, layers of kind ``beyond``): not converted, but reported."""
    tied_output: str | None = None
    """Their name of the output projection, which may be stored even if tied to the embedding."""
    writes_tied_output: bool = False
    """Their program requires ``tied_output`` although it equals the embedding."""


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one architecture. The first of ``schemes`` has our own names."""

    name: str
    parameters: tuple[Parameter, ...]
    schemes: tuple[Scheme, ...]

    def scheme(self, name: str) -> Scheme:
        """Return the scheme ``name``. Raises KeyError."""
        return {scheme.name: scheme for scheme in self.schemes}[name]


@dataclass(frozen=True, slots=True)
class MappedBox:
    """A box of a target tensor and the source box from which ``op`` computes its elements.

    The boxes may differ in leading dims of size 1. For the RoPE ops, both hold complete heads of ``head_dim`` rows.
    """

    target: Box
    source_key: str
    source: Box
    op: Op
    head_dim: int = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe of a target tensor. Without pieces it is zeros of ``dtype``; else None keeps the source's dtype."""

    shape: tuple[int, ...]
    pieces: tuple[MappedBox, ...]
    dtype: str | None = None


def recipes_of(shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[tuple[str, MappedBox]]) -> dict[str, Recipe]:
    """Return the recipe of each tensor in ``shapes``, from all pieces with their tensor's key."""
    found: dict[str, list[MappedBox]] = {key: [] for key in shapes}
    for key, piece in pieces:
        found[key].append(piece)
    return {key: Recipe(shapes[key], tuple(boxes)) for key, boxes in found.items()}


@dataclass(frozen=True, slots=True)
class Link:
    """A box of our tensor and the box of theirs with the same elements; ``op`` converts theirs to ours.

    For the RoPE ops, both hold complete heads of ``head_dim`` rows.
    """

    ours_key: str
    ours: Box
    theirs_key: str
    theirs: Box
    op: Op
    head_dim: int = 0

    def into_ours(self) -> MappedBox:
        """Return the box of ours, as computed from theirs."""
        return MappedBox(self.ours, self.theirs_key, self.theirs, self.op, self.head_dim)

    def into_theirs(self) -> MappedBox:
        """Return the box of theirs, as computed from ours."""
        return MappedBox(self.theirs, self.ours_key, self.ours, self.op.inverse, self.head_dim)


@dataclass(frozen=True, slots=True)
class Correspondence:
    """A scheme instantiated with a model's sizes: all tensors of both sides, and the links between them."""

    scheme: Scheme
    ours: Mapping[str, tuple[int, ...]]
    theirs: Mapping[str, tuple[int, ...]]
    links: tuple[Link, ...]
    constants: Mapping[str, tuple[tuple[int, ...], str]]
    ignored: frozenset[str]
    left_out: tuple[str, ...]
    tied: tuple[str, str] | None
    """(their embedding, their output projection), for a model that ties them."""

    def into_ours(self) -> dict[str, Recipe]:
        """Return the recipes of our tensors from theirs."""
        return recipes_of(self.ours, ((link.ours_key, link.into_ours()) for link in self.links))

    def into_theirs(self) -> dict[str, Recipe]:
        """Return the recipes of their tensors from ours; constants are zeros."""
        recipes = recipes_of(self.theirs, ((link.theirs_key, link.into_theirs()) for link in self.links))
        if self.tied is not None and self.scheme.writes_tied_output:
            embedding, output = self.tied
            recipes[output] = recipes[embedding]
        return recipes | {key: Recipe(shape, (), dtype) for key, (shape, dtype) in self.constants.items()}


@dataclass(frozen=True, slots=True)
class KeyFaults:
    """The differences between a set of stored tensors and a model in a scheme. All empty: none."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)


def correspond(family: Family, scheme: Scheme, args: ModelArgs | Sizes) -> Correspondence:
    """Instantiate ``scheme`` with the sizes of ``args``. Needs memory only for names."""
    sizes = sizes_of(args)
    parameters = {p.key: p for p in family.parameters if _has(sizes, p)}
    ours: dict[str, tuple[int, ...]] = {}
    theirs: dict[str, tuple[int, ...]] = {}
    links: list[Link] = []
    rows = {row.ours: row for row in scheme.rows}
    for pattern, parameter in parameters.items():
        shape = tuple(sizes.named[name] for name in parameter.shape)
        for layer in _layers(pattern, parameter.layers, sizes):
            key = pattern.format(layer=layer)
            ours[key] = shape
            for link, foreign_shape in _links(rows[pattern], key, layer, shape, sizes):
                links.append(link)
                theirs[link.theirs_key] = foreign_shape
    constants = {
        c.theirs.format(layer=layer): (tuple(sizes.named[name] for name in c.shape), c.dtype)
        for c in scheme.constants
        for layer in _layers(c.theirs, c.layers, sizes)
    }
    ignored = frozenset(key.format(layer=layer) for key in scheme.ignored for layer in _layers(key, "", sizes))
    beyond = sizes.kinds.get("beyond", ())
    left_out = tuple(
        key.format(layer=layer) for key in scheme.left_out for layer in (beyond if "{layer}" in key else (0,))
    )
    tied = None
    if sizes.tied_embeddings and scheme.tied_output is not None:
        tied = (rows["tok_embeddings.weight"].theirs, scheme.tied_output)
    return Correspondence(scheme, ours, theirs, tuple(links), constants, ignored, left_out, tied)


def _has(sizes: Sizes, parameter: Parameter) -> bool:
    """Return whether a model of these sizes has the parameter."""
    if parameter.key == "output.weight" and sizes.tied_embeddings:
        return False
    return not parameter.when or parameter.when in sizes.features


def key_faults(wanted: Correspondence, stored: Mapping[str, tuple[int, ...]]) -> KeyFaults:
    """Find tensors of ``stored`` (key: shape) that are missing, unexpected or misshapen for ``wanted``'s scheme."""
    optional = set(wanted.ignored) | set(wanted.constants)
    if wanted.tied is not None:
        optional.add(wanted.tied[1])
    missing = tuple(key for key in wanted.theirs if key not in stored)
    known = wanted.theirs.keys() | optional
    unexpected = tuple(key for key in stored if key not in known and not key.startswith(wanted.left_out))
    misshapen = tuple(
        f"{key} has shape {list(stored[key])}, expected {list(shape)} by the model's sizes"
        for key, shape in wanted.theirs.items()
        if key in stored and stored[key] != shape
    )
    return KeyFaults(missing, unexpected, misshapen)


def _layers(pattern: str, kind: str, sizes: Sizes) -> Sequence[int]:
    """Yield the layers of a pattern; once for a pattern without ``{layer}``."""
    return sizes.layers(kind) if "{layer}" in pattern else (0,)


def _links(
    row: Row, key: str, layer: int, shape: tuple[int, ...], sizes: Sizes
) -> Iterator[tuple[Link, tuple[int, ...]]]:
    """Yield the links of one of our tensors, each with the shape of its external tensor."""
    head = sizes.head_dim if row.op in (Op.TO_PAIRS, Op.TO_HALVES) else 0
    if "{expert}" in row.theirs:
        for expert in range(shape[0]):
            ours = Box((expert,) + (0,) * (len(shape) - 1), (1, *shape[1:]))
            name = row.theirs.format(layer=layer, expert=expert)
            foreign = _foreign_shape(row, shape[1:])
            yield Link(key, ours, name, Box.whole(foreign), row.op, head), foreign
        return
    name = row.theirs.format(layer=layer)
    if isinstance(row.part, QkvGroup):
        foreign = ((sizes.n_heads + 2 * sizes.n_kv_heads) * sizes.head_dim, *shape[1:])
        for ours, theirs in _qkv_boxes(row.part, shape, sizes):
            yield Link(key, ours, name, theirs, row.op, head), foreign
        return
    foreign = _foreign_shape(row, shape)
    if row.part is None:
        yield Link(key, Box.whole(shape), name, Box.whole(foreign), row.op, head), foreign
        return
    slices = [sizes.named[size] for size in row.part.of]
    offsets, whole = [0] * len(foreign), list(foreign)
    offsets[row.part.dim] = sum(slices[: row.part.index])
    whole[row.part.dim] = sum(slices)
    yield Link(key, Box.whole(shape), name, Box(tuple(offsets), foreign), row.op, head), tuple(whole)


def _foreign_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if row.op is Op.TRANSPOSED else shape


def _qkv_boxes(part: QkvGroup, shape: tuple[int, ...], sizes: Sizes) -> Iterator[tuple[Box, Box]]:
    """Yield for each key-value head its rows in our projection and in the fused one."""
    queries = sizes.n_heads // sizes.n_kv_heads
    start, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[part.part]
    rest = shape[1:]
    for group in range(sizes.n_kv_heads):
        lengths = (count * sizes.head_dim, *rest)
        ours = (group * count * sizes.head_dim,) + (0,) * len(rest)
        theirs = ((group * (queries + 2) + start) * sizes.head_dim,) + (0,) * len(rest)
        yield Box(ours, lengths), Box(theirs, lengths)


def num_parameters(wanted: Correspondence) -> int:
    """Return the number of parameters of the model."""
    return sum(math.prod(shape) for shape in wanted.ours.values())
