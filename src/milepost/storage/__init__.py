"""Where checkpoints live: the only part of Milepost that talks to the operating system or to a network."""

from __future__ import annotations

import os
import re

from milepost.errors import ConfigError
from milepost.storage.base import Storage
from milepost.storage.local import LocalStorage

__all__ = ["LocalStorage", "Storage", "open_storage"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def open_storage(path: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The storage that holds ``path`` (a path, or a ``file://`` URL) and the name of ``path`` in it.

    The storage is rooted at the parent, so that what lies beside ``path`` is within reach: a commit renames there.
    A link at ``path`` is followed.

    Raises:
        ConfigError: the path is empty, or its scheme is not supported.
    """
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    if scheme is not None:
        if scheme[1].lower() != "file":
            raise ConfigError(
                f"{text}: {scheme[1]}:// is not supported yet; checkpoints live in local or mounted folders"
            )
        text = text[len(scheme[0]) :]
    if not text:
        raise ConfigError("the path of a checkpoint must not be empty")
    full = os.path.abspath(text)
    if os.path.islink(full):
        full = os.path.realpath(full)
    return LocalStorage(os.path.dirname(full)), os.path.basename(full)
