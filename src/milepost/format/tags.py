"""File names that carry the id of the save that wrote them: ``__0_0.<save id>.distcp``.

Where a folder can't be renamed (an object store), all saves of a step write into one folder. A name of its own for
every file of every save is what keeps a new save from overwriting what a reader of the old one may be reading.
"""

from __future__ import annotations

import re

_TAGGED = re.compile(r"(.*)\.([0-9a-f]{32})(\.[^.]*)?", re.DOTALL)


def tagged(name: str, save_id: str) -> str:
    """``name`` with the save id in it, before the last suffix. No save id: ``name`` itself."""
    if not save_id:
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.{save_id}.{suffix}" if dot else f"{name}.{save_id}"


def untagged(name: str) -> str:
    """The name without a save id: what ``tagged`` was given, or ``name`` itself."""
    found = _TAGGED.fullmatch(name)
    return found[1] + (found[3] or "") if found is not None else name


def tag_of(name: str) -> str:
    """The save id that a name carries; empty if none."""
    found = _TAGGED.fullmatch(name)
    return found[2] if found is not None else ""
