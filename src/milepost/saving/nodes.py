"""Find the ranks that share a folder if each node has its own disk: by probing, not by host names."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from milepost.collective.comm import Comm, errors_shared
from milepost.errors import ConfigError, StorageError
from milepost.run.node_part import NodePart, rank_list
from milepost.storage.base import Storage, join

PROBE_PREFIX = ".milepost-probe-"


@dataclass(frozen=True, slots=True)
class Nodes:
    """The ranks of a run by node, i.e. that see the same folder, ascending; nodes by their lowest rank."""

    groups: tuple[tuple[int, ...], ...]

    def part_of(self, rank: int) -> NodePart:
        """Return the part of each step on the node of ``rank``."""
        node = next(number for number, ranks in enumerate(self.groups) if rank in ranks)
        return NodePart(node, len(self.groups), self.groups[node])

    def is_first(self, rank: int) -> bool:
        """Return whether ``rank`` acts for its node, as the lowest rank there."""
        return any(ranks[0] == rank for ranks in self.groups)


def find_nodes(storage: Storage, folder: str, comm: Comm) -> Nodes:
    """Find which ranks share ``folder``: each writes a file there and looks for the others'. Collective.

    Raises:
        ConfigError: on every rank, if visibility between ranks is not symmetric.
        StorageError: on every rank, if the folder can't be written on some.
    """
    token = comm.broadcast(uuid.uuid4().hex)
    mine = join(folder, f"{PROBE_PREFIX}{token}-{comm.rank}")
    try:
        with errors_shared(comm):  # at its end all files are written
            storage.make_folder(folder)
            storage.write(mine, b"")
        with errors_shared(comm):  # at its end all ranks have looked
            seen = _seen(storage, folder, token)
    finally:
        with contextlib.suppress(StorageError):  # the other ranks continue, and it is empty
            storage.remove(mine)
    brought = comm.gather(seen)
    verdict = comm.broadcast(_groups(brought) if brought is not None else None)
    if isinstance(verdict, ConfigError):
        raise verdict
    assert verdict is not None
    return Nodes(verdict)


def _seen(storage: Storage, folder: str, token: str) -> tuple[int, ...]:
    prefix = f"{PROBE_PREFIX}{token}-"
    names = [name for name in storage.names(folder) if name.startswith(prefix)]
    return tuple(sorted(int(name.removeprefix(prefix)) for name in names))


def _groups(seen: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...] | ConfigError:
    for rank, others in enumerate(seen):
        other = next((other for other in others if seen[other] != others), rank)
        if rank not in others or other != rank:
            return ConfigError(
                f"checkpoint.folder_per_node: rank {rank} sees the folder of {rank_list(others)}, but rank {other} "
                f"that of {rank_list(seen[other])}: give each node one folder, which all its ranks see"
            )
    return tuple(sorted(set(seen)))
