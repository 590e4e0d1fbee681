"""``StorageReader``: stock ``dcp.load`` from folders written by Milepost or stock DCP."""

from __future__ import annotations

import io
import os
import uuid
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as DcpStorageReader
from torch.futures import Future

from milepost.errors import StateMismatchError
from milepost.format.box import Box
from milepost.format.dcp_metadata import manifest_from_metadata, parse_metadata
from milepost.format.digest import BlockDigests
from milepost.format.manifest import Manifest
from milepost.interop.dcp.arguments import PLANNER_DATA, check_keywords, stock_file_system, stock_path
from milepost.loading.reader import read_tensors
from milepost.loading.values import read_objects
from milepost.run import checkpoint_record
from milepost.storage import Storage, is_known, open_storage
from milepost.storage.base import join
from milepost.tensors import read_plan
from milepost.tensors.layout import Piece, TensorLeaf, can_be_boxes, torch_dtype


class StorageReader(DcpStorageReader):
    """A DCP storage reader that checks digests and runs no code from the checkpoint. Also reads stock folders.

    Args:
        path: the checkpoint's folder.
        arguments: those of stock's ``FileSystemReader``; see ``docs/from-dcp.md``.

    Raises:
        ConfigError: an argument is unknown or unsupported.
    """

    def __init__(self, path: str | os.PathLike[str], **arguments: Any):
        check_keywords("milepost.StorageReader", arguments)
        self._open(path)

    def _open(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint_id = os.fspath(path)
        self.path = stock_path(self.checkpoint_id)
        self.load_id = str(uuid.uuid4())
        self.storage_data: dict[MetadataIndex, _StorageInfo] = {}
        self._storage, self._folder = open_storage(path)
        self._manifest: Manifest | None = None
        self._digests: BlockDigests | None = None
        self._numbers: dict[str, dict[tuple[int, ...], int]] = {}

    @property
    def fs(self) -> FileSystem:
        """The attribute of stock's reader; not used."""
        return stock_file_system(self.checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._open(checkpoint_id or self.checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        if rank is None:
            self._manifest = checkpoint_record.read_manifest(self._storage, self._folder)
        else:  # stock DCP passes it if there is no metadata of all ranks
            self._manifest = _rank_local(self._storage, self._folder, rank)
        self._numbers = {}
        return dcp_metadata_of(self._manifest, self.load_id)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.storage_data = metadata.storage_data
        self._digests = checkpoint_record.read_digests(self._storage, self._folder, self._known_manifest())

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        manifest = self._known_manifest()
        items, leaves, targets = [], {}, []
        for number, request in enumerate(r for r in plan.items if r.type == LoadItemType.TENSOR):
            target = planner.resolve_tensor(request).detach()
            if tuple(target.shape) != tuple(request.lengths):
                raise StateMismatchError(
                    f"the load planner gives a tensor of shape {list(target.shape)} for a region of shape "
                    f"{list(request.lengths)} of '{request.storage_index.fqn}'",
                    mismatched=[request.storage_index.fqn],
                )
            # A target that is not plain memory (a conjugated view, a sparse tensor) needs a copy, as in stock DCP.
            local = target if can_be_boxes(target) else torch.empty(target.shape, dtype=target.dtype)
            targets.append((request, target, local))
            leaves[str(number)] = _leaf(str(number), local)
            items.append(self._read_item(manifest, request, str(number)))
        read_tensors(self._storage, self._folder, items, leaves, self._digests)
        for request, target, local in targets:
            if local is not target:
                target.copy_(local)
            planner.commit_tensor(request, target)
        wanted = {r.storage_index.fqn: r for r in plan.items if r.type == LoadItemType.BYTE_IO}
        for key, value in read_objects(self._storage, self._folder, manifest, wanted):
            # DCP's planner unpickles without restriction: give it our own stream of the checked value.
            stream = io.BytesIO()
            torch.save(value, stream)
            stream.seek(0)
            planner.load_bytes(wanted[key], stream)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _known_manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = checkpoint_record.read_manifest(self._storage, self._folder)
        return self._manifest

    def _read_item(self, manifest: Manifest, request: ReadItem, leaf: str) -> read_plan.ReadItem:
        index = request.storage_index
        entry = manifest.tensors[index.fqn]
        numbers = self._numbers.get(index.fqn)
        if numbers is None:
            filled = sorted(range(len(entry.shards)), key=lambda number: entry.shards[number].box.numel)
            numbers = self._numbers[index.fqn] = {entry.shards[number].box.offsets: number for number in filled}
        offset = tuple(index.offset) if index.offset is not None else (0,) * len(entry.shape)
        number = numbers[offset]
        lengths = tuple(request.lengths)
        return read_plan.ReadItem(
            key=index.fqn,
            dtype=entry.dtype,
            shard=entry.shards[number],
            shard_index=number,
            src=Box(tuple(request.storage_offsets), lengths),
            piece=0,
            dst=Box.whole(lengths),
            leaf=leaf,
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_known(checkpoint_id)


def _leaf(key: str, tensor: torch.Tensor) -> TensorLeaf:
    box = Box.whole(tensor.shape)
    return TensorLeaf(key, tensor.dtype, tuple(tensor.shape), (Piece(box, box),), tensor)


def _rank_local(storage: Storage, folder: str, rank: int) -> Manifest:
    """Return the manifest of one rank's separate save (stock's ``use_collectives=False``), from its own metadata."""
    path = join(folder, f"__{rank}.metadata")
    entries = [entry for entry in storage.list(folder) if not entry.is_folder and not entry.is_link]
    sizes = {entry.name: entry.nbytes for entry in entries}
    return manifest_from_metadata(parse_metadata(storage.read(path), path), sizes, path=path)


def dcp_metadata_of(manifest: Manifest, load_id: str | None = None) -> Metadata:
    """Convert a manifest to the metadata that DCP's planners expect."""
    tensors: dict[str, Any] = {
        key: TensorStorageMetadata(
            properties=TensorProperties(dtype=torch_dtype(entry.dtype)),
            size=torch.Size(entry.shape),
            chunks=[
                ChunkStorageMetadata(torch.Size(shard.box.offsets), torch.Size(shard.box.sizes))
                for shard in entry.shards
            ],
        )
        for key, entry in manifest.tensors.items()
    }
    tensors.update({key: BytesStorageMetadata() for key in manifest.objects})
    places = {
        MetadataIndex(key, torch.Size(shard.box.offsets)): _StorageInfo(
            shard.file, shard.record_offset, shard.record_nbytes
        )
        for key, entry in manifest.tensors.items()
        for shard in entry.shards
    }
    places |= {
        MetadataIndex(key): _StorageInfo(entry.file, entry.record_offset, entry.record_nbytes)
        for key, entry in manifest.objects.items()
    }
    return Metadata(
        state_dict_metadata=tensors,
        planner_data=manifest.extra.get(PLANNER_DATA, dict(manifest.paths)),
        storage_data=places,
        storage_meta=StorageMeta(save_id=manifest.save_id, load_id=load_id),
        version=CURRENT_DCP_VERSION,
    )
