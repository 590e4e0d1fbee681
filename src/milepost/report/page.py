"""The report as one HTML file: text, tables and SVG made from values. Nothing is fetched, nothing runs but sorting.

Every string from a checkpoint is escaped, isolated from the text around it (right-to-left marks) and cut, so that a
hostile key is shown and does nothing else. The page carries a Content-Security-Policy that allows its own script and
style alone, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

from milepost.config import part_of
from milepost.format.summary import format_count
from milepost.parallelism.degrees import degrees_text
from milepost.report.gather import RunView, StepView, step_path
from milepost.report.pictures import attribute, histogram, line_chart, number, shard_map, stacked_bars, time_line
from milepost.report.profile import Grid, Movement, TensorProfile, grid_of
from milepost.run.branches import History
from milepost.storage.base import format_duration, format_nbytes

MAX_KEY = 300
MAX_MAPS = 24
MAX_MULTIPLES = 48
MAX_ROWS_SHOWN = 24
"""Longer tables scroll in a frame of their own, under their heads; on paper they are whole."""
NUM_SHADES = 12
"""Steps of the heat maps' colour; the stylesheet has a class for each, since the page allows no inline style."""


def page(view: RunView) -> str:
    """The whole document."""
    style, script = (files("milepost.report").joinpath(name).read_text() for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    sections = [section for section in _sections(view) if section]
    title = f"{view.path} - Milepost report"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{attribute(policy)}">'
        f'<link rel="icon" href="data:,"><title>{attribute(shown(title))}</title><style>{style}</style></head><body>'
        '<a class="skip" href="#main">Skip to the content</a>'
        f'{_header(view)}{_nav(sections)}<main id="main">{"".join(sections)}</main>{_footer(view)}'
        f"<script>{script}</script></body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def shown(text: str, limit: int = MAX_KEY) -> str:
    """``text`` with control and formatting characters spelled out, and the middle of a very long one left out."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...({len(text) - limit} characters)...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _text(text: str) -> str:
    return attribute(shown(text))


def _sections(view: RunView) -> Iterable[str]:
    yield _time_line(view)
    yield _saves(view)
    yield _metrics(view)
    yield _steps(view)
    yield _disk(view)
    yield _findings(view)
    yield _movement(view)
    yield _multiples(view)
    yield from (_tensors(view, part, title) for part, title in (("model", "Weights"), ("optimizer", "Optimizer state")))
    yield _maps(view)


# ---- the frame ----


def _header(view: RunView) -> str:
    last = History.of([step.entry for step in view.steps]).newest
    newest = next((step for step in view.steps if step.entry is last), view.steps[-1])
    facts = [
        ("steps", str(len(view.steps))),
        ("newest", f"step {newest.entry.step}"),
        ("on disk", format_nbytes(sum(step.entry.nbytes for step in view.steps))),
        ("parameters", format_count(newest.entry.num_parameters) if newest.entry.num_parameters else "unknown"),
        ("saved by", _ranks(newest)),
        ("verified", _verified(view)),
    ]
    items = "".join(f"<li>{attribute(name)} <b>{_text(value)}</b></li>" for name, value in facts)
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(view.made_s))
    return (
        f'<header><h1><bdi>{_text(view.path)}</bdi></h1><p class="soft">Milepost report, made {made}</p>'
        f'<ul class="facts">{items}</ul></header>'
    )


def _nav(sections: Sequence[str]) -> str:
    names = {
        "timeline": "Time line",
        "saves": "Saves",
        "metrics": "Metrics",
        "steps": "Steps",
        "disk": "Disk",
        "findings": "Findings",
        "movement": "Change",
        "norms": "Norms",
        "model": "Weights",
        "optimizer": "Optimizer",
        "maps": "Shards",
    }
    there = [name for name in names if any(f'<h2 id="{name}">' in section for section in sections)]
    links = "".join(f'<a href="#{name}">{names[name]}</a>' for name in there)
    return f'<nav aria-label="Sections"><div>{links}</div></nav>'


def _ranks(step: StepView) -> str:
    ranks = step.entry.world_size
    if not ranks:
        return "unknown"
    degrees = degrees_text(step.entry.layout)
    return f"{ranks} rank{'s' if ranks != 1 else ''}" + (f" ({degrees})" if degrees and ranks != 1 else "")


def _verified(view: RunView) -> str:
    read = [step for step in view.steps if step.check != "not read"]
    good = sum(step.check == "verified" for step in read)
    return f"{good} of {len(view.steps)} steps" if read else "not read"


def _footer(view: RunView) -> str:
    return (
        "<footer><p class='soft'>Figures are of a sample where a column SAMPLE says so: of the same elements in every "
        f"step. {_command('milepost report', view.path)}</p></footer>"
    )


def _command(command: str, *arguments: str) -> str:
    line = " ".join([command, *(shlex.quote(shown(argument)) for argument in arguments)])
    return (
        f'<span class="command"><code>{attribute(line)}</code><button type="button" class="copy">copy</button></span>'
    )


def _section(anchor: str, title: str, body: str, lead: str = "") -> str:
    lead = f"<p>{lead}</p>" if lead else ""
    return f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{attribute(title)}</h2>{lead}{body}</section>'


Cell = str | tuple[str, float] | tuple[str, float, str]
"""HTML of a cell; with the number that it is sorted by; with a CSS class."""


def _table(
    name: str, caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]], *, search: bool = False
) -> str:
    """A table whose columns sort by a click; heads that begin with ``#`` are of numbers."""
    head = "".join(
        f'<th scope="col"{" class=n" if h.startswith("#") else ""}><button type="button">{attribute(h.lstrip("#"))}'
        "</button></th>"
        for h in heads
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, heads[i].startswith('#')) for i, cell in enumerate(row))}</tr>" for row in rows
    )
    table = (
        f'<div class="wide{" tall" if len(rows) > MAX_ROWS_SHOWN else ""}" tabindex="0" role="region" '
        f'aria-label="{attribute(caption)}"><table id="{name}">'
        f"<caption>{attribute(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if not search:
        return table
    return (
        f'<label class="search">Search <input type="search" data-table="{name}"></label> '
        f'<span id="{name}-count" class="soft" role="status">{len(rows)} of {len(rows)} rows</span>{table}'
    )


def _cell(cell: Cell, numeric: bool) -> str:
    if isinstance(cell, str):
        return f"<td>{cell}</td>" if not numeric else f'<td class="n">{cell}</td>'
    style = " ".join((["n"] if numeric else []) + ([cell[2]] if len(cell) == 3 else []))
    value = "" if math.isnan(cell[1]) else f"{cell[1]:.17g}"
    return f'<td data-v="{value}"{f" class={chr(34)}{style}{chr(34)}" if style else ""}>{cell[0]}</td>'


def _key(key: str) -> str:
    return f'<bdi class="key">{_text(key)}</bdi>'


# ---- the run ----


def _time_line(view: RunView) -> str:
    """What happened when: saves, failures, resumes, changes of layout, deletions."""
    if len(view.moments) < 2:
        return ""
    held = {step.entry.step for step in view.steps if step.entry.is_usable}
    counts = {kind: sum(moment.kind == kind for moment in view.moments) for kind in _MARKS}
    gone = len({m.step for m in view.moments if m.kind == "saved"} - held)
    legend = "".join(
        f'<li><svg width="14" height="14" viewBox="0 0 14 14" aria-hidden="true">{mark}</svg> {text}: {count}</li>'
        for kind, (mark, text) in _MARKS.items()
        if (count := gone if kind == "deleted" else counts[kind])
    )
    rows: list[list[Cell]] = [
        [
            (_when(moment.when), moment.when),
            f'<span class="{"bad" if moment.kind == "failed" else ""}">{moment.kind}</span>',
            (str(moment.step), float(moment.step)),
            f'<span class="text">{_text(moment.text)}</span>',
        ]
        for moment in view.moments
        if moment.kind != "saved"
    ]
    body = f'<ul class="legend">{legend}</ul><div class="wide" tabindex="0" role="region" aria-label="Steps over time">'
    body += f"{time_line(view.moments, held, _when)}</div>"
    if rows:
        body += _table("event-table", "All but the saves", ("TIME (UTC)", "EVENT", "#STEP", "DETAILS"), rows)
    lead = "The line climbs with each committed save, and falls where the run resumed: those steps were trained twice."
    return _section("timeline", "Time line", body, lead)


_MARKS = {
    "saved": ('<circle class="saved" cx="7" cy="7" r="4"/>', "committed"),
    "deleted": ('<circle class="gone" cx="7" cy="7" r="4"/>', "no longer there"),
    "failed": ('<path class="failed" d="M2 2l10 10m0 -10l-10 10"/>', "failed"),
    "resumed": ('<path class="resumed" d="M2 1l10 6l-10 6z"/>', "resumed"),
    "layout changed": ('<path class="changed" d="M7 0V14"/>', "layout changed"),
}
"""Of each kind of event its mark and what it says in the legend."""


def _saves(view: RunView) -> str:
    parts = (("p0", "stalled"), ("p1", "stage"), ("p2", "write"), ("p3", "commit"))
    if not view.saves:
        return ""
    recent = view.saves[-40:]
    bars = [
        (
            f"step {save.step}",
            [(style, name, value) for (style, name), value in zip(parts, (save.stall_s, save.stage_s, save.write_s,
                                                                          save.commit_s), strict=True)],
        )
        for save in recent
    ]  # fmt: skip
    legend = "".join(f'<li><span class="swatch {style}"></span>{name}</li>' for style, name in parts)
    rows: list[list[Cell]] = [
        [
            (str(save.step), save.step),
            (_when(save.finished), save.finished),
            _text(save.kind),
            _text(save.reason),
            *((f"{value:.3f}", value) for value in (save.stall_s, save.stage_s, save.write_s, save.commit_s)),
            (format_nbytes(save.nbytes), float(save.nbytes)),
            (f"{save.rate / 1e9:.2f}", save.rate),
        ]
        for save in view.saves
    ]
    seconds = tuple(f"#{name.upper()} s" for _, name in parts)
    heads = ("#STEP", "TIME (UTC)", "HOLDS", "REASON", *seconds, "#BYTES (rank 0)", "#GB/s")
    table = _table("save-table", "Saves, oldest first", heads, rows)
    body = f"<ul class='legend'>{legend}</ul>{stacked_bars(bars, 's')}{table}"
    lead = (
        "What each committed save cost, as rank 0 measured it. Training was stalled for the first part only; in the "
        "background modes the rest passed while training went on."
    )
    return _section("saves", "What each save cost", body, lead)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if 0 < seconds < 1e11 else "-"


def _metrics(view: RunView) -> str:
    names = sorted({name for step in view.steps if step.manifest for name in step.manifest.metrics})
    if not names:
        return ""
    figures: list[str] = []
    rows: list[list[Cell]] = []
    for name in names[:MAX_MULTIPLES]:
        points = [(step.entry.step, step.manifest.metrics[name]) for step in view.steps
                  if step.manifest and name in step.manifest.metrics]  # fmt: skip
        figures.append(_multiple(name, points, number(points[-1][1])))
        rows += [[_key(name), (str(step), float(step)), (number(value), value)] for step, value in points]
    table = _table("metric-table", "Metrics recorded with the steps", ("METRIC", "#STEP", "#VALUE"), rows)
    return _section("metrics", "Metrics", f'<div class="multiples">{"".join(figures)}</div>{table}')


def _multiple(name: str, points: Sequence[tuple[float, float]], last: str) -> str:
    label = f"{shown(name, 80)}, steps {points[0][0]:g} to {points[-1][0]:g}"
    return (
        f"<figure><figcaption>{_key(name)}<b>{attribute(last)}</b></figcaption>{line_chart(points, label=label)}"
        "</figure>"
    )


def _steps(view: RunView) -> str:
    rows: list[list[Cell]] = []
    for step in view.steps:
        entry = step.entry
        style = "good" if step.check == "verified" else "" if step.check.startswith(("not read", "read")) else "bad"
        degrees = _ranks(step)
        rows.append(
            [
                (str(entry.step), entry.step),
                (_text(entry.state), 0.0, "" if entry.is_usable else "bad"),
                _text(entry.kind or "-"),
                (_when(entry.created_s), entry.created_s),
                (format_nbytes(entry.nbytes), float(entry.nbytes)),
                (format_count(entry.num_parameters) if entry.num_parameters else "-", float(entry.num_parameters)),
                _text(degrees),
                f'<span class="{style}">{_text(step.check)}</span>',
                _command("milepost inspect", step_path(view, step)),
            ]
        )
    heads = ("#STEP", "STATE", "HOLDS", "COMMITTED (UTC)", "#SIZE", "#PARAMETERS", "SAVED BY", "CHECK", "COMMAND")
    lead = "What each step holds. <em>verified</em>: every byte was read and has the digest that was saved with it."
    return _section("steps", "Steps", _table("step-table", "Steps, oldest first", heads, rows), lead)


def _disk(view: RunView) -> str:
    growth = view.forecast
    bars = [(f"step {s.entry.step}", [("p1", "on disk", s.entry.nbytes / 1e6)]) for s in view.steps[-40:]]
    text = (
        f"The steps take {format_nbytes(growth.nbytes_now)}; the largest save {format_nbytes(growth.nbytes_per_save)}."
    )
    if growth.nbytes_per_day is not None and growth.saves_per_hour is not None:
        every = format_duration(3600 / growth.saves_per_hour)
        text += (
            f" One save every {every} writes {format_nbytes(growth.nbytes_per_day)} a day; what stays is up to "
            "<code>checkpoint.keep_latest_k</code>."
        )
    return _section("disk", "Disk use", stacked_bars(bars, "MB"), text)


def _findings(view: RunView) -> str:
    """NaN, Inf, saturated values, dead rows, by name; only the newest step that was read."""
    if not view.read:
        return ""
    step = view.read[-1]
    found = [(key, profile) for key, profile in step.profiles.items() if profile.statistics.flags()]
    if not found:
        text = f"No NaN, no Inf, no dead rows, no saturated values were found in step {step.entry.step}."
        return _section("findings", "Findings", f'<p class="good">{text}</p>')
    rows: list[list[Cell]] = [
        [_key(key), f'<span class="warn">{attribute(", ".join(profile.statistics.flags()))}</span>', _share(profile),
         _command("milepost stats", step_path(view, step), key)]
        for key, profile in found
    ]  # fmt: skip
    heads = ("KEY", "FOUND", "SAMPLE", "COMMAND")
    return _section("findings", "Findings", _table("finding-table", f"In step {step.entry.step}", heads, rows))


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _share(profile: TensorProfile) -> str:
    return "all" if profile.share >= 1 else f"{profile.share:.2%}"


# ---- the weights ----


def _movement(view: RunView) -> str:
    """The heat maps: kinds of tensor x layers for the last two steps, layers x steps for all that were read."""
    moved = [step for step in view.read if any(p.movement for p in _part(step, "model").values())]
    if not moved:
        return ""
    last = moved[-1]
    profiles = {key: p for key, p in _part(last, "model").items() if p.movement}
    grid = grid_of(list(profiles))
    changes = {key: _movement_of(p).relative_norm for key, p in profiles.items()}
    heads = [f"L{layer}" for layer in grid.layers]
    rows = [
        (row, [changes.get(grid.keys.get((row, layer), ""), math.nan) for layer in grid.layers]) for row in grid.rows
    ]
    body = _heat("heat-layers", f"From step {last.since} to step {last.entry.step}, by layer", "", heads, rows)
    if grid.rest:
        body += _heat("heat-rest", "Tensors of no layer", "", ["change"], [(key, [changes[key]]) for key in grid.rest])
    if len(moved) > 1:
        body += _over_steps(moved, grid)
    lead = (
        "The norm of the difference over the norm before. A layer that stands out, or does not move at all, is worth a "
        f"look. {_command('milepost diff', _step_at(view, last.since), step_path(view, last))}"
    )
    return _section("movement", "Change since the step before", body, lead)


def _movement_of(profile: TensorProfile) -> Movement:
    assert profile.movement is not None
    return profile.movement


def _step_at(view: RunView, step: int | None) -> str:
    found = next((s for s in view.steps if s.entry.step == step), view.steps[0])
    return step_path(view, found)


def _part(step: StepView, part: str) -> Mapping[str, TensorProfile]:
    return {key: profile for key, profile in step.profiles.items() if part_of(key) == part}


def _over_steps(moved: Sequence[StepView], grid: Grid) -> str:
    """Of all tensors of a layer together: the root mean square of their relative changes."""

    def change(step: StepView, layer: int) -> float:
        keys = [grid.keys[row, layer] for row in grid.rows if (row, layer) in grid.keys]
        found = [p.movement.relative_norm for key in keys if (p := step.profiles.get(key)) and p.movement]
        return math.sqrt(sum(x * x for x in found) / len(found)) if found else math.nan

    heads = [f"step {step.entry.step}" for step in moved]
    rows = [(f"layer {layer}", [change(step, layer) for step in moved]) for layer in grid.layers]
    return _heat("heat-steps", "Layers x steps", "", heads, rows)


def _heat(
    name: str, caption: str, corner: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]
) -> str:
    """A heat map that is a table: the number in each cell, its share of the largest as the cell's shade."""
    largest = max((v for _, values in rows for v in values if math.isfinite(v)), default=0.0) or 1.0
    head = "".join(f'<th scope="col" class="n"><button type="button">{attribute(h)}</button></th>' for h in heads)
    body = []
    for label, values in rows:
        cells = "".join(
            f'<td data-v="{value:.17g}" class="h{round(NUM_SHADES * max(value, 0) / largest)}">{value:.2%}</td>'
            if math.isfinite(value)
            else '<td data-v="">-</td>'
            for value in values
        )
        body.append(f'<tr><th scope="row" class="key">{_key(label)}</th>{cells}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{attribute(caption)}">'
        f'<table class="heat" id="{name}">'
        f'<caption>{attribute(caption)}</caption><thead><tr><th scope="col"><button type="button">{corner or "tensor"}'
        f"</button></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _multiples(view: RunView) -> str:
    """The norm of each kind of tensor over the steps."""
    if len(view.read) < 2:
        return ""
    grid = grid_of([key for key in view.read[-1].profiles if part_of(key) == "model"])
    kinds = [(row, [grid.keys[row, layer] for layer in grid.layers if (row, layer) in grid.keys]) for row in grid.rows]
    kinds += [(key, [key]) for key in grid.rest]
    figures = []
    for name, keys in kinds[:MAX_MULTIPLES]:
        points = []
        for step in view.read:
            norms = [step.profiles[key].statistics.norm / math.sqrt(step.profiles[key].share) for key in keys
                     if key in step.profiles and step.profiles[key].share]  # fmt: skip
            if norms:
                points.append((float(step.entry.step), math.sqrt(sum(norm * norm for norm in norms))))
        if points:
            figures.append(_multiple(name, points, f"{number(points[0][1])} to {number(points[-1][1])}"))
    lead = "The Euclidean norm of all tensors of a kind together, at each step that was read."
    return _section("norms", "Norms over the steps", f'<div class="multiples">{"".join(figures)}</div>', lead)


def _tensors(view: RunView, part: str, title: str) -> str:
    step = next((step for step in reversed(view.read) if _part(step, part)), None)
    if step is None:
        return ""
    rows: list[list[Cell]] = []
    for key, profile in _part(step, part).items():
        s, m = profile.statistics, profile.movement
        norm = s.norm / math.sqrt(profile.share) if profile.share else math.nan
        none = math.nan
        relative, cosine, changed = (m.relative_norm, m.cosine, m.share_changed) if m else (none, none, none)
        rows.append(
            [
                _key(key),
                _text(f"{s.dtype} {list(s.shape)}"),
                histogram(profile.histogram, f"histogram from {number(s.minimum)} to {number(s.maximum)}"),
                *((attribute(number(v)), v) for v in (norm, s.mean, s.std, s.minimum, s.maximum)),
                *((_or_dash(v, form), v) for v, form in ((relative, ".3%"), (cosine, ".6f"), (changed, ".1%"))),
                f'<span class="warn">{attribute(", ".join(s.flags()))}</span>',
                _share(profile),
            ]
        )
    numbers = ("#NORM", "#MEAN", "#STD", "#MIN", "#MAX", "#CHANGE", "#COSINE", "#CHANGED")
    heads = ("KEY", "TENSOR", "HISTOGRAM", *numbers, "FLAGS", "SAMPLE")
    since = f" CHANGE is since step {step.since}." if step.since is not None else ""
    lead = f"Step {step.entry.step}.{since} {_command('milepost stats', step_path(view, step))}"
    caption = f"{title} of step {step.entry.step}"
    return _section(part, title, _table(f"{part}-table", caption, heads, rows, search=True), lead)


# ---- the shards ----


def _maps(view: RunView) -> str:
    """One map for all tensors that are spread alike."""
    step = next((step for step in reversed(view.steps) if step.manifest and step.manifest.tensors), None)
    if step is None or step.manifest is None:
        return ""
    names = sorted({shard.file for entry in step.manifest.tensors.values() for shard in entry.shards})
    colours = {name: index % 8 for index, name in enumerate(names)}
    alike: dict[object, list[str]] = {}
    for key, entry in step.manifest.tensors.items():
        spread = (entry.shape, tuple((shard.box, shard.file) for shard in entry.shards if shard.box.numel))
        alike.setdefault(spread, []).append(key)
    figures: list[str] = []
    rows: list[list[Cell]] = []
    for keys in sorted(alike.values(), key=lambda keys: (part_of(keys[0]) != "model", -len(keys)))[:MAX_MAPS]:
        entry = step.manifest.tensors[keys[0]]
        label = f"shards of {shown(keys[0], 80)}"
        others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        figures.append(
            f"<figure>{shard_map(entry, colours, label)}<figcaption>{_key(keys[0])}{others}<br>"
            f"{_text(str(list(entry.shape)))}</figcaption></figure>"
        )
        rows += [
            [
                _key(keys[0]),
                _text(str(shard.box)),
                _text(shard.file),
                (format_nbytes(shard.data_nbytes), float(shard.data_nbytes)),
            ]
            for shard in entry.shards[:64]
            if shard.box.numel
        ]
    rest = f" The first {MAX_MAPS} of {len(alike)} kinds of spread are drawn." if len(alike) > MAX_MAPS else ""
    table = _table(
        "shard-table", "Which file holds which box (64 boxes a tensor at most)", ("KEY", "BOX", "FILE", "#BYTES"), rows
    )
    lead = (
        f"Which rank's file holds which part of a tensor in step {step.entry.step}: dim 0 down, dim 1 across; tensors "
        f"spread alike share a map.{rest} {_command('milepost inspect --shards', step_path(view, step))}"
    )
    return _section("maps", "Where the shards are", f'<div class="maps">{"".join(figures)}</div>{table}', lead)
