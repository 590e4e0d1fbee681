"""Assemble the ranks' sign-offs into the manifest: pure, and the last check of a save before its commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from milepost.errors import MAX_LISTED, PlanError, SaveError
from milepost.format.manifest import FileEntry, Lineage, Manifest
from milepost.format.manifest_check import head_faults
from milepost.format.manifest_json import record_faults
from milepost.run.signoff import SignOff
from milepost.version import __version__

if TYPE_CHECKING:
    from milepost.format.columns import UInts
    from milepost.format.segment_merger import SegmentMerger


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveInfo:
    """The description of a checkpoint beside its data; see the fields of the same names in ``Manifest``."""

    step: int | None
    kind: str
    layout: Mapping[str, int] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    """Software beside Milepost itself, for instance ``{"torch": "2.13.0"}``."""
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    structure: bytes = b""
    extra: Mapping[str, Any] = field(default_factory=dict)
    lineage: Lineage | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def check_fits(info: SaveInfo, *, num_shards: int, world_size: int) -> None:
    """Refuse a save whose commit record would exceed the limits of a reader, before anything is written.

    Raises:
        SaveError: names what is too large, and by how much.
    """
    files = {f"__{rank}_{number}.distcp": FileEntry(0) for rank in range(world_size) for number in (0, 1)}
    manifest = Manifest(
        *(info.step, "0" * 32, 0.0, info.kind, world_size, info.layout, info.producer, {}, {}, files),
        paths=info.paths,
        structure=info.structure,
        extra=info.extra,
        lineage=info.lineage,
        metrics=info.metrics,
    )
    faults = record_faults(manifest, num_shards)
    if faults:
        raise SaveError(f"this save would not be readable, nothing was written: {'; '.join(faults)}")


def assemble(
    signed: Sequence[SignOff],
    info: SaveInfo,
    *,
    now: float,
    merger: SegmentMerger | None = None,
    world_size: int | None = None,
    must_cover: bool = True,
) -> tuple[Manifest, UInts]:
    """The manifest of a save, and the block CRCs of its shards in the manifest's order.

    ``signed`` holds the sign-offs of all ranks, none of them a failure; their segments, unless ``merger`` has these.
    Shards are ordered by box. The files of the commit itself are not in it yet. ``world_size`` is given
    if sign-offs are fewer than ranks. ``must_cover`` is false for one node's part of a step, whose shards need not
    cover the tensors.

    Raises:
        SaveError: two ranks stored the same file or object, or one tensor with two dtypes or shapes.
        PlanError: the boxes of a tensor leave a gap or overlap, or records overlap in a file.
    """
    # Imported here: numpy takes 100 ms, which deleting old steps should not cost.
    from milepost.format.columns import with_table
    from milepost.format.columns_check import table_faults
    from milepost.format.segment_merger import SegmentMerger

    if merger is None:
        merger = SegmentMerger.of((one.rank, one.segment) for one in signed if one.segment is not None)
    table, crcs = merger.merge(info.paths)
    manifest = Manifest(
        step=info.step,
        save_id=signed[0].save_id,
        created_s=now,
        kind=info.kind,
        world_size=len(signed) if world_size is None else world_size,
        layout=info.layout,
        producer={"milepost": __version__, **info.producer},
        tensors={},
        objects={},
        files=merger.files,
        extra=info.extra,
        lineage=info.lineage,
        metrics=info.metrics,
    )
    faults = [*head_faults(manifest), *table_faults(table, manifest.files, must_cover=must_cover)]
    if faults:
        key = next((fault.key for fault in faults if fault.key), None)
        reasons = "; ".join(fault.message for fault in faults[:MAX_LISTED])
        raise PlanError(f"the save is incomplete: {reasons}", key=key)
    return with_table(manifest, replace(table, structure=info.structure)), crcs
