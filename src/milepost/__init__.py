"""Milepost: fault-tolerant, interoperable checkpointing for PyTorch training.

Public names are loaded on first use (PEP 562), so that ``import milepost`` costs nothing and the command line starts
without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from milepost.version import __version__ as __version__

if TYPE_CHECKING:
    from milepost.config import CheckpointConfig
    from milepost.errors import (
        CheckpointDamagedError,
        CheckpointNotFoundError,
        ConfigError,
        ConversionError,
        DigestMismatchError,
        FormatError,
        MilepostError,
        NewerFormatError,
        PartlyLoadedError,
        PlanError,
        RunLockedError,
        SaveError,
        StateMismatchError,
        StorageError,
    )
    from milepost.interop.arrays import OpenCheckpoint, StoredArray
    from milepost.interop.arrays import open_checkpoint as open  # noqa: F401 - see `__all__`
    from milepost.interop.dcp.read import StorageReader
    from milepost.interop.dcp.write import StorageWriter
    from milepost.interop.hf.model import HfModel
    from milepost.loading.load import load
    from milepost.loading.load_from import LoadReport
    from milepost.saving.async_save import async_save
    from milepost.saving.background import SaveHandle
    from milepost.saving.job import SaveReport
    from milepost.saving.save import save
    from milepost.tensors.registry import register_value
    from milepost.training.hooks import Commit
    from milepost.training.manager import CheckpointManager
    from milepost.verification.verify import VerifyReport, verify

_HOMES = {
    "CheckpointConfig": "milepost.config",
    "CheckpointManager": "milepost.training.manager",
    "Commit": "milepost.training.hooks",
    "LoadReport": "milepost.loading.load_from",
    "HfModel": "milepost.interop.hf.model",
    "SaveHandle": "milepost.saving.background",
    "async_save": "milepost.saving.async_save",
    "SaveReport": "milepost.saving.job",
    "StorageReader": "milepost.interop.dcp.read",
    "StorageWriter": "milepost.interop.dcp.write",
    "OpenCheckpoint": "milepost.interop.arrays",
    "StoredArray": "milepost.interop.arrays",
    "make_registered": "milepost.tensors.registry",
    "register_value": "milepost.tensors.registry",
    "VerifyReport": "milepost.verification.verify",
    "load": "milepost.loading.load",
    "save": "milepost.saving.save",
    "verify": "milepost.verification.verify",
    "CheckpointDamagedError": "milepost.errors",
    "CheckpointNotFoundError": "milepost.errors",
    "ConfigError": "milepost.errors",
    "ConversionError": "milepost.errors",
    "DigestMismatchError": "milepost.errors",
    "FormatError": "milepost.errors",
    "MilepostError": "milepost.errors",
    "NewerFormatError": "milepost.errors",
    "PartlyLoadedError": "milepost.errors",
    "PlanError": "milepost.errors",
    "RunLockedError": "milepost.errors",
    "SaveError": "milepost.errors",
    "StateMismatchError": "milepost.errors",
    "StorageError": "milepost.errors",
}

# `open` is public too, but not for `from milepost import *`, which would hide Python's.
__all__ = [  # noqa: RUF022 - by what they are for
    "CheckpointManager",
    "CheckpointConfig",
    "Commit",
    "HfModel",
    "save",
    "SaveReport",
    "async_save",
    "SaveHandle",
    "load",
    "LoadReport",
    "OpenCheckpoint",
    "StoredArray",
    "register_value",
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
    "NewerFormatError",
    "PartlyLoadedError",
    "PlanError",
    "RunLockedError",
    "SaveError",
    "StateMismatchError",
    "StorageError",
]


def __getattr__(name: str) -> Any:
    if name == "open":  # a name of its own at home: there it would hide Python's
        from milepost.interop.arrays import open_checkpoint

        globals()[name] = open_checkpoint
        return open_checkpoint
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'milepost' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "open"])
