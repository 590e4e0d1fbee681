"""Tables for people, laid out for the width there is: nothing is cut off, and no column is left out.

A table that is too wide puts its last column on lines of its own; one that is far too wide becomes a list of values
under each row's first (as psql shows wide rows). Where the output is no terminal, each row is one line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.text import Text

GAP = 2
MIN_LAST = 24
"""A last column is folded rather than moved if it has at least this much room."""


def lay_out(
    headers: Sequence[str], rows: Sequence[Sequence[Text]], *, numeric: Sequence[str] = (), width: int | None = None
) -> list[Text]:
    """The lines of a table with at most ``width`` cells each, None for any. Columns of ``numeric`` align right.

    Lines have no trailing blanks. A word that is longer than a line, such as a path, sticks out.
    """
    titles = [Text(header, style="bold") for header in headers]
    widths = [max(row[column].cell_len for row in [titles, *rows]) for column in range(len(headers))]
    right = [header in numeric for header in headers]
    if width is None or sum(widths) + GAP * (len(widths) - 1) <= width:
        return [_line(row, widths, right) for row in [titles, *rows]]
    if not any(row[-1].plain for row in rows):  # only its title stands in the way
        return lay_out(headers[:-1], [row[:-1] for row in rows], numeric=numeric, width=width)
    before_last = sum(widths[:-1]) + GAP * (len(widths) - 1)
    if before_last - GAP <= width:
        return list(_with_last_apart([titles, *rows], widths, right, width, width - before_last))
    return list(_as_lists(titles, rows, width))


def _line(row: Sequence[Text], widths: Sequence[int], right: Sequence[bool]) -> Text:
    line = Text()
    for cell, size, is_right in zip(row, widths, right, strict=True):
        blanks = " " * (size - cell.cell_len)
        line.append_text(Text.assemble(blanks, cell) if is_right else Text.assemble(cell, blanks)).append(" " * GAP)
    line.rstrip()
    return line


def _with_last_apart(
    rows: Sequence[Sequence[Text]], widths: Sequence[int], right: Sequence[bool], width: int, room: int
) -> Iterator[Text]:
    """Each row, with what does not fit of its last cell folded below that column or, without room there, below all."""
    for row in rows:
        last = row[-1]
        if last.cell_len <= max(room, 0):
            yield _line(row, [*widths[:-1], last.cell_len], right)
            continue
        first = _line(row[:-1], widths[:-1], right[:-1])
        parts = _folded(last, room if room >= MIN_LAST else width - 2 * GAP)
        if room >= MIN_LAST:
            indent = width - room
            first.append(" " * (indent - first.cell_len)).append_text(parts.pop(0))
        else:
            indent = 2 * GAP
        yield first
        for part in parts:
            yield Text.assemble(" " * indent, part)


def _as_lists(titles: Sequence[Text], rows: Sequence[Sequence[Text]], width: int) -> Iterator[Text]:
    indent = max(title.cell_len for title in titles[1:]) + 2 * GAP
    for row in rows:
        yield Text.assemble(titles[0], " ", row[0])
        for title, cell in zip(titles[1:], row[1:], strict=True):
            if cell.plain:
                for index, part in enumerate(_folded(cell, max(width - indent, MIN_LAST))):
                    label = Text.assemble(" " * GAP, title) if not index else Text()
                    yield Text.assemble(label, " " * (indent - label.cell_len), part)


def _folded(cell: Text, width: int) -> list[Text]:
    if cell.cell_len <= width:
        return [cell]
    parts = textwrap.wrap(cell.plain, width, break_long_words=False, break_on_hyphens=False)
    return [Text(part, style=cell.style) for part in parts]
