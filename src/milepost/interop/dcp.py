"""One-line adoption for anyone who calls stock ``torch.distributed.checkpoint`` (DCP)::

    dcp.save(state_dict, storage_writer=milepost.StorageWriter(path))
    dcp.load(state_dict, storage_reader=milepost.StorageReader(path))

DCP's planner decides who writes what; files, digests and the commit are Milepost's. The reader takes folders that
either wrote, and never unpickles a byte that came from one.
"""

from __future__ import annotations

import io
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader as DcpStorageReader
from torch.distributed.checkpoint.storage import StorageWriter as DcpStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from milepost.errors import SaveError
from milepost.format.box import Box
from milepost.format.digest import BlockDigests
from milepost.format.manifest import Manifest
from milepost.loading.reader import read_objects, read_tensors
from milepost.run import catalog, commit
from milepost.run.assemble import SaveInfo
from milepost.run.signoff import WrittenFile, wait_for_sign_offs
from milepost.saving.job import JobMonitor, SaveJob, run_job
from milepost.saving.stage import tensor_blocks
from milepost.storage import Storage, is_known, open_storage
from milepost.tensors import plan
from milepost.tensors.layout import Piece, TensorLeaf, dtype_name
from milepost.tensors.values import decode_object

TIMEOUT_S = 60.0
"""All ranks have signed off before DCP calls ``finish``; this is for a storage that shows files late."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What the coordinator tells each rank, inside DCP's plan."""

    path: str
    save_id: str
    rank: int
    world_size: int


class StorageWriter(DcpStorageWriter):
    """A DCP storage writer whose checkpoints appear whole or not at all, with digests.

    Args:
        path: the checkpoint's folder. One that is there already is replaced at the moment of the commit.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._open(path)

    def _open(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint_id = os.fspath(path)
        self._storage, self._target = open_storage(path)
        self._attempt: _Attempt | None = None
        self._abandon: weakref.finalize[..., StorageWriter] | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._open(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise SaveError("milepost.StorageWriter needs use_collectives=True: a checkpoint is committed as a whole")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._give_up()  # if the previous save failed on some rank
        save_id = commit.new_save_id()
        path = commit.begin_attempt(self._storage, self._target, save_id)
        # DCP does not tell the coordinator when another rank fails: the attempt then goes when the writer does.
        self._abandon = weakref.finalize(self, _abort_here, self._storage, path, os.getpid())
        attempts = [_Attempt(path, save_id, rank, len(plans)) for rank in range(len(plans))]
        self._attempt = attempts[0]
        return [replace(plan, storage_data=attempt) for plan, attempt in zip(plans, attempts, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if getattr(planner, "_enable_plan_caching", False):
            self._give_up()
            raise SaveError(
                "milepost.StorageWriter needs a planner without enable_plan_caching=True: a cached plan leads to the "
                "folder of an older save"
            )
        attempt: _Attempt = plan.storage_data
        resolved = {_item_key(item): item for item in plan.items if item.type != WriteItemType.BYTE_IO}
        objects = {
            item.index.fqn: _checked_object(item, planner) for item in plan.items if item.type == WriteItemType.BYTE_IO
        }
        job = SaveJob(
            target=self._target,
            attempt=attempt.path,
            save_id=attempt.save_id,
            rank=attempt.rank,
            world_size=attempt.world_size,
            plan=_write_plan(attempt.rank, plan.items, tuple(objects)),
            info=None,
            keep=None,
            timeout_s=TIMEOUT_S,
        )
        written = _Written()
        run_job(self._storage, job, _PlannerBlocks(planner, resolved), objects, written)
        index_of = {_item_key(item): item.index for item in plan.items}
        results = [
            WriteResult(index_of[t.item.key, t.item.box], t.item.record_nbytes, t.item.record_offset)
            for file in written.files
            for t in file.tensors
        ] + [
            WriteResult(index_of[o.key, None], o.record_nbytes, o.record_offset)
            for file in written.files
            for o in file.objects
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        attempt = self._attempt
        assert attempt is not None, "DCP calls finish after prepare_global_plan, on the coordinator"
        signed = wait_for_sign_offs(
            self._storage, attempt.path, attempt.world_size, attempt.save_id, timeout_s=TIMEOUT_S
        )
        info = SaveInfo(
            step=catalog.step_of(self._target),
            kind="state",
            producer={"torch": str(torch.__version__)},
            paths=metadata.planner_data or {},
        )
        commit.publish(self._storage, attempt.path, self._target, signed, info, now=time.time())
        self._give_up()

    def _give_up(self) -> None:
        """Take the attempt away, if one is there still."""
        if self._abandon is not None:
            self._abandon()
        self._attempt = None

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_known(checkpoint_id)


def _abort_here(storage: Storage, attempt: str, pid: int) -> None:
    if os.getpid() == pid:  # a fork has a copy of the writer, not its save
        commit.abort_attempt(storage, attempt)


def _item_key(item: WriteItem) -> tuple[str, Box | None]:
    if item.tensor_data is None:
        return item.index.fqn, None
    chunk = item.tensor_data.chunk
    return item.index.fqn, Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _checked_object(item: WriteItem, planner: SavePlanner) -> bytes:
    """A value as DCP's planner pickled it, refused if it would need code to load."""
    data = cast("io.BytesIO", planner.resolve_data(item)).getvalue()
    try:
        decode_object(item.index.fqn, data, "the value to save")
    except Exception as error:
        raise SaveError(
            f"{item.index.fqn} can't be loaded without running code; store plain values or tensors instead: {error}",
            key=item.index.fqn,
        ) from error
    return data


def _write_plan(rank: int, items: Sequence[WriteItem], objects: Sequence[str]) -> plan.WritePlan:
    boxes = []
    for item in items:
        data = item.tensor_data
        if data is not None:
            box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
            dtype = dtype_name(data.properties.dtype)
            boxes.append((plan.TensorSpec(item.index.fqn, dtype, tuple(data.size), (box,)), box))
    return plan.lay_out_file(rank, boxes, objects)


class _Written(JobMonitor):
    """Keeps what a job has written, for DCP's own record of it."""

    files: Sequence[WrittenFile] = ()

    def signed_off(self, files: Sequence[WrittenFile]) -> None:
        self.files = files


class _PlannerBlocks:
    """A ``BlockSource`` that asks DCP's planner for each tensor when it is written."""

    def __init__(self, planner: SavePlanner, items: dict[tuple[str, Box | None], WriteItem]):
        self._planner = planner
        self._items = items

    def blocks(self, item: plan.WriteItem) -> Iterator[memoryview]:
        tensor = cast("torch.Tensor", self._planner.resolve_data(self._items[item.key, item.box]))
        return tensor_blocks(tensor.detach(), tensor.dtype)


class StorageReader(DcpStorageReader):
    """A DCP storage reader that checks digests and runs nothing from the checkpoint. Reads stock folders too.

    Args:
        path: the checkpoint's folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._open(path)

    def _open(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint_id = os.fspath(path)
        self._storage, self._folder = open_storage(path)
        self._manifest: Manifest | None = None
        self._digests: BlockDigests | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._open(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._manifest = catalog.read_manifest(self._storage, self._folder)
        return dcp_metadata_of(self._manifest)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._digests = catalog.read_digests(self._storage, self._folder, self._known_manifest())

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        manifest = self._known_manifest()
        items, leaves, targets = [], {}, []
        for number, request in enumerate(r for r in plan.items if r.type == LoadItemType.TENSOR):
            target = planner.resolve_tensor(request).detach()
            targets.append((request, target))
            leaves[str(number)] = _leaf(str(number), target)
            items.append(_read_item(manifest, request, str(number)))
        read_tensors(self._storage, self._folder, items, leaves, self._digests)
        for request, target in targets:
            planner.commit_tensor(request, target)
        wanted = {r.storage_index.fqn: r for r in plan.items if r.type == LoadItemType.BYTE_IO}
        for key, value in read_objects(self._storage, self._folder, manifest, wanted):
            # DCP's planner unpickles without restriction: it gets a stream of our own making, of the checked value.
            stream = io.BytesIO()
            torch.save(value, stream)
            stream.seek(0)
            planner.load_bytes(wanted[key], stream)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _known_manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = catalog.read_manifest(self._storage, self._folder)
        return self._manifest

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_known(checkpoint_id)


def _leaf(key: str, tensor: torch.Tensor) -> TensorLeaf:
    box = Box.whole(tensor.shape)
    return TensorLeaf(key, tensor.dtype, tuple(tensor.shape), (Piece(box, box),), tensor)


def _read_item(manifest: Manifest, request: ReadItem, leaf: str) -> plan.ReadItem:
    index = request.storage_index
    entry = manifest.tensors[index.fqn]
    offset = tuple(index.offset) if index.offset is not None else (0,) * len(entry.shape)
    number = next(n for n, shard in enumerate(entry.shards) if shard.box.offsets == offset)
    lengths = tuple(request.lengths)
    return plan.ReadItem(
        key=index.fqn,
        dtype=entry.dtype,
        shard=entry.shards[number],
        shard_index=number,
        src=Box(tuple(request.storage_offsets), lengths),
        piece=0,
        dst=Box.whole(lengths),
        leaf=leaf,
    )


def dcp_metadata_of(manifest: Manifest) -> Metadata:
    """A manifest as DCP's planners want it. ``storage_data`` is left out: only this reader knows the places."""
    tensors: dict[str, Any] = {
        key: TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, entry.dtype)),
            size=torch.Size(entry.shape),
            chunks=[
                ChunkStorageMetadata(torch.Size(shard.box.offsets), torch.Size(shard.box.sizes))
                for shard in entry.shards
            ],
        )
        for key, entry in manifest.tensors.items()
    }
    tensors.update({key: BytesStorageMetadata() for key in manifest.objects})
    return Metadata(
        state_dict_metadata=tensors,
        planner_data=dict(manifest.paths),
        storage_data={MetadataIndex(key): None for key in tensors},
        storage_meta=StorageMeta(save_id=manifest.save_id),
    )
