"""From the ranks' sign-offs to the manifest: pure, and the last check of a save before it is committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from milepost.errors import PlanError, SaveError, listed
from milepost.format.manifest import FileEntry, Lineage, Manifest, ObjectEntry, ShardEntry, TensorEntry
from milepost.format.manifest_check import manifest_faults
from milepost.run.signoff import SignOff, WrittenTensor
from milepost.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveInfo:
    """The description of a checkpoint beside its data; see the fields of the same names in ``Manifest``."""

    step: int | None
    kind: str
    layout: Mapping[str, int] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    """Software beside Milepost itself, for instance ``{"torch": "2.13.0"}``."""
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    lineage: Lineage | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def assemble(signed: Sequence[SignOff], info: SaveInfo, *, now: float) -> tuple[Manifest, list[Sequence[int]]]:
    """The manifest of a save, and the block CRCs of its shards in the manifest's order.

    ``signed`` holds the sign-offs of all ranks, none of them a failure. Shards are ordered by box. The files of the
    commit itself are not in it yet.

    Raises:
        SaveError: two ranks stored the same file or object, or one tensor with two dtypes or shapes.
        PlanError: the boxes of a tensor leave a gap or overlap, or records overlap in a file.
    """
    written = sorted(
        ((file.file, tensor) for sign_off in signed for file in sign_off.files for tensor in file.tensors),
        key=lambda pair: (pair[1].item.key, pair[1].item.box),
    )
    tensors: dict[str, list[tuple[str, WrittenTensor]]] = {}
    for name, tensor in written:
        tensors.setdefault(tensor.item.key, []).append((name, tensor))
    _check_agreement(tensors, signed)
    manifest = Manifest(
        step=info.step,
        save_id=signed[0].save_id,
        created_s=now,
        kind=info.kind,
        world_size=len(signed),
        layout=info.layout,
        producer={"milepost": __version__, **info.producer},
        tensors={key: _tensor_entry(shards) for key, shards in tensors.items()},
        objects={
            obj.key: ObjectEntry(file.file, obj.record_offset, obj.record_nbytes, obj.crc32)
            for sign_off in signed
            for file in sign_off.files
            for obj in file.objects
        },
        files={file.file: FileEntry(file.nbytes) for sign_off in signed for file in sign_off.files},
        paths=info.paths,
        extra=info.extra,
        lineage=info.lineage,
        metrics=info.metrics,
    )
    faults = manifest_faults(manifest)
    if faults:
        key = next((fault.key for fault in faults if fault.key), None)
        raise PlanError(f"the save is incomplete: {'; '.join(fault.message for fault in faults)}", key=key)
    return manifest, [tensor.block_crcs for _, tensor in written]


def _tensor_entry(shards: Sequence[tuple[str, WrittenTensor]]) -> TensorEntry:
    first = shards[0][1].item
    return TensorEntry(first.dtype, first.shape, tuple(_shard_entry(name, tensor) for name, tensor in shards))


def _shard_entry(file: str, tensor: WrittenTensor) -> ShardEntry:
    item = tensor.item
    return ShardEntry(
        box=item.box,
        file=file,
        record_offset=item.record_offset,
        record_nbytes=item.record_nbytes,
        data_offset=item.data_offset,
        data_nbytes=item.data_nbytes,
        crc32=tensor.crc32,
    )


def _check_agreement(tensors: Mapping[str, Sequence[tuple[str, WrittenTensor]]], signed: Sequence[SignOff]) -> None:
    """Refuse what the manifest can't show any more: two ranks that use one name for two things."""
    faults = []
    for key, shards in tensors.items():
        kinds = sorted({(tensor.item.dtype, tensor.item.shape) for _, tensor in shards})
        if len(kinds) > 1:
            faults.append(f"'{key}' was stored as {' and as '.join(f'{d} {list(s)}' for d, s in kinds)}")
    writers: dict[str, int] = {}
    for sign_off in signed:
        names = [f"file {file.file}" for file in sign_off.files]
        names += [f"'{obj.key}'" for file in sign_off.files for obj in file.objects]
        for name in names:
            if name in writers:
                faults.append(f"{name} was stored by rank {writers[name]} and by rank {sign_off.rank}")
            writers[name] = sign_off.rank
    if faults:
        raise SaveError(f"the ranks contradict each other: {'; '.join(listed(faults))}")
