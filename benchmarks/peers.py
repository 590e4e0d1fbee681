"""Other programs' saves and loads of a state dict of tensors, each ended when its bytes are on the disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Peer:
    """``save`` makes what is at a path that does not exist yet; ``load`` fills tensors that are there."""

    save: Callable[[Path, State], object]
    load: Callable[[Path, State], object]


def stock_dcp() -> Peer:
    """torch.distributed.checkpoint, which syncs its files."""
    return Peer(
        lambda path, state: dcp.save(state, checkpoint_id=str(path)),
        lambda path, into: dcp.load(into, checkpoint_id=str(path)),
    )


def torch_save() -> Peer:
    """``torch.save`` and ``fsync``; ``torch.load(mmap=True)`` and a copy."""

    def save(path: Path, state: State) -> None:
        path.mkdir()
        with open(path / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def load(path: Path, into: State) -> None:
        found = torch.load(path / "state.pt", mmap=True, weights_only=True)
        for key, tensor in into.items():
            tensor.copy_(found[key])

    return Peer(save, load)


def torch_checkpointing() -> Peer | None:
    """Its manager with synchronous saves, and a ``sync`` after it; None where it is not installed.

    A group of one rank is made for it (on ``gloo``): it saves through one. Its O_DIRECT is off where that fails.
    """
    try:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
    except ImportError:
        return None
    made: list[Any] = []

    def manager() -> Any:
        if not made:
            if not dist.is_initialized():
                file = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115 - as long as the process lives
                dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
            config = CheckpointManager.Config.with_sync_save()
            config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
            made.append(config.build())
        return made[0]

    def save(path: Path, state: State) -> None:
        manager().save(str(path), {"state": state})
        os.sync()

    def load(path: Path, into: State) -> None:
        found = manager().load(str(path), into={"state": into})
        for key, tensor in into.items():
            if found["state"][key] is not tensor:
                tensor.copy_(found["state"][key])

    return Peer(save, load)
