"""The report's pictures: SVG as text, from numbers. Colours are CSS classes, so that the page's themes decide them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from milepost.format.manifest import TensorEntry

BAR_HEIGHT, BAR_GAP, BAR_WIDTH = 16, 6, 480
MAX_BOXES = 4_096


def number(value: float, digits: int = 4) -> str:
    """A number for people: ``0.0123``, ``1.2e-07``, ``NaN``."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    return f"{value:.{digits}g}"


def attribute(text: str) -> str:
    """``text`` as an attribute's value, or as a text node."""
    return html.escape(text, quote=True)


def stacked_bars(rows: Sequence[tuple[str, Sequence[tuple[str, str, float]]]], unit: str) -> str:
    """A bar a row, of parts ``(class, name, value)`` one after the other, all on one scale."""
    if not rows:
        return ""
    longest = max((sum(value for _, _, value in parts) for _, parts in rows), default=0.0) or 1.0
    left = 110
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


def line_chart(points: Sequence[tuple[float, float]], *, width: int = 120, height: int = 32, label: str = "") -> str:
    """A line through ``(x, y)``; a gap where y is not finite."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    head = f'<svg class="line" role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
    head += f'aria-label="{attribute(label)}">'
    if not finite:
        return head + "</svg>"
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_span, y_span = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    placed = [
        (3 + (x - min(xs)) / x_span * (width - 6), height - 4 - (y - min(ys)) / y_span * (height - 8))
        for x, y in finite
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in placed) if len(placed) <= 40 else ""
    return f'{head}<polyline points="{line}"/>{dots}</svg>'


def histogram(counts: Sequence[int], label: str, *, width: int = 112, height: int = 24) -> str:
    """Bars of a histogram, the tallest as high as the picture."""
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
    """The boxes of a tensor, each in the colour and with the name of the file (the rank) that holds it.

    Dim 0 goes down, dim 1 across; of more dims the others are left out, of one dim the tensor is a column. Sizes are
    those of the shape, but no side is shorter than a third of the other.
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
