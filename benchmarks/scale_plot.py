"""Draw what ``scale_plans.py --json`` and ``bench_scale.py --json`` have measured, by the number of ranks: an SVG.

Run: python benchmarks/scale_plot.py --plans FILE --records FILE --out docs/scale.svg
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = """
  .bg { fill: #fff; } .grid { stroke: #dfe6ee; } .frame { stroke: #9fb0c2; fill: none; }
  .t { font: 600 15px system-ui, sans-serif; fill: #17324f; } .s { font: 12px system-ui, sans-serif; fill: #465a70; }
  .c0 { stroke: #2f6db3; fill: #2f6db3; } .c1 { stroke: #2f8a57; fill: #2f8a57; }
  .c2 { stroke: #b07d1a; fill: #b07d1a; } .c3 { stroke: #c8553d; fill: #c8553d; }
  path { fill: none !important; stroke-width: 2; } circle { stroke: none; }
  @media (prefers-color-scheme: dark) {
    .bg { fill: #10161d; } .grid { stroke: #24303c; } .frame { stroke: #5a6d80; } .t { fill: #e8f0f8; }
    .s { fill: #b4c3d2; } .c0 { stroke: #6ea3dd; fill: #6ea3dd; } .c1 { stroke: #58b983; fill: #58b983; }
    .c2 { stroke: #d9a83f; fill: #d9a83f; } .c3 { stroke: #e07a64; fill: #e07a64; }
  }
"""
WIDTH, HEIGHT, PANEL_W, PANEL_H, LEFT, TOP = 1000, 430, 400, 290, 70, 60
RANKS = (16, 32768)
SECONDS = (0.001, 100.0)

Series = tuple[str, list[tuple[float, float]]]
"""A label, and points: ranks and seconds."""


def series_of(found: Sequence[dict[str, Any]], name: str, label: str, **where: Any) -> Series:
    """The points of one quantity, of the rows that are as ``where`` says."""
    rows = [row for row in found if all(row[key] == value for key, value in where.items()) and row.get(name)]
    return label, sorted((row["ranks"], row[name]) for row in rows)


def at(x0: int, ranks: float, seconds: float) -> tuple[float, float]:
    """The place of a point in the panel that begins at ``x0``."""
    right = math.log(ranks / RANKS[0]) / math.log(RANKS[1] / RANKS[0])
    up = math.log(min(max(seconds, SECONDS[0]), SECONDS[1]) / SECONDS[0]) / math.log(SECONDS[1] / SECONDS[0])
    return x0 + right * PANEL_W, TOP + PANEL_H - up * PANEL_H


def panel(x0: int, title: str, drawn: Sequence[Series]) -> list[str]:
    """Axes, and a line for each series with its label below."""
    parts = [f'<text class="t" x="{x0}" y="{TOP - 20}">{title}</text>']
    for power in range(-3, 3):
        _, y = at(x0, RANKS[0], 10.0**power)
        parts.append(f'<line class="grid" x1="{x0}" x2="{x0 + PANEL_W}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="s" x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    for ranks in (64, 256, 1024, 4096, 16384):
        x, y = at(x0, ranks, SECONDS[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{y:.1f}"/>')
        parts.append(f'<text class="s" x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{ranks:,}</text>')
    parts.append(f'<rect class="frame" x="{x0}" y="{TOP}" width="{PANEL_W}" height="{PANEL_H}"/>')
    for number, (label, points) in enumerate(drawn):
        places = [at(x0, *point) for point in points]
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="c{number}" d="M{path}"/>')
        parts += [f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places]
        x, y = x0 + 205 * (number % 2), TOP + PANEL_H + 42 + 20 * (number // 2)
        parts.append(f'<circle class="c{number}" cx="{x + 5}" cy="{y - 4}" r="4"/>')
        parts.append(f'<text class="s" x="{x + 15}" y="{y}">{label}</text>')
    return parts


def picture(plans: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> str:
    """The SVG, legible on light and dark pages."""
    fsdp = {"world": "fsdp", "tensors": 3411}
    planned = [
        series_of(plans, "plan_s", "a rank plans", **fsdp),
        series_of(plans, "rank_0_s", "rank 0 sorts out", **fsdp),
        series_of(plans, "stock_global_s", "stock DCP: rank 0 plans", **fsdp),
    ]
    committed = [
        series_of(records, "commit_s", "rank 0 commits, 291 tensors", tensors=291),
        series_of(records, "commit_s", "rank 0 commits, 3,411", tensors=3411),
        series_of(records, "read_s", "a reader reads it, 291", tensors=291),
        series_of(records, "read_s", "a reader reads it, 3,411", tensors=3411),
    ]
    label = "Processor seconds by ranks: plans stay under a tenth of a second a rank, the commit grows with the shards."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>",
        f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        *panel(LEFT, "The plan of a first save: 3,411 tensors, FSDP", planned),
        *panel(LEFT + PANEL_W + 100, "The commit record", committed),
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(picture(json.loads(args.plans.read_text()), json.loads(args.records.read_text())))


if __name__ == "__main__":
    main()
