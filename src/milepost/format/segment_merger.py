"""The table of a whole checkpoint, merged from the segments of its ranks one at a time, as they arrive.

Only numbers are kept of each segment: sixteen bytes per shard and four per block, in growing columns. What ranks have
in common (keys, and which tensors are cut alike) is kept once. The table's columns are then filled one after another,
and each source is released before the next: at most one column exists twice at any time. So a commit needs the memory
of the table and eight more bytes per shard. Python's time grows with keys, ranks and tilings, never with shards.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.errors import SaveError, listed
from milepost.format.columns import Ints, ObjectColumns, Path, ShardTable, Tiling, UInts, concatenated, starts_of
from milepost.format.manifest import BLOCK_NBYTES, FileEntry
from milepost.format.segments import Segment

_Kind = tuple[str, tuple[int, ...]]
"""A dtype and a shape."""


@dataclass(slots=True, eq=False)
class _Form:
    """The common structure of many ranks' segments: keys, those cut alike, and numbers of boxes."""

    keys: tuple[str, ...]
    tiling: UInts  # (tensors,)
    kinds: tuple[int, ...]  # of each tiling
    num_boxes: Ints  # (tensors,)
    has_single_boxes: bool
    number: Ints  # (tensors,) of each key among all keys, known at the end


@dataclass(slots=True, eq=False)
class _Member:
    """One rank's segment: the start of its rows and blocks in the columns, and what only this rank has."""

    rank: int
    form: _Form
    parts: UInts  # (tilings,) the number of each one's part
    files: tuple[str, ...]
    file: UInts | int  # of each shard; or of all
    row: int
    num_rows: int
    block: int
    num_blocks: int
    objects: ObjectColumns


class _Parts:
    """The distinct tilings of all segments, each a part of a whole one, as columns of all their boxes."""

    def __init__(self) -> None:
        self.kinds: dict[_Kind, int] = {}
        self._known: dict[tuple[int, bytes], int] = {}
        self._kind, self._num_boxes = array("I"), array("I")
        self._box, self._coordinate = array("q"), array("q")  # where those of each part begin
        self._columns = {name: array("q") for name in ("offsets", "sizes", "header_nbytes", "record_nbytes")}

    def kind_of(self, tiling: Tiling) -> int:
        """The number of a tiling's dtype and shape."""
        return self.kinds.setdefault((tiling.dtype, tiling.shape), len(self.kinds))

    def number_of(self, tiling: Tiling) -> int:
        """The number of a part; a new one is added."""
        columns = {name: getattr(tiling, name).astype(np.int64, copy=False).tobytes() for name in self._columns}
        kind = self.kind_of(tiling)
        number = self._known.setdefault((kind, b"".join(columns.values())), len(self._kind))
        if number == len(self._kind):
            self._kind.append(kind)
            self._num_boxes.append(len(tiling))
            self._box.append(len(self._columns["record_nbytes"]))
            self._coordinate.append(len(self._columns["offsets"]))
            for name, data in columns.items():
                self._columns[name].frombytes(data)
        return number

    def joined(self, kind: _Kind, parts: UInts) -> tuple[Tiling, Ints]:
        """The tiling of all boxes of ``parts``, ordered by box, and the place in it of each of these boxes."""
        dtype, shape = kind
        num_boxes = np.frombuffer(self._num_boxes, np.uint32)[parts].astype(np.int64)
        before = np.cumsum(num_boxes) - num_boxes
        count = int(num_boxes.sum())
        box = np.repeat(np.frombuffer(self._box, np.int64)[parts] - before, num_boxes) + np.arange(count)
        first = np.frombuffer(self._coordinate, np.int64)[parts] - before * len(shape)
        corner = np.repeat(first, num_boxes) + np.arange(count) * len(shape)
        coordinate = corner[:, None] + np.arange(len(shape))
        offsets, sizes = (np.frombuffer(self._columns[name], np.int64)[coordinate] for name in ("offsets", "sizes"))
        header, record = (self._values(name)[box] for name in ("header_nbytes", "record_nbytes"))
        order = np.lexsort((*sizes.T[::-1], *offsets.T[::-1])) if shape else np.arange(count)
        place = np.empty(count, np.int64)
        place[order] = np.arange(count)
        return Tiling(dtype, shape, offsets[order], sizes[order], header[order], record[order]), place

    def _values(self, name: str) -> Ints:
        return np.frombuffer(self._columns[name], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """The cuts of all tensors: tilings, each key's tiling, and each key's first row and block.

    Keys that all ranks cut alike form a *group*: what holds for one of its keys holds for all.
    """

    tilings: Sequence[Tiling]
    tiling: Ints  # (groups,)
    group: Ints  # (keys,)
    first_row: Ints  # (keys + 1,)
    first_block: Ints  # (keys + 1,)
    pool: Ints  # (tilings,) where each one's boxes begin in what follows
    place: Ints  # (boxes,) by arrival: the place of a box among those of its tiling
    block: Ints  # (boxes,) by place: the first block, among those of the tiling
    num_blocks: Ints  # (boxes,) by place

    @classmethod
    def of(cls, joined: Sequence[tuple[Tiling, Ints]], tiling: Ints, group: Ints) -> _Cut:
        tilings = [one for one, _ in joined]
        counts = [one.num_blocks(BLOCK_NBYTES) for one in tilings]
        num_boxes = np.fromiter(map(len, tilings), np.int64, len(tilings))
        total_blocks = np.fromiter((count.sum() for count in counts), np.int64, len(counts))
        return cls(
            tilings=tilings,
            tiling=tiling,
            group=group,
            first_row=starts_of(num_boxes[tiling[group]]),
            first_block=starts_of(total_blocks[tiling[group]]),
            pool=np.cumsum(num_boxes) - num_boxes,
            place=concatenated([place for _, place in joined]),
            block=concatenated([np.cumsum(count) - count for count in counts]),
            num_blocks=concatenated(counts),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of each segment of one form: the boxes of its keys' groups, repeated for each key."""

    key: Ints  # (rows,)
    box: Ints  # (rows,) index into the boxes of all groups
    groups: Ints  # (groups,) in the form
    num_boxes: Ints  # (groups,)

    @classmethod
    def of(cls, form: _Form, group: Ints) -> _Rows:
        groups, first, which = np.unique(group[form.number], return_index=True, return_inverse=True)
        num_boxes = form.num_boxes[first]
        key, box = form.number, (np.cumsum(num_boxes) - num_boxes)[which]
        if not form.has_single_boxes:
            before = np.cumsum(form.num_boxes) - form.num_boxes
            key = np.repeat(key, form.num_boxes)
            box = np.repeat(box - before, form.num_boxes) + np.arange(len(key))
        return cls(key, box, groups, num_boxes)

    def boxes(self, start: Ints) -> Ints:
        """The boxes of all groups, where ``start`` has the first box of each."""
        if (self.num_boxes == 1).all():
            return start
        before = np.cumsum(self.num_boxes) - self.num_boxes
        return np.repeat(start - before, self.num_boxes) + np.arange(int(self.num_boxes.sum()))


class SegmentMerger:
    """Collects the segments of one save and merges them into its table. ``merge`` consumes them."""

    def __init__(self) -> None:
        self.files: dict[str, FileEntry] = {}
        """The files of all segments."""
        self._writers: dict[str, int] = {}
        self._faults: list[str] = []
        self._forms: dict[tuple[object, ...], _Form] = {}
        self._members: list[_Member] = []
        self._parts = _Parts()
        self._columns = {"record_offset": array("q"), "crc32": array("I"), "blocks": array("I")}

    @classmethod
    def of(cls, segments: Iterable[tuple[int, Segment]]) -> SegmentMerger:
        """A merger of these ranks' segments."""
        merger = cls()
        for rank, segment in segments:
            merger.add(rank, segment)
        return merger

    def add(self, rank: int, segment: Segment) -> None:
        """Add the segment of ``rank``, which the caller need not keep. Ranks may come in any order."""
        table = segment.table
        self._claim(rank, [f"file {name}" for name in segment.files])
        self._claim(rank, [f"'{key}'" for key in table.objects.keys])
        self.files.update(segment.files)
        columns = {"record_offset": table.record_offset, "crc32": table.crc32, "blocks": segment.block_crcs}
        starts = {name: len(self._columns[name]) for name in columns}
        for name, column in columns.items():
            self._columns[name].frombytes(np.ascontiguousarray(column).view(np.uint8).data)
        parts = np.array([self._parts.number_of(tiling) for tiling in table.tilings], np.uint32)
        member = _Member(
            *(rank, self._form_of(table), parts, table.files, _alike(table.file)),
            *(starts["record_offset"], len(table), starts["blocks"], len(segment.block_crcs)),
            objects=_copied(table.objects),
        )
        self._members.append(member)

    def _claim(self, rank: int, names: Sequence[str]) -> None:
        for name in names:
            if (other := self._writers.setdefault(name, rank)) != rank:
                self._faults.append(f"{name} was stored by rank {min(rank, other)} and by rank {max(rank, other)}")

    def _form_of(self, table: ShardTable) -> _Form:
        kinds = tuple(map(self._parts.kind_of, table.tilings))
        identity = (table.keys, table.tiling.tobytes(), kinds, table.num_boxes.tobytes())
        form = self._forms.get(identity)
        if form is None:
            num_boxes = table.num_boxes[table.tiling] if len(table.keys) else np.empty(0, np.int64)
            tiling = table.tiling.copy()
            is_single = bool((num_boxes == 1).all())
            form = _Form(table.keys, tiling, kinds, num_boxes, is_single, np.empty(0, np.int64))
            self._forms[identity] = form
        return form

    def merge(self, paths: Mapping[str, Path]) -> tuple[ShardTable, UInts]:
        """The table of all segments, with these ``paths``, and the block CRCs in its order. Shards are ordered by box.

        Raises:
            SaveError: two ranks stored the same file or object, or one tensor with two dtypes or shapes.
        """
        self._members.sort(key=lambda member: member.rank)
        keys = tuple(sorted(set[str]().union(*(form.keys for form in self._forms.values()))))
        index = {key: number for number, key in enumerate(keys)}
        for form in self._forms.values():
            form.number = np.fromiter(map(index.__getitem__, form.keys), np.int64, len(form.keys))
        kinds, faults = self._kinds(keys)
        faults = [*self._faults, *faults]
        if faults:
            raise SaveError(f"the ranks contradict each other: {'; '.join(listed(faults))}")
        cut = self._cut(kinds)
        objects = self._objects()
        table = ShardTable(
            files=tuple(name for member in self._members for name in member.files),
            keys=keys,
            tilings=cut.tilings,
            tiling=cut.tiling[cut.group].astype(np.uint32),
            record_offset=self._column("record_offset", np.int64, cut),
            file=self._file_column(cut),
            crc32=self._column("crc32", np.uint32, cut),
            objects=objects,
            paths={key: paths[key] for key in (*keys, *objects.keys) if key in paths},
        )
        return table, self._block_column(cut)

    def _kinds(self, keys: Sequence[str]) -> tuple[list[_Kind], list[str]]:
        """The dtype and shape of each key, and faults where two ranks disagree."""
        kinds = list(self._parts.kinds)
        kind_of = np.full(len(keys), -1, np.int64)
        clashes: dict[int, set[int]] = {}
        for form in self._forms.values():
            if not len(form.keys):
                continue
            said = np.array(form.kinds, np.int64)[form.tiling]
            before = kind_of[form.number]
            for place in np.flatnonzero((before != said) & (before >= 0)).tolist():
                clashes.setdefault(int(form.number[place]), {int(before[place])}).add(int(said[place]))
            kind_of[form.number] = np.where(before >= 0, before, said)
        faults = [
            f"'{keys[key]}' was stored as "
            + " and as ".join(f"{d} {list(s)}" for d, s in sorted(kinds[k] for k in one))
            for key, one in sorted(clashes.items())
        ]
        return [kinds[kind] for kind in kind_of.tolist()], faults

    def _cut(self, kinds: Sequence[_Kind]) -> _Cut:
        """Join the parts of each key, by rank, once for keys with the same parts."""
        first_keys, group = self._groups(len(kinds))
        number = np.full(len(kinds), -1, np.int64)
        number[first_keys] = np.arange(len(first_keys))
        chosen = {}  # of each form, which of its keys are the first of a group, and of which
        num_parts = np.zeros(len(first_keys), np.int64)
        for member in self._members:
            form = member.form
            if id(form) not in chosen:
                at = np.flatnonzero(number[form.number] >= 0)
                chosen[id(form)] = number[form.number[at]], form.tiling[at]
            num_parts[chosen[id(form)][0]] += 1
        first = starts_of(num_parts)
        parts, following = np.empty(int(first[-1]), np.uint32), first[:-1].copy()
        for member in self._members:
            groups, tiling_of = chosen[id(member.form)]
            parts[following[groups]] = member.parts[tiling_of] if len(groups) else 0
            following[groups] += 1
        known: dict[tuple[_Kind, bytes], int] = {}
        joined: list[tuple[Tiling, Ints]] = []
        tiling = np.empty(len(first_keys), np.int64)
        for place, key in enumerate(first_keys.tolist()):
            made_of = parts[first[place] : first[place + 1]]
            tiling[place] = known.setdefault((kinds[key], made_of.tobytes()), len(joined))
            if tiling[place] == len(joined):
                joined.append(self._parts.joined(kinds[key], made_of))
        return _Cut.of(joined, tiling, group)

    def _groups(self, num_keys: int) -> tuple[Ints, Ints]:
        """The first key of each group, ascending, and each key's group: keys that all ranks cut alike.

        Their forms have the same tiling for them, so that it need not be asked of each rank.
        """
        group, count = np.zeros(num_keys, np.int64), 1
        for form in self._forms.values():
            if len(form.keys):
                pairs = group[form.number] * len(form.kinds) + form.tiling
                distinct, which = np.unique(pairs, return_inverse=True)
                group[form.number] = count + which
                count += len(distinct)
        _, first, group = np.unique(group, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number = np.empty(len(order), np.int64)
        number[order] = np.arange(len(order))
        return first[order], number[group]

    # ---- columns ----

    def _placed(self, cut: _Cut, starts: Ints) -> Iterator[tuple[_Member, Ints, Ints, Ints, Ints]]:
        """Yield each member with, for each of its rows, the key's entry of ``starts`` and the index of the row's box.

        The last two are, for each of its boxes, the place in the tiling and the index in ``cut``'s arrays by place.
        """
        following = np.zeros(len(cut.tiling), np.int64)  # boxes of each group that came before
        pool = cut.pool[cut.tiling]
        form, rows, start = None, None, starts
        for member in self._members:
            if member.form is not form or rows is None:  # consecutive members are mostly alike
                form, rows = member.form, _Rows.of(member.form, cut.group)
                start = starts[rows.key]
            begin = pool[rows.groups]
            place = cut.place[rows.boxes(begin + following[rows.groups])]
            yield member, start, rows.box, place, place + np.repeat(begin, rows.num_boxes)
            following[rows.groups] += rows.num_boxes

    def _column(self, name: str, kind: type[Any], cut: _Cut) -> Any:
        source = np.frombuffer(self._columns.pop(name), kind)
        column = np.empty(int(cut.first_row[-1]), kind)
        for member, start, box, place, _ in self._placed(cut, cut.first_row):
            column[start + place[box]] = source[member.row : member.row + member.num_rows]
        return column

    def _file_column(self, cut: _Cut) -> UInts:
        column = np.empty(int(cut.first_row[-1]), np.uint32)
        num_files = 0
        for member, start, box, place, _ in self._placed(cut, cut.first_row):
            column[start + place[box]] = member.file + np.uint32(num_files)
            num_files += len(member.files)
        return column

    def _block_column(self, cut: _Cut) -> UInts:
        source = np.frombuffer(self._columns.pop("blocks"), np.uint32)
        column = np.empty(int(cut.first_block[-1]), np.uint32)
        for member, first, box, _, by_place in self._placed(cut, cut.first_block):
            count, start = cut.num_blocks[by_place], first + cut.block[by_place][box]
            if not (count == 1).all():
                count = count[box]
                before = np.cumsum(count) - count
                start = np.repeat(start - before, count) + np.arange(member.num_blocks)
            column[start] = source[member.block : member.block + member.num_blocks]
        return column

    def _objects(self) -> ObjectColumns:
        parts = [member.objects for member in self._members]
        keys = [key for part in parts for key in part.keys]
        bases = np.cumsum([0, *(len(member.files) for member in self._members)]).tolist()
        file = concatenated([part.file + np.uint32(base) for part, base in zip(parts, bases, strict=False)], np.uint32)
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        return ObjectColumns(
            tuple(keys[place] for place in order.tolist()),
            file[order],
            concatenated([part.record_offset for part in parts])[order],
            concatenated([part.record_nbytes for part in parts])[order],
            concatenated([part.crc32 for part in parts], np.uint32)[order],
        )


def _alike(file: UInts) -> UInts | int:
    """Return the number that all entries of ``file`` equal, or a copy of it."""
    return int(file[0]) if len(file) and (file == file[0]).all() else file.copy()


def _copied(objects: ObjectColumns) -> ObjectColumns:
    """Copy the columns, which are views of the whole sign-off."""
    columns = (objects.file, objects.record_offset, objects.record_nbytes, objects.crc32)
    return ObjectColumns(objects.keys, *(column.copy() for column in columns))  # type: ignore[arg-type]
