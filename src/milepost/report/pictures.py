"""The report's pictures as SVG text. Colours are CSS classes, so that the page's themes determine them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Collection, Sequence

from milepost.format.manifest import TensorEntry
from milepost.report.history import Moment

BAR_HEIGHT, BAR_GAP, BAR_WIDTH = 16, 6, 480
MAX_BOXES = 4_096


def number(value: float, digits: int = 4) -> str:
    """Format a number for people: ``0.0123``, ``1.2e-07``, ``NaN``."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    return f"{value:.{digits}g}"


def attribute(text: str) -> str:
    """Escape ``text`` for an attribute's value or a text node."""
    return html.escape(text, quote=True)


def stacked_bars(rows: Sequence[tuple[str, Sequence[tuple[str, str, float]]]], unit: str, *, left: int = 110) -> str:
    """Draw one bar per row, stacked from parts ``(class, name, value)``, all on one scale."""
    if not rows:
        return ""
    longest = max((sum(value for _, _, value in parts) for _, parts in rows), default=0.0) or 1.0
    height = len(rows) * (BAR_HEIGHT + BAR_GAP) + BAR_GAP
    out = [
        f'<svg class="bars" role="img" viewBox="0 0 {left + BAR_WIDTH + 110} {height}" '
        f'aria-label="bars, in {attribute(unit)}; the table below has the numbers">'
    ]
    for index, (label, parts) in enumerate(rows):
        y = BAR_GAP + index * (BAR_HEIGHT + BAR_GAP)
        x = float(left)
        out.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{attribute(label)}</text>')
        for style, name, value in parts:
            width = value / longest * BAR_WIDTH
            title = f"{label}: {name} {number(value)} {unit}"
            out.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}">'
                f"<title>{attribute(title)}</title></rect>"
            )
            x += width
        total = sum(value for _, _, value in parts)
        out.append(f'<text x="{x + 6:.1f}" y="{y + 12}">{number(total, 3)} {attribute(unit)}</text>')
    return "".join(out) + "</svg>"


def time_line(moments: Sequence[Moment], held: Collection[int], when: Callable[[float], str]) -> str:
    """Draw steps over time: a line that rises with saves and falls back with resumes, and a mark for each event.

    ``held`` are the steps that still exist; ``when`` formats a time.
    """
    width, height, left, bottom = 1060, 230, 64, 26
    start, end = min(m.when for m in moments), max(m.when for m in moments)
    top = max(max(m.step for m in moments), 1)

    def place(moment: Moment) -> tuple[float, float]:
        x = left + (moment.when - start) / ((end - start) or 1.0) * (width - left - 24)
        return x, height - bottom - moment.step / top * (height - bottom - 22)

    out = [
        f'<svg class="timeline" role="img" viewBox="0 0 {width} {height}" '
        'aria-label="steps over time; the tables below have the numbers">'
    ]
    for share in (0.0, 0.5, 1.0):
        y = height - bottom - share * (height - bottom - 22)
        out.append(f'<line class="rule" x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{round(top * share)}</text>')
    out.append(f'<text class="soft" x="{left}" y="{height - 6}">{attribute(when(start))}</text>')
    out.append(f'<text class="soft" x="{width - 12}" y="{height - 6}" text-anchor="end">{attribute(when(end))}</text>')
    path = [place(m) for m in moments if m.kind in ("saved", "resumed")]
    out.append(f'<polyline class="climb" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in path)}"/>')
    deleted = {m.step for m in moments if m.kind == "deleted"}
    for moment in moments:
        if moment.kind != "deleted":  # drawn with its save
            is_there = moment.step in held and moment.step not in deleted - set(held)
            out.append(_mark(moment, *place(moment), is_there=is_there, height=height - bottom, when=when))
    return "".join(out) + "</svg>"


def _mark(moment: Moment, x: float, y: float, *, is_there: bool, height: float, when: Callable[[float], str]) -> str:
    said = f"step {moment.step} {moment.kind}, {when(moment.when)}" + (f": {moment.text}" if moment.text else "")
    title = f"<title>{attribute(said[:400])}</title>"
    if moment.kind == "failed":
        return f'<path class="failed" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10">{title}</path>'
    if moment.kind == "resumed":
        return f'<path class="resumed" d="M{x - 5:.1f} {y - 6:.1f}l10 6l-10 6z">{title}</path>'
    if moment.kind == "layout changed":
        return f'<path class="changed" d="M{x:.1f} 14V{height:.1f}">{title}</path>'
    return f'<circle class="{"saved" if is_there else "gone"}" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'


def line_chart(points: Sequence[tuple[float, float]], label: str) -> str:
    """Draw a line through ``(x, y)``, with the limits of both; a gap where y is not finite."""
    width, height = 240, 84
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    head = f'<svg class="line" role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
    head += f'aria-label="{attribute(label)}">'
    if not finite:
        return head + "</svg>"
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_span, y_span = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    left, bottom = 50, height - 18
    placed = [
        (left + 4 + (x - min(xs)) / x_span * (width - left - 10), bottom - 4 - (y - min(ys)) / y_span * (bottom - 12))
        for x, y in finite
    ]
    limits = "".join(
        f'<text class="soft" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
        for x, y, anchor, text in (
            (left - 4, 12, "end", number(max(ys), 3)),
            (left - 4, bottom, "end", number(min(ys), 3)),
            (left, height - 4, "start", number(min(xs), 6)),
            (width - 4, height - 4, "end", number(max(xs), 6)),
        )
    )
    rules = f'<path class="rule" d="M{left} 2V{bottom}H{width - 2}"/>'
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in placed) if len(placed) <= 40 else ""
    return f'{head}{rules}{limits}<polyline points="{line}"/>{dots}</svg>'


def histogram(counts: Sequence[int], label: str, *, width: int = 112, height: int = 24) -> str:
    """Draw a histogram; the tallest bar has the picture's height."""
    if not counts:
        return ""
    tallest = max(counts) or 1
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - count / tallest * height:.1f}" width="{step:.1f}" '
        f'height="{count / tallest * height:.1f}"/>'
        for i, count in enumerate(counts)
        if count
    )
    return (
        f'<svg class="histogram" role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'aria-label="{attribute(label)}">{bars}</svg>'
    )


def shard_map(entry: TensorEntry, colour_of: dict[str, int], label: str) -> str:
    """Draw the boxes of a tensor, each with the colour and name of the file (the rank) that holds it.

    Dim 0 runs down, dim 1 across; further dims are left out, and a tensor of one dim is a column. Proportions follow
    the shape, but no side is shorter than a third of the other.
    """
    shape = entry.shape[:2] if len(entry.shape) >= 2 else (*entry.shape, 1) if entry.shape else (1, 1)
    longest = max(*shape, 1)
    height, width = (max(72.0, 216.0 * size / longest) for size in shape)
    out = [
        f'<svg class="shards" role="img" width="{width + 2:.0f}" height="{height + 2:.0f}" '
        f'viewBox="-1 -1 {width + 2:.0f} {height + 2:.0f}" aria-label="{attribute(label)}">'
    ]
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for shard in entry.shards:
        offsets, sizes = (*shard.box.offsets[:2], 0, 0)[:2], (*shard.box.sizes[:2], 1, 1)[:2]
        if not shard.box.numel or (offsets, sizes) in seen or len(seen) >= MAX_BOXES:
            continue
        seen.add((offsets, sizes))
        y, x = (o / max(n, 1) * side for o, n, side in zip(offsets, shape, (height, width), strict=True))
        h, w = (s / max(n, 1) * side for s, n, side in zip(sizes, shape, (height, width), strict=True))
        name = shard.file.removesuffix(".distcp")
        out.append(
            f'<rect class="c{colour_of.get(shard.file, 0)}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}">'
            f"<title>{attribute(f'{shard.box} in {shard.file}')}</title></rect>"
        )
        if h > 14 and w > 8 * len(name):
            out.append(f'<text x="{x + 4:.1f}" y="{y + min(h - 4, 14):.1f}">{attribute(name)}</text>')
    return "".join(out) + "</svg>"
