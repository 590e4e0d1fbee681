"""The identity of one node's part of a step, where each node has its own folder.

A part is a folder like a checkpoint's, written under the same protocol, with ``milepost.part.json`` in place of
``milepost.json``, so that no reader takes it for a checkpoint. It holds the whole state of its node's ranks, which can
resume from it. The parts of all nodes make up the step.
"""

# No `from __future__ import annotations`: msgspec would have to compile the text of each annotation on first use.

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from milepost.errors import FormatError
from milepost.format.typed_json import Count, typed

PART_KEY = "part"
"""The name of a part's record in the ``extra`` of its manifest."""


@dataclass(frozen=True, slots=True)
class NodePart:
    """The identity of one node's part of a step."""

    node: Count
    """Number of the node, from 0."""
    num_nodes: Count
    ranks: tuple[Count, ...]
    """The ranks of the node, ascending."""

    def __str__(self) -> str:
        return f"the part of node {self.node} of {self.num_nodes} ({rank_list(self.ranks)})"

    def record(self) -> dict[str, Any]:
        """Return the record of this part for the manifest's ``extra``."""
        return {PART_KEY: {**asdict(self), "ranks": list(self.ranks)}}


def part_of_manifest(extra: Mapping[str, Any], path: str) -> NodePart:
    """Parse the result of :meth:`NodePart.record`. Raises FormatError if it is missing or contradicts itself."""
    part = typed(extra.get(PART_KEY), NodePart, path, PART_KEY)
    if part.node >= part.num_nodes or not part.ranks or list(part.ranks) != sorted(set(part.ranks)):
        raise FormatError(f"{path}: it can't be the part of node {part.node} of {part.num_nodes}", path=path)
    return part


MAX_NAMED = 10
"""Maximum number of runs of ranks that a message lists."""


def rank_list(ranks: Sequence[int], hosts: Sequence[str] = (), member: str = "rank") -> str:
    """Format ascending ranks: ``rank 3``, ``ranks 0, 4-7``; with several hosts ``ranks 4-7 (a), 8 (b)``.

    After ten runs only the number of the other ranks is given. ``hosts`` has the host of each rank of the world.
    ``member`` is the word for a rank.
    """
    where = hosts if len(set(hosts)) > 1 else ()
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1 and (not where or where[rank] == where[found[-1][0]]):
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    shown, rest = found[:MAX_NAMED], sum(last - first + 1 for first, last in found[MAX_NAMED:])
    named = [
        (f"{first}-{last}" if last > first else f"{first}") + (f" ({where[first]})" if where else "")
        for first, last in shown
    ]
    more = f" and {rest} more" if rest else ""
    return (f"{member} " if len(ranks) == 1 else f"{member}s ") + ", ".join(named) + more
