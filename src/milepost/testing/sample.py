"""Create real checkpoints without torch and processes, for tests of code that reads, lists or deletes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from milepost.format import record
from milepost.format.box import Box
from milepost.format.manifest import BLOCK_NBYTES, Lineage, Manifest
from milepost.format.shares import FileDigests, ShareCount, joined
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import begin_attempt, new_save_id
from milepost.run.commit import publish
from milepost.run.place import Place
from milepost.run.signoff import SignOff, WrittenFile, segment_of, sign_off, wait_for_sign_offs
from milepost.saving.writer import write_file
from milepost.storage.base import Storage
from milepost.tensors.plan import LocalLayout, TensorSpec, WriteItem, plan_save

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class _Arrays:
    arrays: Mapping[str, Array]

    def blocks(self, item: WriteItem) -> Iterator[memoryview]:
        flat = np.ascontiguousarray(self.arrays[item.key][item.box.index()]).reshape(-1).view(np.uint8)
        data = memoryview(flat.data)
        for start in range(0, len(data), BLOCK_NBYTES):
            yield data[start : start + BLOCK_NBYTES]


def save_arrays(
    storage: Storage,
    path: str,
    arrays: Mapping[str, Array],
    *,
    objects: Mapping[str, object] | None = None,
    step: int | None = None,
    kind: str = "full",
    num_ranks: int = 1,
    now: float = 0.0,
    extra: Mapping[str, object] | None = None,
    lineage: Lineage | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Save ``arrays`` through the complete protocol, as if sharded over ``num_ranks`` ranks along their first dim.

    ``objects`` are plain values (see ``record.object_record``); rank 0 writes them.
    """
    stored = {key: record.object_record(value) for key, value in (objects or {}).items()}
    layouts = [
        LocalLayout(
            tensors=tuple(_spec(key, array, rank, num_ranks) for key, array in arrays.items()),
            objects=tuple(stored) if rank == 0 else (),
        )
        for rank in range(num_ranks)
    ]
    save_id = new_save_id()
    attempt = begin_attempt(storage, path, save_id)
    place = Place.of(storage, attempt, path, save_id)
    for rank, plan in enumerate(plan_save(layouts)):
        files: tuple[WrittenFile, ...] = ()
        if not plan.is_empty:
            files = (write_file(storage, place, plan, _Arrays(arrays), stored, num_threads=1),)
        storage.sync_folder(place.folder)
        sign_off(storage, attempt, SignOff(rank, save_id, segment_of(files)))
    signed = wait_for_sign_offs(storage, attempt, num_ranks, save_id, timeout_s=10)
    info = SaveInfo(step=step, kind=kind, extra=extra or {}, lineage=lineage, metrics=metrics or {})
    return publish(storage, attempt, path, signed, info, now=now)


def _spec(key: str, array: Array, rank: int, num_ranks: int) -> TensorSpec:
    shape = array.shape
    if not shape:
        return TensorSpec(key, array.dtype.name, shape, (Box.whole(shape),) if rank == 0 else ())
    share = -(-shape[0] // num_ranks)
    start, stop = min(rank * share, shape[0]), min((rank + 1) * share, shape[0])
    box = Box((start, *(0,) * (len(shape) - 1)), (stop - start, *shape[1:]))
    return TensorSpec(key, array.dtype.name, shape, (box,))


def file_digests(folder: Path) -> dict[str, FileDigests]:
    """Return the digests of a folder's files, as computed by ranks that write a step of Hugging Face files."""
    found = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        count = ShareCount(len(data))
        count.add(0, memoryview(data))
        found[path.name] = joined(len(data), [count.share()])
    return found
