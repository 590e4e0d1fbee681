"""The diff of two checkpoints as one HTML file, in the report's style."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

from milepost.report.diff import DiffReport, Unmatched
from milepost.report.differences import ValueChange
from milepost.report.frame import (
    Cell,
    command_html,
    document,
    header_html,
    heat_html,
    key_html,
    section_html,
    table_html,
    text_html,
)
from milepost.report.pictures import number, stacked_bars
from milepost.report.profile import grid_of
from milepost.storage.base import counted

MAX_BARS = 20
_NAMES = {
    "most": "Changed most",
    "movement": "By layer",
    "values": "All changes",
    "objects": "Values",
    "bytes": "Bytes",
    "keys": "Keys",
    "kinds": "Kinds",
}


def diff_page(report: DiffReport, *, now: float) -> str:
    """Return the HTML document."""
    changes = report.by_change()
    sections = [section for section in _sections(report, changes) if section]
    facts = [
        ("the same", str(report.num_same)),
        ("with different values", str(len(changes) + len(report.objects) + len(report.other_bytes))),
        ("with different dtype or shape", str(len(report.kinds))),
        ("only in A", str(len(report.only_a))),
        ("only in B", str(len(report.only_b))),
        ("not compared", str(report.num_unknown)),
    ]
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    lead = f"A is {report.a}, B is {report.b}; compared by Milepost, {made}"
    header = header_html(f"{report.a} and {report.b}", lead, facts)
    footer = f"<p class='soft'>{command_html('milepost diff', report.a, report.b)}</p>"
    return document(f"{report.a} and {report.b} - Milepost diff", header, sections, _NAMES, footer)


def _sections(report: DiffReport, changes: Sequence[ValueChange]) -> Iterable[str]:
    if report.is_same:
        rest = f"; the values of {counted(report.num_unknown, 'key')} were not compared" if report.num_unknown else ""
        style = "warn" if report.num_unknown else "good"
        yield section_html("most", "No difference", f'<p class="{style}">No difference was found{rest}.</p>')
    if changes:
        yield _most(changes)
        yield _by_layer(changes)
        yield _values(changes)
    if report.objects:
        yield _objects(report)
    if report.other_bytes:
        rows: list[list[Cell]] = [[key_html(key)] for key in report.other_bytes]
        table = table_html("byte-table", "By CRC-32", ("KEY",), rows)
        yield section_html("bytes", "Stored with different bytes", table)
    yield _kinds(report)
    yield _keys(report)


def _most(changes: Sequence[ValueChange]) -> str:
    finite = [change for change in changes if math.isfinite(change.relative_norm)][:MAX_BARS]
    bars = [(_short(change.key), [("p1", "change", change.relative_norm * 100)]) for change in finite]
    lead = "The norm of the difference over the norm of A, in percent."
    return section_html("most", "What changed most", stacked_bars(bars, "%", left=250), lead)


def _short(key: str, limit: int = 36) -> str:
    return key if len(key) <= limit else "..." + key[-limit + 3 :]


def _by_layer(changes: Sequence[ValueChange]) -> str:
    found = {change.key: change.relative_norm for change in changes}
    grid = grid_of(list(found))
    if not grid.rows:
        return ""
    heads = [f"L{layer}" for layer in grid.layers]
    rows = [(row, [found.get(grid.keys.get((row, layer), ""), math.nan) for layer in grid.layers]) for row in grid.rows]
    lead = "A dash: no change, or no such tensor."
    return section_html(
        "movement", "Change by layer", heat_html("heat-layers", "Kinds of tensor x layers", heads, rows), lead
    )


def _values(changes: Sequence[ValueChange]) -> str:
    rows: list[list[Cell]] = [
        [
            key_html(change.key),
            *((_percent(share), share) for share in (change.relative_norm,)),
            *((number(value), value) for value in (change.max_abs, change.mean_abs, change.max_rel)),
            (f"{change.cosine:.6f}", change.cosine),
            (f"{change.share_different:.1%}", change.share_different),
            (f"{change.num_elements:,}", float(change.num_elements)),
            text_html(str(list(change.at))),
        ]
        for change in changes
    ]
    numbers = ("#CHANGE", "#MAX |A-B|", "#MEAN |A-B|", "#MAX RELATIVE", "#COSINE", "#DIFFERENT", "#ELEMENTS")
    table = table_html("value-table", "Largest change first", ("KEY", *numbers, "AT"), rows, search=True)
    return section_html("values", "All changes", table, "AT is where the largest absolute difference is.")


def _objects(report: DiffReport) -> str:
    rows: list[list[Cell]] = [[key_html(c.key), text_html(c.a), text_html(c.b)] for c in report.objects]
    table = table_html("object-table", "Step, counters, options", ("KEY", "A", "B"), rows, search=True)
    return section_html("objects", "Values other than tensors that differ", table)


def _percent(share: float) -> str:
    return f"{share:.3%}" if math.isfinite(share) else "NaN"


def _kinds(report: DiffReport) -> str:
    if not report.kinds:
        return ""
    rows: list[list[Cell]] = [[key_html(change.key), _held(change.a), _held(change.b)] for change in report.kinds]
    return section_html("kinds", "Different dtype or shape", table_html("kind-table", "Keys", ("KEY", "A", "B"), rows))


def _keys(report: DiffReport) -> str:
    rows: list[list[Cell]] = [
        [key_html(held.key), side, _held(held)]
        for side, found in (("A", report.only_a), ("B", report.only_b))
        for held in found
    ]
    if not rows:
        return ""
    table = table_html("key-table", "Keys on one side only", ("KEY", "ONLY IN", "WHAT"), rows, search=True)
    return section_html("keys", "Keys found on one side only", table)


def _held(held: Unmatched) -> str:
    return text_html(f"{held.dtype} {list(held.shape)}") if held.dtype else "value"
