"""Attachments of a step, in addition to the state: small files, and values that describe it.

They are part of the step, and checked like the rest: ``milepost inspect`` shows them, ``milepost export`` writes a
tokenizer beside the weights, and ``milepost.load(path)`` returns them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milepost.errors import ConfigError

PART = "attached"
FILES = "files"
EXTRA = "extra"
MAX_FILE_NBYTES = 128 << 20
"""Three times the size of the largest published tokenizer."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

FileContent = bytes | str | os.PathLike[str]


def attached(files: Mapping[str, FileContent] | None, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of the state with ``files``, read now, and ``extra``; empty if there are none.

    Raises:
        ConfigError: naming each file that is missing, too large or has an invalid name, and each name in
            ``extra`` that is not text.
    """
    problems: list[str] = []
    found: dict[str, bytes] = {}
    for name, content in (files or {}).items():
        try:
            found[name] = _checked(name, content)
        except (ConfigError, OSError) as error:
            problems.append(f"files[{name!r}]: {error}")
    problems += [f"extra[{name!r}]: a name must be text" for name in extra or {} if not isinstance(name, str)]
    if problems:
        raise ConfigError(problems)
    state = {FILES: found, EXTRA: dict(extra or {})}
    return {name: values for name, values in state.items() if values}


def _checked(name: str, content: FileContent) -> bytes:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            "expected a file name of letters, digits, '.', '_' and '-', beginning with a letter, digit or '_'"
        )
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    if len(data) > MAX_FILE_NBYTES:
        raise ConfigError(f"{len(data)} bytes exceed the limit of {MAX_FILE_NBYTES} per file")
    return data
