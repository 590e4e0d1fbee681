"""The plan of a process's last save, kept for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from milepost.saving.structure import Nesting, Record, Roster
from milepost.tensors.plan import LocalLayout, WritePlan
from milepost.tensors.sharing import Group


@dataclass(slots=True, eq=False)
class LastPlan:
    """The plan of the last save, reused by a save with the same structure.

    ``token`` identifies the plan, the same on all ranks. A rank whose structure changed, or that dropped its plan, has
    none; then all ranks plan again, so it is harmless if ranks keep different plans.
    """

    token: str = ""
    fingerprint: str = ""
    """Key of this rank's state and its position among the ranks."""
    described: tuple[LocalLayout, Nesting] | None = None
    """This rank's state at the last save, and ``description``, its fingerprint: most saves only compare them."""
    description: str = ""
    digests: tuple[str, str] = ("", "")
    """The digests of this rank's structure."""
    plan: WritePlan | None = None
    groups: Mapping[bytes, Group] = field(default_factory=dict)
    """This rank's groups, by digest."""
    record: Record = field(default_factory=Record)
    """On the ranks that write a manifest."""
    roster: Roster = field(default_factory=Roster)
    """On rank 0 only."""
    num_shards: int = 0
    """On rank 0 only."""
    hosts: tuple[str, ...] = ()
    """Per rank; on rank 0 only."""

    def fingerprint_of(self, layout: LocalLayout, nesting: Nesting) -> str:
        """Return a value equal for two states if and only if they have the same structure."""
        if self.described is None or not _are_same(self.described, (layout, nesting)):
            self.description = f"{layout.fingerprint(nesting.paths)} {nesting.digest()}"
            self.described = layout, nesting
        return self.description


def _are_same(one: tuple[LocalLayout, Nesting], other: tuple[LocalLayout, Nesting]) -> bool:
    # Equal mappings may differ in order, and so in their fingerprints.
    return one == other and list(one[1].paths) == list(other[1].paths)
