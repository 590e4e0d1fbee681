"""The plan of a process's last save, kept for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from milepost.saving.structure import Record, Roster
from milepost.tensors.plan import WritePlan
from milepost.tensors.sharing import Group


@dataclass(slots=True, eq=False)
class LastPlan:
    """The plan of the last save, reused by a save with the same structure.

    ``token`` identifies the plan, the same on all ranks. A rank whose structure changed, or that dropped its plan, has
    none; then all ranks plan again. So it does no harm if ranks keep different plans.
    """

    token: str = ""
    fingerprint: str = ""
    """Key of this rank's state and its position among the ranks."""
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
