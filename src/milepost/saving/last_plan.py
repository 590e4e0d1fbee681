"""The plan of a process's last save, kept for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from milepost.saving.structure import Record, Roster
from milepost.tensors.plan import WritePlan
from milepost.tensors.sharing import Group


@dataclass(slots=True, eq=False)
class LastPlan:
    """The plan of the last save, which a save of the same structure uses again.

    ``token`` is that plan's, the same on all ranks. A rank whose structure has changed, or that has forgotten, has
    none; then all plan anew. So it does no harm if ranks remember different plans.
    """

    token: str = ""
    fingerprint: str = ""
    """Of this rank's state, and its place among the ranks."""
    told: tuple[str, str] = ("", "")
    """The digests of this rank's structure."""
    plan: WritePlan | None = None
    groups: Mapping[bytes, Group] = field(default_factory=dict)
    """Those that this rank is in, by digest."""
    record: Record = field(default_factory=Record)
    """On the ranks that write a manifest."""
    roster: Roster = field(default_factory=Roster)
    """On rank 0 only."""
    num_shards: int = 0
    """On rank 0 only."""
    hosts: tuple[str, ...] = ()
    """Of each rank; on rank 0 only."""
