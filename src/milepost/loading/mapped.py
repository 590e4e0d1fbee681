"""Tensors as views of a step's memory-mapped files: data is read on access."""

from __future__ import annotations

import os
from math import prod
from typing import Any, cast

import torch

from milepost.errors import CheckpointDamagedError, ConfigError
from milepost.format.box import Box
from milepost.format.manifest import TensorEntry
from milepost.storage.base import Storage
from milepost.storage.local import LocalStorage
from milepost.tensors.layout import torch_dtype
from milepost.verification.verify import verify_in


class MappedFiles:
    """The mapped files of a checkpoint in a local folder. Mappings are private: changes stay in memory.

    The whole step is verified first, since mapped data can't be checked on access.

    Raises:
        ConfigError: the checkpoint is not in a local folder.
        CheckpointDamagedError: it is damaged.
    """

    def __init__(self, storage: Storage, folder: str):
        if not isinstance(storage, LocalStorage):
            raise ConfigError(
                f"milepost.load(path, mmap=True): {storage.root} is not a local folder, so it can't be mapped. Load it "
                "without mmap, or copy it to a local folder first"
            )
        report = verify_in(storage, folder)
        if report.problems:
            first = report.problems[0]
            raise CheckpointDamagedError(f"{report.path} is damaged: {first}", path=report.path)
        self._root = os.path.join(storage.root, folder)
        self._storages: dict[str, torch.UntypedStorage] = {}

    def tensor(self, entry: TensorEntry) -> torch.Tensor | None:
        """A view of a stored tensor; None if it is stored in several pieces, or not aligned for its dtype."""
        dtype = torch_dtype(entry.dtype)
        if len(entry.shards) != 1 or not prod(entry.shape):
            return None
        (shard,) = entry.shards
        if shard.data_offset is None or shard.box != Box.whole(entry.shape) or shard.data_offset % dtype.itemsize:
            return None
        if shard.file not in self._storages:
            path = os.path.join(self._root, shard.file)
            self._storages[shard.file] = cast("Any", torch.UntypedStorage).from_file(path, False, os.path.getsize(path))
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        return tensor.set_(self._storages[shard.file], shard.data_offset // dtype.itemsize, entry.shape)  # type: ignore[call-overload]
