"""Handling of the arguments and attributes of stock's ``FileSystemWriter`` and ``FileSystemReader``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, SerializationFormat

from milepost.errors import ConfigError
from milepost.storage import is_url

_log = logging.getLogger("milepost")

_HINTS: Mapping[str, tuple[Any, str]] = {
    "single_file_per_rank": (True, "each rank writes one file"),
    "sync_files": (True, "files are always synced: a save that reports success must survive a power cut"),
    "per_thread_copy_ahead": (10_000_000, "tensors are copied in slabs of 8 MiB"),
    "cache_staged_state_dict": (False, "async_save stages in its own buffers; milepost.async_save reuses its arena"),
}
"""Arguments that are hints to stock's writer, with their defaults and Milepost's behaviour."""
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "_extensions": (None, "a transformed stream can't be verified, listed or resharded"),
    "_extension_registry": (None, "transformed streams are not read: load such a checkpoint with stock DCP"),
    "serialization_format": (SerializationFormat.TORCH_SAVE, "only torch.save records are written"),
}
"""Arguments that are refused unless they have their default, and the reason."""

PLANNER_DATA = "planner_data"
"""Key in the manifest's ``extra`` for a custom planner's data in the metadata."""

_noted: set[str] = set()


def check_keywords(owner: str, given: Mapping[str, Any]) -> None:
    """Log each hint that has no effect, once per process.

    Raises:
        ConfigError: arguments are unknown or unsupported; with all of them.
    """
    faults = []
    for name, value in given.items():
        if name in _HINTS:
            default, instead = _HINTS[name]
            if value != default and name not in _noted:
                _noted.add(name)
                _log.info("%s treats %s=%r as a hint only: %s", owner, name, value, instead)
        elif name in _REFUSED:
            default, reason = _REFUSED[name]
            if value is not None and value != default:
                faults.append(f"{name}={value!r:.100}: {reason}")
        else:
            faults.append(f"{name}: there is no such argument")
    if faults:
        raise ConfigError(f"{owner} can't be made with " + "; ".join(faults))


def stock_path(path: str) -> str | Path:
    """Return the ``path`` attribute of stock's writer: a Path, or a URL unchanged."""
    return path if is_url(path) else Path(path)


def stock_file_system(path: str) -> FileSystem:
    """Return the ``fs`` attribute of stock's writer, which Milepost itself does not use.

    Raises:
        AttributeError: the path is a URL, which stock does not support.
    """
    if is_url(path):
        raise AttributeError(f"there is no FileSystem for {path}: Milepost accesses the store itself")
    return FileSystem()
