"""The frame of the HTML pages, and their building blocks.

Every string from a checkpoint is escaped, isolated from the surrounding text (right-to-left marks) and shortened, so
that a hostile key is displayed and has no other effect. The page's Content-Security-Policy allows only its own script
and style, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files

from milepost.report.pictures import attribute

MAX_KEY = 300
MAX_ROWS_SHOWN = 24
"""Longer tables scroll in their own frame, under their headers; they are printed in full."""
NUM_SHADES = 12
"""Number of shades in the heat maps; the stylesheet has a class for each, since the page allows no inline style."""


def document(title: str, header: str, sections: Sequence[str], names: Mapping[str, str], footer: str) -> str:
    """Return the document; ``names`` are the sections' names in the navigation, by anchor."""
    style, script = (files("milepost.report").joinpath(name).read_text() for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{attribute(policy)}">'
        f'<link rel="icon" href="data:,"><title>{attribute(shown(title))}</title><style>{style}</style></head><body>'
        '<a class="skip" href="#main">Skip to the content</a>'
        f'{header}{_nav(sections, names)}<main id="main">{"".join(sections)}</main><footer>{footer}</footer>'
        f"<script>{script}</script></body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _nav(sections: Sequence[str], names: Mapping[str, str]) -> str:
    there = [name for name in names if any(f'<h2 id="{name}">' in section for section in sections)]
    links = "".join(f'<a href="#{name}">{attribute(names[name])}</a>' for name in there)
    return f'<nav aria-label="Sections"><div>{links}</div></nav>'


def header_html(path: str, lead: str, facts: Sequence[tuple[str, str]]) -> str:
    """Return the page's header: its subject and its main figures."""
    items = "".join(f"<li>{attribute(name)} <b>{text_html(value)}</b></li>" for name, value in facts)
    return (
        f'<header><h1><bdi>{text_html(path)}</bdi></h1><p class="soft">{attribute(lead)}</p>'
        f'<ul class="facts">{items}</ul></header>'
    )


def shown(text: str, limit: int = MAX_KEY) -> str:
    """Escape control and formatting characters in ``text``, and leave out the middle of a very long one."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...({len(text) - limit} characters)...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def text_html(text: str) -> str:
    return attribute(shown(text))


def command_html(command: str, *arguments: str) -> str:
    line = " ".join([command, *(shlex.quote(shown(argument)) for argument in arguments)])
    return (
        f'<span class="command"><code>{attribute(line)}</code><button type="button" class="copy">copy</button></span>'
    )


def section_html(anchor: str, title: str, body: str, lead: str = "") -> str:
    lead = f"<p>{lead}</p>" if lead else ""
    return f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{attribute(title)}</h2>{lead}{body}</section>'


Cell = str | tuple[str, float] | tuple[str, float, str]
"""HTML of a cell, optionally with the number to sort it by and a CSS class."""


def table_html(
    name: str, caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]], *, search: bool = False
) -> str:
    """Return a table whose columns sort by a click; headers that begin with ``#`` are of numeric columns."""
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


def key_html(key: str) -> str:
    return f'<bdi class="key">{text_html(key)}</bdi>'


def heat_html(name: str, caption: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Return a heat map as a table: each cell holds a number, and its shade shows the share of the largest."""
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
        body.append(f'<tr><th scope="row" class="key">{key_html(label)}</th>{cells}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{attribute(caption)}">'
        f'<table class="heat" id="{name}">'
        f'<caption>{attribute(caption)}</caption><thead><tr><th scope="col"><button type="button">tensor'
        f"</button></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
