"""The picture of the documentation's start page: what happens in a save and in a resume.

``docs/generate.py`` writes it, ``docs/flow.svg``.
"""

from __future__ import annotations

STYLE = """
  .bg { fill: #fff; } .box { fill: #f2f6fb; stroke: #5b7ea6; stroke-width: 1.4; }
  .disk { fill: #fff7e6; stroke: #b07d1a; stroke-width: 1.4; }
  .done { fill: #e8f6ee; stroke: #2f8a57; stroke-width: 1.6; } .train { fill: #5b7ea6; }
  .stall { fill: #c8553d; }
  .t { font: 600 14px system-ui, sans-serif; fill: #17324f; }
  .s { font: 12px system-ui, sans-serif; fill: #465a70; }
  .h { font: 700 16px system-ui, sans-serif; fill: #17324f; }
  .m { font: 12px ui-monospace, monospace; fill: #465a70; }
  .w { font: 600 12px system-ui, sans-serif; fill: #fff; }
  .a { stroke: #6d8299; stroke-width: 1.6; fill: none; } .head { fill: #6d8299; }
  .lane { stroke: #c9d4e0; stroke-dasharray: 3 4; }
  @media (prefers-color-scheme: dark) {
    .bg { fill: #10161d; } .box { fill: #1a2735; stroke: #7ea3cc; } .disk { fill: #2e2614; stroke: #d9a83f; }
    .done { fill: #15291e; stroke: #58b983; }
    .train { fill: #4f7fb3; } .stall { fill: #d4664e; } .t, .h { fill: #e8f0f8; } .s, .m { fill: #b4c3d2; }
    .a { stroke: #93a8bd; }
    .head { fill: #93a8bd; } .lane { stroke: #3a4a5a; }
  }
"""
WIDTH, HEIGHT = 1000, 620


def picture() -> str:
    """The SVG, legible on light and dark pages."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="A save: staged '
        "in memory, written, signed off by each rank, committed by one rename. A resume: the newest committed step is "
        'chosen, its shards are read for the new layout, every block is checked.">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
        f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',  # whatever the page behind it is
        *_save(),
        *_resume(),
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def _box(x: int, y: int, w: int, h: int, title: str, *lines: str, style: str = "box") -> str:
    text = "".join(f'<text class="s" x="{x + 14}" y="{y + 46 + 17 * i}">{line}</text>' for i, line in enumerate(lines))
    return (
        f'<rect class="{style}" x="{x}" y="{y}" width="{w}" height="{h}" rx="9"/>'
        f'<text class="t" x="{x + 14}" y="{y + 25}">{title}</text>{text}'
    )


def _arrow(path: str) -> str:
    return f'<path class="a" marker-end="url(#tip)" d="{path}"/>'


def _text(style: str, x: int, y: int, text: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _save() -> list[str]:
    out = [_text("h", 20, 32, "A save")]
    # the training thread: steps, with the short time that a save takes of it
    x = 20
    for step, width in ((38, 128), (39, 128), (40, 128)):
        out.append(f'<rect class="train" x="{x}" y="50" width="{width}" height="26" rx="4"/>')
        out.append(_text("w", x + width // 2, 67, f"step {step}", "middle"))
        x += width + 4
    out.append(f'<rect class="stall" x="{x}" y="50" width="26" height="26" rx="4"/>')
    x += 30
    for step in (41, 42, 43, 44):
        out.append(f'<rect class="train" x="{x}" y="50" width="128" height="26" rx="4"/>')
        out.append(_text("w", x + 64, 67, f"step {step}", "middle"))
        x += 132
    out += [
        _text("s", 430, 42, "training is stalled only while the state is staged", "middle"),
        _box(
            20,
            120,
            190,
            108,
            "1  Plan",
            "keys, shapes and shards",
            "of every rank: each box",
            "is written exactly once",
        ),
        _box(
            236,
            120,
            190,
            108,
            "2  Stage",
            "each rank copies its shards",
            "to host memory, laid out",
            "as the file will be",
        ),
        _box(
            452,
            120,
            220,
            108,
            "3  Write",
            "each rank its own file, with",
            "a CRC-32 of every 4 MiB;",
            "synced, then signed off",
        ),
        _box(
            698,
            120,
            282,
            108,
            "4  Commit",
            "rank 0 has all sign-offs, checks",
            "sizes and coverage, writes the",
            "manifest: one atomic rename",
            style="done",
        ),
        _arrow("M210 174H234"),
        _arrow("M426 174H450"),
        _arrow("M672 174H696"),
        _arrow("M422 78C422 100 331 96 331 118"),
        # what is on disk
        _box(
            452,
            262,
            220,
            76,
            "The attempt",
            "no reader takes it for a step;",
            "after a crash it is removed",
            style="disk",
        ),
        _box(698, 262, 282, 76, "step-40", "__0_0.distcp  __1_0.distcp ...", ".metadata  milepost.json", style="done"),
        _arrow("M562 228V260"),
        _arrow("M839 228V260"),
        _arrow("M672 300H696"),
        _text("s", 20, 276, "Whatever dies, and whenever: a scan of the folder"),
        _text("s", 20, 294, "shows the state before the save or the state after it."),
        _text("s", 20, 318, "Older steps are deleted only now, after the commit."),
        '<path class="lane" d="M20 366H980"/>',
    ]
    return out


def _resume() -> list[str]:
    return [
        _text("h", 20, 400, "A resume, on any number of ranks"),
        _box(
            20,
            424,
            206,
            108,
            "1  Choose",
            "the newest committed step",
            "of the branch written last:",
            "one rank looks, all are told",
        ),
        _box(
            252,
            424,
            206,
            108,
            "2  Compare",
            "all missing, unexpected and",
            "unlike keys in one report,",
            "before a byte is read",
        ),
        _box(
            484,
            424,
            226,
            108,
            "3  Read",
            "each rank the parts of the saved",
            "shards that its own need,",
            "straight into its tensors",
        ),
        _box(
            736,
            424,
            244,
            108,
            "4  Check",
            "every block against its CRC-32;",
            "then step 41 trains on, with the",
            "same data and random numbers",
            style="done",
        ),
        _arrow("M226 478H250"),
        _arrow("M458 478H482"),
        _arrow("M710 478H734"),
        _arrow("M858 532V578H123V534"),
        _text(
            "s",
            490,
            598,
            "a block that changed since it was written: the step is marked damaged, the one before it is taken",
            "middle",
        ),
    ]
