"""Descriptions of their states that ranks exchange before a save, and rank 0's view of all of them.

Most of it is the same on many ranks, so they send its digest, and one of them sends the content. State with the rank's
number in its path (random generators, data position) is sent by each rank.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch

from milepost.run.assemble import SaveInfo
from milepost.tensors.plan import LocalLayout
from milepost.tensors.sharing import Sharing, description, sort_out
from milepost.tensors.state import EMPTY_MAPPINGS, LOOP_PARTS, PER_RANK, Path
from milepost.tensors.tree import ByRank, merge_parts


@dataclass(frozen=True, slots=True)
class Nesting:
    """Paths of values and empty mappings in the state dict."""

    paths: Mapping[str, Path]
    empty: Sequence[Path]
    skeleton: Mapping[str, bytes]
    """In the form of ``dump_parts``."""

    def digest(self) -> str:
        """A value equal for two nestings if and only if they are equal."""
        digest = hashlib.blake2b(repr((list(self.paths.items()), list(self.empty))).encode(), digest_size=16)
        for name, part in self.skeleton.items():
            digest.update(f"{name} {len(part)} ".encode() + part)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Portion:
    """A description of some of a rank's state, without boxes except of plain tensors that it holds completely."""

    layout: LocalLayout
    nesting: Nesting

    def digest(self) -> str:
        """A value equal for two portions if and only if they are equal."""
        return f"{self.layout.fingerprint(self.nesting.paths)} {self.nesting.digest()}"

    def below(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the content below each of the names: containers, tensors and keys of values, comparable."""
        found: dict[str, Any] = {}
        for name in names:
            prefix = f"{name}."
            tensors = [(s.key, s.dtype, s.shape) for s in self.layout.tensors if f"{s.key}.".startswith(prefix)]
            values = [key for key in self.layout.objects if f"{key}.".startswith(prefix)]
            if tensors or values or name in self.nesting.skeleton:
                found[name] = self.nesting.skeleton.get(name), tuple(tensors), tuple(values)
        return found

    @property
    def keys(self) -> frozenset[str]:
        """Keys of its tensors and values."""
        return frozenset(self.nesting.paths)


@dataclass(frozen=True, slots=True)
class Structure:
    """A rank's description of its state: the part possibly common with others, and its own."""

    shared: Portion
    own: Portion


def structure_of(layout: LocalLayout, nesting: Nesting, rank: int) -> Structure:
    """Describe the state of ``rank``.

    The rank's own are the top-level names with ``rank<N>`` below them. A wrong classification only costs time: the
    result is the same.
    """
    number = f"rank{rank}"
    places = [*nesting.paths.values(), *nesting.empty]
    names = {str(path[0]) for path in places if number in path[1:]}
    own = {key for key, path in nesting.paths.items() if str(path[0]) in names}

    def portion(keys: frozenset[str], *, is_own: bool) -> Portion:
        chosen = replace(
            layout,
            tensors=tuple(spec for spec in layout.tensors if spec.key in keys),
            objects=tuple(key for key in layout.objects if key in keys),
            buffers=layout.buffers & keys,
            frozen=layout.frozen & keys,
        )
        nested = Nesting(
            {key: path for key, path in nesting.paths.items() if key in keys},
            [path for path in nesting.empty if (str(path[0]) in names) is is_own],
            {name: part for name, part in nesting.skeleton.items() if (bool(name) and name in names) is is_own},
        )
        return Portion(description(chosen), nested)

    return Structure(portion(frozenset(nesting.paths.keys() - own), is_own=False), portion(frozenset(own), is_own=True))


@dataclass(frozen=True, slots=True)
class Record:
    """The part of the manifest that describes all ranks' nestings."""

    paths: Mapping[str, Path] = field(default_factory=dict)
    empty: Sequence[Path] = ()
    structure: bytes = b""

    def put_into(self, info: SaveInfo, per_rank: frozenset[str]) -> SaveInfo:
        """Return ``info`` with the data derived from the state; ``per_rank`` names values stored per rank."""
        extra = dict(info.extra)
        if self.empty:
            extra[EMPTY_MAPPINGS] = list(self.empty)
        if per_rank:
            extra[PER_RANK] = sorted(per_rank)
        # `str`: a TorchVersion would make the writer process import torch to unpickle it.
        producer = {"torch": str(torch.__version__)}
        return replace(info, paths=self.paths, structure=self.structure, extra=extra, producer=producer)


class Roster:
    """Rank 0's view of all ranks' states, with common parts stored once."""

    def __init__(self) -> None:
        self._kinds: dict[str, Portion] = {}  # by digest
        self._own: dict[str, Portion] = {}  # by digest: different per rank, because they contain rank numbers
        self._digests: list[tuple[str, str]] = []  # by rank: the digests of both

    def ask(self, digests: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ranks that must send their structures, such as the lowest of each unknown kind.

        ``digests`` are the digests of each rank's portions.
        """
        unknown: dict[str, int] = {}
        for rank, (shared, own) in enumerate(digests):
            if shared not in self._kinds:
                unknown.setdefault(shared, rank)
            if own not in self._own:
                unknown.setdefault(own, rank)
        return sorted({*unknown.values()})

    def add_own(self, portions: Mapping[str, Portion]) -> None:
        """Record the ranks' own portions, by digest."""
        self._own.update(portions)

    def learn(self, digests: Sequence[tuple[str, str]], brought: Sequence[Structure]) -> None:
        """Record new structures, and drop those that no rank has any more."""
        for structure in brought:
            self._kinds[structure.shared.digest()] = structure.shared
            self._own[structure.own.digest()] = structure.own
        self._digests = list(digests)
        self._kinds = {shared: self._kinds[shared] for shared, _ in digests}
        self._own = {own: self._own[own] for _, own in digests}

    def sort_out(self) -> Sharing:
        """See :func:`milepost.tensors.sharing.sort_out`."""
        number = {shared: index for index, shared in enumerate(self._kinds)}
        return sort_out(
            [portion.layout for portion in self._kinds.values()],
            [number[shared] for shared, _ in self._digests],
            {rank: self._own[own].layout for rank, (_, own) in enumerate(self._digests)},
        )

    def unlike_below(self, names: Iterable[str]) -> frozenset[str]:
        """Return the names below which ranks hold different containers, or tensors of different shapes or dtypes.

        If merged, each rank would be given another's.
        """
        below = {digest: portion.below(names) for digest, portion in (*self._kinds.items(), *self._own.items())}
        kinds: dict[str, set[Any]] = defaultdict(set)
        for pair in dict.fromkeys(self._digests):
            for name in names:
                held = [below[digest][name] for digest in pair if name in below[digest]]
                kinds[name].update([tuple(held)] if held else [])
        return frozenset(name for name, found in kinds.items() if len(found) > 1)

    def _skeletons(self) -> list[dict[str, bytes]]:
        return [
            {**self._kinds[shared].nesting.skeleton, **self._own[own].nesting.skeleton}
            for shared, own in dict.fromkeys(self._digests)
        ]

    def record(self) -> tuple[Record, frozenset[str]]:
        """Return the record of the nestings, and the keys of tensors that are of different kinds on the ranks."""
        nestings = [portion.nesting for portion in chain(self._kinds.values(), self._own.values())]
        paths = {key: path for nesting in nestings for key, path in nesting.paths.items()}
        empty = list(dict.fromkeys(path for nesting in nestings for path in nesting.empty))
        structure, unlike = merge_parts(self._skeletons(), self._by_rank())
        return Record(paths, empty, structure), unlike

    def _by_rank(self) -> ByRank:
        """Return each rank's containers and keys of a loop's own state, where ranks differ."""
        found: dict[str, dict[bytes, list[int]]] = {name: defaultdict(list) for name in LOOP_PARTS}
        for rank, pair in enumerate(self._digests):
            skeletons = self._kinds[pair[0]].nesting.skeleton, self._own[pair[1]].nesting.skeleton
            for name, kinds in found.items():
                kinds[next((parts[name] for parts in skeletons if name in parts), b"")].append(rank)
        return {
            name: [(ranks, part) for part, ranks in kinds.items()] for name, kinds in found.items() if len(kinds) > 1
        }

    def dtypes(self) -> dict[str, str]:
        """Return the stored dtype of all ranks' tensors."""
        portions = chain(self._kinds.values(), self._own.values())
        return {spec.key: spec.dtype for portion in portions for spec in portion.layout.tensors}

    @property
    def has_frozen(self) -> bool:
        """True if any rank has frozen tensors."""
        return any(portion.layout.frozen for portion in chain(self._kinds.values(), self._own.values()))
