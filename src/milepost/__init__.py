"""Milepost: fault-tolerant, interoperable checkpointing for PyTorch training.

Public names are loaded on first use (PEP 562), so that ``import milepost`` costs nothing and the command line starts
without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milepost.checkpoint.async_save import SaveHandle, async_save
    from milepost.checkpoint.load import LoadReport, load
    from milepost.checkpoint.manager import CheckpointManager
    from milepost.checkpoint.save import SaveReport, save
    from milepost.config import CheckpointConfig
    from milepost.errors import (
        CheckpointDamagedError,
        CheckpointNotFoundError,
        ConfigError,
        ConversionError,
        DigestMismatchError,
        FormatError,
        MilepostError,
        PlanError,
        RunLockedError,
        SaveError,
        StateMismatchError,
        StorageError,
    )
    from milepost.interop.dcp_plugin import StorageReader, StorageWriter
    from milepost.verification import VerifyReport, verify

__version__ = "0.1.0"

_HOMES = {
    "CheckpointConfig": "milepost.config",
    "CheckpointManager": "milepost.checkpoint.manager",
    "LoadReport": "milepost.checkpoint.load",
    "SaveHandle": "milepost.checkpoint.async_save",
    "async_save": "milepost.checkpoint.async_save",
    "SaveReport": "milepost.checkpoint.save",
    "StorageReader": "milepost.interop.dcp_plugin",
    "StorageWriter": "milepost.interop.dcp_plugin",
    "VerifyReport": "milepost.verification",
    "load": "milepost.checkpoint.load",
    "save": "milepost.checkpoint.save",
    "verify": "milepost.verification",
    "CheckpointDamagedError": "milepost.errors",
    "CheckpointNotFoundError": "milepost.errors",
    "ConfigError": "milepost.errors",
    "ConversionError": "milepost.errors",
    "DigestMismatchError": "milepost.errors",
    "FormatError": "milepost.errors",
    "MilepostError": "milepost.errors",
    "PlanError": "milepost.errors",
    "RunLockedError": "milepost.errors",
    "SaveError": "milepost.errors",
    "StateMismatchError": "milepost.errors",
    "StorageError": "milepost.errors",
}

__all__ = [  # noqa: RUF022 - by what they are for
    "CheckpointManager",
    "CheckpointConfig",
    "save",
    "SaveReport",
    "async_save",
    "SaveHandle",
    "load",
    "LoadReport",
    "verify",
    "VerifyReport",
    "StorageReader",
    "StorageWriter",
    "MilepostError",
    "CheckpointDamagedError",
    "CheckpointNotFoundError",
    "ConfigError",
    "ConversionError",
    "DigestMismatchError",
    "FormatError",
    "PlanError",
    "RunLockedError",
    "SaveError",
    "StateMismatchError",
    "StorageError",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'milepost' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
