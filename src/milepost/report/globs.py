"""Select keys by shell patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from milepost.errors import CheckpointNotFoundError, all_near


def matching_keys(keys: Iterable[str], patterns: Sequence[str], where: str) -> list[str]:
    """Select the keys that one of ``patterns`` names or matches; without patterns, all keys.

    A key may itself look like a pattern (``a[0]``), so an exact match takes precedence.

    Raises:
        CheckpointNotFoundError: a pattern matches no key; the message names ``where``.
    """
    known = dict.fromkeys(keys)
    found = {} if patterns else known
    for pattern in patterns:
        matches = [pattern] if pattern in known else [key for key in known if fnmatch.fnmatchcase(key, pattern)]
        if not matches:
            closest = all_near(pattern, known)
            hint = f"; near it: {', '.join(closest)}" if closest else ""
            raise CheckpointNotFoundError(f"{where} has no key that matches '{pattern}'{hint}", path=where)
        found.update(dict.fromkeys(matches))
    return list(found)
