"""``StorageWriter``: stock ``dcp.save`` with atomic checkpoints."""

from __future__ import annotations

import io
import json
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter as DcpStorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from milepost.config import NUM_IO_THREADS
from milepost.errors import ConfigError, SaveError
from milepost.format.box import Box
from milepost.interop.dcp.arguments import PLANNER_DATA, check_keywords, stock_file_system, stock_path
from milepost.run import catalog, commit
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import abort_attempt, begin_attempt, new_save_id
from milepost.run.signoff import WrittenFile, wait_for_sign_offs
from milepost.run.step_names import step_of
from milepost.saving.job import JobMonitor, SaveJob, run_job
from milepost.saving.stage import tensor_blocks
from milepost.storage import Storage, is_known, open_storage
from milepost.tensors import plan
from milepost.tensors.devices import devices_of, wait_for_devices
from milepost.tensors.layout import can_be_boxes, dtype_name
from milepost.tensors.value_reader import decode_object

TIMEOUT_S = 60.0
"""Time to wait for sign-offs: all ranks signed off before DCP calls ``finish``, but storage may show files late."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The coordinator's message to each rank, inside DCP's plan."""

    path: str
    save_id: str
    rank: int
    world_size: int


class StorageWriter(DcpStorageWriter):
    """A DCP storage writer of atomic checkpoints with digests.

    Args:
        path: the checkpoint's folder. An existing one is replaced at the commit.
        overwrite: False refuses to replace a checkpoint.
        thread_count: threads that write on each rank.
        arguments: the others of stock's ``FileSystemWriter``; see ``docs/from-dcp.md``.

    Raises:
        ConfigError: an argument is unknown or unsupported.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = True,
        thread_count: int = NUM_IO_THREADS,
        **arguments: Any,
    ):
        check_keywords("milepost.StorageWriter", arguments)
        if thread_count < 1:
            raise ConfigError(f"milepost.StorageWriter needs a thread_count of at least 1, not {thread_count}")
        self.overwrite = overwrite
        self.thread_count = thread_count
        self._abandon: weakref.finalize[..., StorageWriter] | None = None
        self._open(path)

    def _open(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint_id = os.fspath(path)
        self.path = stock_path(self.checkpoint_id)
        self.save_id = new_save_id()
        self._storage, self._target = open_storage(path)
        self._attempt: _Attempt | None = None

    @property
    def fs(self) -> FileSystem:
        """The attribute of stock's writer; not used."""
        return stock_file_system(self.checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._give_up()  # the previous save may have failed on some rank
        self._open(checkpoint_id or self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True) and dist.is_initialized() and dist.get_world_size() > 1:
            raise SaveError(
                "milepost.StorageWriter needs use_collectives=True on several ranks: all of them commit a checkpoint "
                "together"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not self.overwrite:
            found = catalog.examine(self._storage, self._target)
            if found is not None and found.state != "incomplete":
                raise SaveError(
                    f"{self.checkpoint_id} is a checkpoint already, and overwrite is False", path=self.checkpoint_id
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._give_up()
        path = begin_attempt(self._storage, self._target, self.save_id)
        # DCP does not notify the coordinator when another rank fails: the attempt is then removed with the writer.
        self._abandon = weakref.finalize(self, _abort_here, self._storage, path, os.getpid())
        attempts = [_Attempt(path, self.save_id, rank, len(plans)) for rank in range(len(plans))]
        self._attempt = attempts[0]
        return [
            replace(plan, storage_data=attempt, usable=True)
            for plan, attempt in zip(_in_full(plans), attempts, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        attempt: _Attempt = plan.storage_data
        state_dict = getattr(planner, "state_dict", None)
        wait_for_devices(devices_of(state_dict.values() if isinstance(state_dict, Mapping) else ()))
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
            num_threads=self.thread_count,
        )
        written = _Written()
        run_job(self._storage, job, _PlannerBlocks(planner, resolved), objects, written)
        index_of = {_item_key(item): item.index for item in plan.items}
        records = [
            (index_of[key, box], _StorageInfo(file.file, offset, nbytes))
            for file in written.files
            for key, box, offset, nbytes in (
                *((t.item.key, t.item.box, t.item.record_offset, t.item.record_nbytes) for t in file.tensors),
                *((o.key, None, o.record_offset, o.record_nbytes) for o in file.objects),
            )
        ]
        results = [WriteResult(index, place.length, place) for index, place in records]
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
            step=step_of(self._target),
            kind="state",
            producer={"torch": str(torch.__version__)},
            **_kept(metadata.planner_data),
        )
        commit.publish(self._storage, attempt.path, self._target, signed, info, now=time.time())
        self._give_up()
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for some in results for result in some}
        metadata.storage_meta = self.storage_meta()

    def _give_up(self) -> None:
        """Remove the attempt, if it still exists."""
        if self._abandon is not None:
            self._abandon()
        self._attempt = None

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_known(checkpoint_id)


def _abort_here(storage: Storage, attempt: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has a copy of the writer, but not its save
        abort_attempt(storage, attempt)


def _in_full(plans: list[SavePlan]) -> list[SavePlan]:
    """Return the plans, filling in those that a planner with ``enable_plan_caching`` omitted as known.

    The planner would give each rank the previous save's plan, with that save's location.
    """
    if all(plan.usable for plan in plans):
        return plans
    cached: Mapping[str, list[SavePlan]] = SavePlanner._cached_global_plan
    if len(cached) != 1:
        raise SaveError(
            f"milepost.StorageWriter can't tell the plans of several planners with enable_plan_caching=True apart "
            f"({', '.join(sorted(cached))}): use it with one"
        )
    (known,) = cached.values()
    return [plan if plan.usable else full for plan, full in zip(plans, known, strict=True)]


def _kept(planner_data: object) -> dict[str, Any]:
    """Return the manifest fields that store a planner's metadata.

    Raises:
        SaveError: it can't be stored, because it is neither paths of keys nor JSON.
    """
    if planner_data is None:
        return {}
    if isinstance(planner_data, dict) and all(_is_path(path) for path in planner_data.values()):
        return {"paths": planner_data}
    try:
        if json.loads(json.dumps(planner_data, allow_nan=False)) == planner_data:
            return {"extra": {PLANNER_DATA: planner_data}}
    except (TypeError, ValueError, RecursionError):
        pass
    raise SaveError(
        "the save planner's planner_data is neither paths of keys nor JSON (dicts with text as keys, lists, text, "
        "numbers): it can't be stored"
    )


def _is_path(value: object) -> bool:
    return isinstance(value, tuple) and all(type(part) in (str, int) for part in value)


def _item_key(item: WriteItem) -> tuple[str, Box | None]:
    if item.tensor_data is None:
        return item.index.fqn, None
    chunk = item.tensor_data.chunk
    return item.index.fqn, Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _checked_object(item: WriteItem, planner: SavePlanner) -> bytes:
    """Return a value as pickled by DCP's planner; refuses one that would need to run code at the load."""
    given = planner.resolve_data(item)
    if not isinstance(given, io.BytesIO):
        raise SaveError(
            f"{item.index.fqn}: the save planner gives a {type(given).__name__} for a value that it planned as bytes: "
            "expected io.BytesIO",
            key=item.index.fqn,
        )
    data = given.getvalue()
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
    """Records what a job has written, for DCP."""

    files: Sequence[WrittenFile] = ()

    def signed_off(self, files: Sequence[WrittenFile]) -> None:
        self.files = files


class _PlannerBlocks:
    """A ``BlockSource`` that gets each tensor from DCP's planner when it is written."""

    def __init__(self, planner: SavePlanner, items: dict[tuple[str, Box | None], WriteItem]):
        self._planner = planner
        self._items = items

    def blocks(self, item: plan.WriteItem) -> Iterator[memoryview]:
        given = self._planner.resolve_data(self._items[item.key, item.box])
        if not isinstance(given, torch.Tensor):
            raise SaveError(f"{item.key}: the save planner gives a {type(given).__name__} for a tensor", key=item.key)
        tensor = given.detach().resolve_conj().resolve_neg()
        if not can_be_boxes(tensor) or tensor.is_meta:
            raise SaveError(f"{item.key} is a {type(tensor).__name__} that can't be stored as plain data", key=item.key)
        found, planned = (str(tensor.dtype), list(tensor.shape)), (f"torch.{item.dtype}", list(item.box.sizes))
        if found != planned:
            raise SaveError(
                f"{item.key}: the save planner gives {found[0]} {found[1]}, but has planned {planned[0]} {planned[1]}: "
                "a planner that changes tensors (transform_object, resolve_data) must change its plan too",
                key=item.key,
            )
        return tensor_blocks(tensor, tensor.dtype)
