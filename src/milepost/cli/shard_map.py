"""Draw which file holds which part of a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from milepost.cli.render import bar, print_table, printable
from milepost.format.box import Box
from milepost.format.manifest import TensorEntry
from milepost.format.summary import cuts_of

MAX_ROWS, MAX_COLUMNS = 16, 8
COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_black", "white")

Cut = tuple[int, int]


def same_map(entry: TensorEntry) -> object:
    """Return a key that is equal for tensors with the same map."""
    return entry.shape, tuple((shard.box, shard.file) for shard in entry.shards if shard.box.numel)


def draw_map(entry: TensorEntry, colour_of: Mapping[str, str]) -> None:
    """Print the map: rows are the cuts of one dim, columns those of another, each cell names the file.

    A tensor cut along more than two dims is shown as the slice at the origin of the others; of very many cuts only the
    first and the last are shown.
    """
    cuts = cuts_of(entry)
    row_dim, column_dim = _axes(cuts)
    rows = _few(cuts[row_dim], MAX_ROWS) if row_dim is not None else [(0, 1)]
    columns = _few(cuts[column_dim], MAX_COLUMNS) if column_dim is not None else [(0, 1)]

    def label(cut: Cut | None, dim: int | None) -> str:
        return "..." if cut is None else "" if dim is None else f"{cut[0]}:{cut[1]}"

    header = [_corner(row_dim, column_dim), *(label(column, column_dim) for column in columns)]
    table: list[list[str | Text]] = []
    for row in rows:
        cells = []
        for column in columns:
            corner = [0] * len(entry.shape)
            for cut, dim in ((row, row_dim), (column, column_dim)):
                if dim is not None and cut is not None:
                    corner[dim] = cut[0]
            cells.append(Text("...") if row is None or column is None else _cell(entry, corner, colour_of))
        table.append([label(row, row_dim), *cells])
    print_table(header, table)


def colours(files: Sequence[str]) -> dict[str, str]:
    """Assign a colour to each file."""
    return {file: COLOURS[index % len(COLOURS)] for index, file in enumerate(files)}


def _axes(cuts: Sequence[Sequence[Cut]]) -> tuple[int | None, int | None]:
    """Choose the dims for rows and columns: the first two that are cut."""
    cut = [dim for dim, parts in enumerate(cuts) if len(parts) > 1]
    if not cut and cuts:
        return 0, None
    return (cut[0] if cut else None), (cut[1] if len(cut) > 1 else None)


def _corner(row_dim: int | None, column_dim: int | None) -> str:
    if row_dim is None:
        return "scalar"
    return f"dim {row_dim}" if column_dim is None else f"dim {row_dim} \\ dim {column_dim}"


def _few(cuts: Sequence[Cut], limit: int) -> list[Cut | None]:
    if len(cuts) <= limit:
        return list(cuts)
    return [*cuts[: limit - 2], None, cuts[-1]]


def _cell(entry: TensorEntry, corner: Sequence[int], colour_of: Mapping[str, str]) -> Text:
    """Return the cell of the file that holds the element at ``corner``."""
    wanted = Box(tuple(corner), (1,) * len(corner))
    for shard in entry.shards:
        if shard.box.numel and shard.box.intersect(wanted) is not None:
            name = printable(shard.file.removesuffix(".distcp"))
            return Text(f"{bar(1, 2)} {name}", style=colour_of.get(shard.file, ""))
    return Text("-")
