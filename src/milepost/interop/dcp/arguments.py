"""Arguments and attributes of stock's ``FileSystemWriter`` and ``FileSystemReader``: what Milepost makes of each."""

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
    "cache_staged_state_dict": (False, "async_save stages in buffers of its own; milepost.async_save reuses its arena"),
}
"""Arguments that are hints to stock's writer, with their defaults and what Milepost does."""
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "_extensions": (None, "a transformed stream can't be verified, listed or resharded"),
    "_extension_registry": (None, "transformed streams are not read: load such a checkpoint with stock DCP"),
    "serialization_format": (SerializationFormat.TORCH_SAVE, "only torch.save records are written"),
}
"""Arguments that are refused unless they have their default, and the reason."""

PLANNER_DATA = "planner_data"
"""Where the manifest's ``extra`` has what a planner of the user's own keeps in the metadata."""

_noted: set[str] = set()


def check_keywords(owner: str, given: Mapping[str, Any]) -> None:
    """Log each hint that has no effect, once in a process.

    Raises:
        ConfigError: an argument is unknown, or asks for what Milepost does not do; all of them at once.
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
    """The ``path`` that stock's writer has: a Path, or a URL as it is."""
    return path if is_url(path) else Path(path)


def stock_file_system(path: str) -> FileSystem:
    """The ``fs`` that stock's writer has. Milepost itself does not use it.

    Raises:
        AttributeError: the path is a URL, for which stock has none.
    """
    if is_url(path):
        raise AttributeError(f"there is no FileSystem for {path}: Milepost accesses the store itself")
    return FileSystem()
