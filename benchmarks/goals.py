"""Put what the benchmarks found into ``docs/performance.md``, unedited: the table of goals, and the plot beside it.

Run: ``python benchmarks/goals.py FOLDER`` with the JSON files that the programs left there. What was not measured is
not in the table; a figure is not kept from an earlier run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from figures import cells

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PLOT = DOCS / "performance.md", DOCS / "performance.svg"
BEGIN, END = "<!-- goals: begin (made by `make bench`) -->\n", "<!-- goals: end -->\n"
ORDER = ("engine", "sharded", "async", "frozen", "small", "convert", "last_save", "store")
WORKS = ("save", "load after the save")
COLOURS = {"Milepost": "#2456c6", "stock DCP": "#c2581c", "the plain write or read": "#808080"}
CONTENDERS = {name: name for name in COLOURS} | {
    "the plain write or read": "plain: page cache, early write-back, one thread"
}
WIDTH, HEIGHT, TOP, LEFT = 760, 300, 40, 50
PANEL = (WIDTH - 2 * LEFT) / 2


def main() -> None:
    found = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"), key=_place)]
    rows = [(cells(row), one["program"]) for one in found for row in one["rows"]]
    table = Table("work", "goal", "reached (medians)", "in minima", "", title="Goals", title_justify="left")
    for row, _ in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n" + _markdown(rows, found) + "\n" + END + after)
    seconds = {work: times for one in found for work, times in one["seconds"].items()}
    PLOT.write_text(_plot(seconds))


def _place(path: Path) -> int:
    return ORDER.index(path.stem)


def _markdown(rows: Sequence[tuple[list[str], str]], found: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| work | goal | reached (medians) | in minima | |", "|---|---|---|---|---|"]
    for (work, goal, reached, minima, verdict), _ in rows:
        said = verdict if verdict == "reached" else f"**{verdict}**"
        lines.append(f"| {work} | {goal} | {reached} | {minima} | {said} |")
    lines += [
        "",
        f"On {found[0]['machine']}. The load of the machine when each program began (one, five and fifteen minutes):",
        "",
    ]
    for one in found:
        loads = ", ".join(f"{load:.1f}" for load in one["load_average"])
        lines.append(f"- `python benchmarks/{one['program']}`: {loads}")
    return "\n".join(lines) + "\n"


def _plot(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Two panels of bars, save and the load after it: GB a second over the sizes. Medians; lines are all rounds."""
    saves = (work.split(", ")[1] for work in seconds if work.startswith("save, ") and work.endswith(" GB"))
    sizes = sorted(saves, key=_gb)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="11"><title>GB a second that a save, and the load after it, move</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for number, work in enumerate(WORKS):
        rates = {
            (size, name): [_gb(size) / s for s in seconds[f"{work}, {size}"][CONTENDERS[name]]]
            for size in sizes
            for name in COLOURS
        }
        out += _panel(work, LEFT + number * (PANEL + LEFT), sizes, rates)
    for index, (name, colour) in enumerate(COLOURS.items()):
        out.append(f'<rect x="{LEFT + index * 180}" y="{HEIGHT - 26}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{LEFT + 18 + index * 180}" y="{HEIGHT - 16}">{name}</text>')
    return "\n".join(out) + "\n</svg>\n"


def _panel(
    work: str, left: float, sizes: Sequence[str], rates: Mapping[tuple[str, str], Sequence[float]]
) -> Iterator[str]:
    most = max(max(values) for values in rates.values())
    base = HEIGHT - 60
    scale = (base - TOP) / most
    yield f'<text x="{left}" y="{TOP - 16}" font-size="13">{work}, GB/s</text>'
    for share in (0.0, 0.5, 1.0):
        y = base - most * scale * share
        yield f'<line x1="{left}" x2="{left + PANEL - 10:.0f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most * share:.1f}</text>'
    step = (PANEL - 20) / len(sizes)
    bar = step / 4
    for place, size in enumerate(sizes):
        for index, (name, colour) in enumerate(COLOURS.items()):
            values = rates[size, name]
            x, high = left + 8 + place * step + index * bar, statistics.median(values) * scale
            said = f"<title>{name}, {size}: {statistics.median(values):.2f} GB/s</title>"
            where = f'x="{x:.1f}" y="{base - high:.1f}" width="{bar - 3:.1f}" height="{high:.1f}"'
            yield f'<rect {where} fill="{colour}">{said}</rect>'
            middle, ends = x + (bar - 3) / 2, (base - min(values) * scale, base - max(values) * scale)
            yield f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="#222"/>'
        at = left + 8 + place * step + step * 3 / 8
        yield f'<text x="{at:.1f}" y="{base + 16}" text-anchor="middle">{size}</text>'


def _gb(size: str) -> float:
    return float(size.removesuffix(" GB"))


if __name__ == "__main__":
    main()
