"""File names that carry the id of the save that wrote them: ``__0_0.<save id>.distcp``.

Where a folder can't be renamed (an object store), all saves of a step write into one folder. Distinct file names keep a
new save from overwriting files of the old one that may be in use by a reader.
"""

from __future__ import annotations

import re

_TAGGED = re.compile(r"(.*)\.([0-9a-f]{32})(\.[^.]*)?", re.DOTALL)


def tagged(name: str, save_id: str) -> str:
    """Insert the save id into ``name``, before the last suffix; without a save id, return ``name``."""
    if not save_id:
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.{save_id}.{suffix}" if dot else f"{name}.{save_id}"


def untagged(name: str) -> str:
    """Return the name without its save id, the inverse of ``tagged``."""
    found = _TAGGED.fullmatch(name)
    return found[1] + (found[3] or "") if found is not None else name


def tag_of(name: str) -> str:
    """Return the save id in a name; empty if there is none."""
    found = _TAGGED.fullmatch(name)
    return found[2] if found is not None else ""
