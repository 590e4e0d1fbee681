"""The report of a run as one HTML file: text, tables and SVG."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence

from milepost.config import part_of
from milepost.format.summary import format_count
from milepost.parallelism.degrees import degrees_text
from milepost.report.frame import (
    Cell,
    command_html,
    document,
    header_html,
    heat_html,
    key_html,
    section_html,
    shown,
    table_html,
    text_html,
)
from milepost.report.gather import RunView, StepView, step_path
from milepost.report.pictures import attribute, histogram, line_chart, number, shard_map, stacked_bars, time_line
from milepost.report.profile import Grid, Movement, TensorProfile, grid_of
from milepost.run.branches import History
from milepost.storage.base import format_duration, format_nbytes

MAX_MAPS = 24
MAX_MULTIPLES = 48


def page(view: RunView) -> str:
    """Return the HTML document."""
    sections = [section for section in _sections(view) if section]
    return document(f"{view.path} - Milepost report", _header(view), sections, _NAMES, _footer(view))


_NAMES = {
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
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(view.made_s))
    return header_html(view.path, f"Milepost report, made {made}", facts)


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
        "<p class='soft'>Figures are of a sample where a column SAMPLE says so: of the same elements in every step. "
        f"{command_html('milepost report', view.path)}</p>"
    )


# ---- the run ----


def _time_line(view: RunView) -> str:
    """Return the time line of saves, failures, resumes, changes of degrees and deletions."""
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
            f'<span class="text">{text_html(moment.text)}</span>',
        ]
        for moment in view.moments
        if moment.kind != "saved"
    ]
    body = f'<ul class="legend">{legend}</ul><div class="wide" tabindex="0" role="region" aria-label="Steps over time">'
    body += f"{time_line(view.moments, held, _when)}</div>"
    if rows:
        body += table_html("event-table", "All but the saves", ("TIME (UTC)", "EVENT", "#STEP", "DETAILS"), rows)
    lead = "The line rises with each committed save and falls where the run resumed: those steps were trained twice."
    return section_html("timeline", "Time line", body, lead)


_MARKS = {
    "saved": ('<circle class="saved" cx="7" cy="7" r="4"/>', "committed"),
    "deleted": ('<circle class="gone" cx="7" cy="7" r="4"/>', "no longer there"),
    "failed": ('<path class="failed" d="M2 2l10 10m0 -10l-10 10"/>', "failed"),
    "resumed": ('<path class="resumed" d="M2 1l10 6l-10 6z"/>', "resumed"),
    "layout changed": ('<path class="changed" d="M7 0V14"/>', "layout changed"),
}
"""Mark and legend text of each kind of event."""


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
            text_html(save.kind),
            text_html(save.reason),
            *((f"{value:.3f}", value) for value in (save.stall_s, save.stage_s, save.write_s, save.commit_s)),
            (format_nbytes(save.nbytes), float(save.nbytes)),
            (f"{save.rate / 1e9:.2f}", save.rate),
        ]
        for save in view.saves
    ]
    seconds = tuple(f"#{name.upper()} s" for _, name in parts)
    heads = ("#STEP", "TIME (UTC)", "HOLDS", "REASON", *seconds, "#BYTES (rank 0)", "#GB/s")
    table = table_html("save-table", "Saves, oldest first", heads, rows)
    body = f"<ul class='legend'>{legend}</ul>{stacked_bars(bars, 's')}{table}"
    lead = (
        "The cost of each committed save, as measured on rank 0. Training was stalled for the first part only; in the "
        "background modes the rest ran while training continued."
    )
    return section_html("saves", "Cost of each save", body, lead)


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
        rows += [[key_html(name), (str(step), float(step)), (number(value), value)] for step, value in points]
    table = table_html("metric-table", "Metrics recorded with the steps", ("METRIC", "#STEP", "#VALUE"), rows)
    return section_html("metrics", "Metrics", f'<div class="multiples">{"".join(figures)}</div>{table}')


def _multiple(name: str, points: Sequence[tuple[float, float]], last: str) -> str:
    label = f"{shown(name, 80)}, steps {points[0][0]:g} to {points[-1][0]:g}"
    return (
        f"<figure><figcaption>{key_html(name)}<b>{attribute(last)}</b></figcaption>{line_chart(points, label)}</figure>"
    )


def _steps(view: RunView) -> str:
    rows: list[list[Cell]] = []
    for step in view.steps:
        entry = step.entry
        style = "good" if step.check == "verified" else "bad" if step.is_bad else ""
        degrees = _ranks(step)
        rows.append(
            [
                (str(entry.step), entry.step),
                (text_html(entry.state), 0.0, "" if entry.is_usable else "bad"),
                text_html(entry.kind or "-"),
                (_when(entry.created_s), entry.created_s),
                (format_nbytes(entry.nbytes), float(entry.nbytes)),
                (format_count(entry.num_parameters) if entry.num_parameters else "-", float(entry.num_parameters)),
                text_html(degrees),
                f'<span class="{style}">{text_html(step.check)}</span>',
                command_html("milepost inspect", step_path(view, step)),
            ]
        )
    heads = ("#STEP", "STATE", "HOLDS", "COMMITTED (UTC)", "#SIZE", "#PARAMETERS", "SAVED BY", "CHECK", "COMMAND")
    lead = "The content of each step. <em>verified</em>: every byte was read and matches its recorded digest."
    return section_html("steps", "Steps", table_html("step-table", "Steps, oldest first", heads, rows), lead)


def _disk(view: RunView) -> str:
    growth = view.forecast
    bars = [(f"step {s.entry.step}", [("p1", "on disk", s.entry.nbytes / 1e6)]) for s in view.steps[-40:]]
    text = (
        f"The steps take {format_nbytes(growth.nbytes_now)}; the largest save {format_nbytes(growth.nbytes_per_save)}."
    )
    if growth.nbytes_per_day is not None and growth.saves_per_hour is not None:
        every = format_duration(3600 / growth.saves_per_hour)
        text += (
            f" One save every {every} writes {format_nbytes(growth.nbytes_per_day)} per day; how many are "
            "kept depends on "
            "<code>checkpoint.keep_latest_k</code>."
        )
    return section_html("disk", "Disk use", stacked_bars(bars, "MB"), text)


def _findings(view: RunView) -> str:
    """List tensors with NaN, Inf, saturated values or dead rows in the newest step that was read."""
    if not view.read:
        return ""
    step = view.read[-1]
    found = [(key, profile) for key, profile in step.profiles.items() if profile.statistics.flags()]
    if not found:
        text = f"No NaN, Inf, dead rows or saturated values were found in step {step.entry.step}."
        return section_html("findings", "Findings", f'<p class="good">{text}</p>')
    rows: list[list[Cell]] = [
        [
            key_html(key),
            f'<span class="warn">{attribute(", ".join(profile.statistics.flags()))}</span>',
            _share(profile),
            command_html("milepost stats", step_path(view, step), key),
        ]
        for key, profile in found
    ]
    heads = ("KEY", "FOUND", "SAMPLE", "COMMAND")
    return section_html("findings", "Findings", table_html("finding-table", f"In step {step.entry.step}", heads, rows))


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _share(profile: TensorProfile) -> str:
    return "all" if profile.share >= 1 else f"{profile.share:.2%}"


# ---- the weights ----


def _movement(view: RunView) -> str:
    """Return the heat maps: kinds of tensor x layers for the last two steps, layers x steps for all steps read."""
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
    body = heat_html("heat-layers", f"From step {last.since} to step {last.entry.step}, by layer", heads, rows)
    if grid.rest:
        body += heat_html(
            "heat-rest", "Tensors outside the layers", ["change"], [(key, [changes[key]]) for key in grid.rest]
        )
    if len(moved) > 1:
        body += _over_steps(moved, grid)
    lead = (
        "The norm of the difference over the norm before. A layer that stands out, or does not change at "
        "all, deserves a "
        f"look. {command_html('milepost diff', _step_at(view, last.since), step_path(view, last))}"
    )
    return section_html("movement", "Change since the step before", body, lead)


def _movement_of(profile: TensorProfile) -> Movement:
    assert profile.movement is not None
    return profile.movement


def _step_at(view: RunView, step: int | None) -> str:
    found = next((s for s in view.steps if s.entry.step == step), view.steps[0])
    return step_path(view, found)


def _part(step: StepView, part: str) -> Mapping[str, TensorProfile]:
    return {key: profile for key, profile in step.profiles.items() if part_of(key) == part}


def _over_steps(moved: Sequence[StepView], grid: Grid) -> str:
    """Return the heat map of layers x steps: the root mean square of the relative changes of a layer's tensors."""

    def change(step: StepView, layer: int) -> float:
        keys = [grid.keys[row, layer] for row in grid.rows if (row, layer) in grid.keys]
        found = [p.movement.relative_norm for key in keys if (p := step.profiles.get(key)) and p.movement]
        return math.sqrt(sum(x * x for x in found) / len(found)) if found else math.nan

    heads = [f"step {step.entry.step}" for step in moved]
    rows = [(f"layer {layer}", [change(step, layer) for step in moved]) for layer in grid.layers]
    return heat_html("heat-steps", "Layers x steps", heads, rows)


def _multiples(view: RunView) -> str:
    """Return charts of the norm of each kind of tensor over the steps."""
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
    lead = "The Euclidean norm over all tensors of a kind, at each step that was read."
    return section_html("norms", "Norms by step", f'<div class="multiples">{"".join(figures)}</div>', lead)


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
                key_html(key),
                text_html(f"{s.dtype} {list(s.shape)}"),
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
    lead = f"Step {step.entry.step}.{since} {command_html('milepost stats', step_path(view, step))}"
    caption = f"{title} of step {step.entry.step}"
    return section_html(part, title, table_html(f"{part}-table", caption, heads, rows, search=True), lead)


# ---- the shards ----


def _maps(view: RunView) -> str:
    """Return shard maps, one for all tensors sharded alike."""
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
            f"<figure>{shard_map(entry, colours, label)}<figcaption>{key_html(keys[0])}{others}<br>"
            f"{text_html(str(list(entry.shape)))}</figcaption></figure>"
        )
        rows += [
            [
                key_html(keys[0]),
                text_html(str(shard.box)),
                text_html(shard.file),
                (format_nbytes(shard.data_nbytes), float(shard.data_nbytes)),
            ]
            for shard in entry.shards[:64]
            if shard.box.numel
        ]
    rest = f" The first {MAX_MAPS} of {len(alike)} ways of sharding are drawn." if len(alike) > MAX_MAPS else ""
    table = table_html(
        "shard-table",
        "File and box of each shard (at most 64 boxes per tensor)",
        ("KEY", "BOX", "FILE", "#BYTES"),
        rows,
    )
    lead = (
        f"The rank whose file holds each part of a tensor in step {step.entry.step}: dim 0 down, dim 1 across; tensors "
        f"sharded alike share a map.{rest} {command_html('milepost inspect --shards', step_path(view, step))}"
    )
    return section_html("maps", "Location of the shards", f'<div class="maps">{"".join(figures)}</div>{table}', lead)
