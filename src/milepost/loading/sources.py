"""The sources of a load's bytes: the checkpoint, or the part of the same save in this node's own folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, StorageError
from milepost.format.digest import BlockDigests
from milepost.format.manifest import Manifest
from milepost.loading.names import Translation
from milepost.loading.reader import HandedBlocks, TensorReads
from milepost.loading.values import read_objects
from milepost.run import catalog, checkpoint_record
from milepost.storage.base import Storage
from milepost.tensors.plan import TensorSpec
from milepost.tensors.read_plan import ReadItem, has_all, plan_load
from milepost.tensors.state import FlatState

log = logging.getLogger("milepost")


@dataclass(frozen=True, slots=True)
class Near:
    """A folder of this node with its part of a save, or the complete save."""

    storage: Storage
    path: str
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.storage.root}/{self.path}"


def read_own_part(storage: Storage, path: str) -> Manifest:
    """The manifest of this node's part of a step.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointDamagedError: files of it are missing or of another size.
    """
    record = checkpoint_record.read_part(storage, path)
    record.require_undamaged(storage, path)
    return record.manifest


def find_near(storage: Storage, path: str, save_id: str) -> Near | None:
    """Find the part of the save ``save_id`` in this node's folder at ``path``; None if there is no reliable one."""
    try:
        info = catalog.examine(storage, path)
        if info is None or info.save_id != save_id or info.state not in ("part", "committed"):
            return None
        read = read_own_part if info.state == "part" else checkpoint_record.read_manifest
        return Near(storage, path, read(storage, path))
    except (CheckpointDamagedError, CheckpointNotFoundError, StorageError) as error:
        log.warning("%s/%s is not read: %s", storage.root, path, error)
        return None


def _digests_of(near: Near) -> BlockDigests | None:
    """The digests; None, with a log line, if they can't be read."""
    try:
        return checkpoint_record.read_digests(near.storage, near.path, near.manifest)
    except (CheckpointDamagedError, StorageError) as error:
        log.warning("%s is not read: %s", near, error)
        return None


class Sources:
    """The reads of one load on this rank.

    If reading from the local part fails, that is logged, and the data is read from the checkpoint itself.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        recorded: Manifest,
        translation: Translation,
        near: Near | None,
        flat: FlatState,
        wanted: Sequence[TensorSpec],
        *,
        digests: BlockDigests | None,
        common: Mapping[str, bytes],
    ):
        self._storage = storage
        self._folder = folder
        self._flat = flat
        self._recorded = recorded
        self._manifest = translation.manifest
        self._origins = translation.origins
        self._wanted = {spec.key: spec for spec in wanted}
        self._digests = digests
        self._common = common
        self._near_digests = _digests_of(near) if near is not None else None
        self._near = near if self._near_digests is not None else None
        self._near_reads: TensorReads | None = None
        near_keys = self._near_keys()
        near_wanted = [spec for key, spec in self._wanted.items() if key in near_keys]
        self._near_items = plan_load(self._near.manifest, near_wanted) if self._near is not None else ()
        self._items = self._planned(self._wanted.keys() - near_keys)

    @property
    def nbytes(self) -> int:
        """Estimate the bytes to read."""
        return sum(item.shard.data_nbytes for item in (*self._items, *self._near_items))

    def _near_keys(self) -> set[str]:
        """The tensors whose requested data is completely in the local part."""
        if self._near is None:
            return set()
        tensors = self._near.manifest.tensors
        return {
            key
            for key, spec in self._wanted.items()
            if key in tensors and key not in self._origins and has_all(tensors[key].shards, spec)
        }

    def _planned(self, keys: Collection[str]) -> tuple[ReadItem, ...]:
        return plan_load(self._recorded, [s for key, s in self._wanted.items() if key in keys], self._origins)

    def read_objects(self, keys: Sequence[str]) -> None:
        """Fill the slots of values that are not tensors. Raises like ``reader.read_objects``."""
        near = self._near
        left = set(keys)
        if near is not None:
            here = [key for key in keys if key in near.manifest.objects]
            with self._falling_back():
                for key, value in read_objects(near.storage, near.path, near.manifest, here):
                    self._flat.slots[key].fill(value)
                    left.discard(key)
        rest = [key for key in keys if key in left]
        for key, value in read_objects(self._storage, self._folder, self._manifest, rest, self._common):
            self._flat.slots[key].fill(value)

    def due(self, is_due: Callable[[str], bool]) -> list[ReadItem]:
        """Plan the reads from the checkpoint itself, for the tensors with ``is_due(key)``."""
        return [item for item in self._items if is_due(item.leaf)]

    def reads(
        self,
        is_due: Callable[[str], bool],
        on_read: Callable[[int], None] | None,
        handed: HandedBlocks | None = None,
        *,
        is_new: bool = False,
    ) -> Iterator[TensorReads]:
        """Yield the reads that fill the tensors with ``is_due(key)``, from the local part first.

        The caller runs the tasks of each within :meth:`guard`, and closes it, before it takes the next. Raises, like
        the tasks, as ``reader.read_tensors`` does for the checkpoint itself. Shared blocks (``handed``) are left to the
        caller. ``is_new`` as for ``TensorReads``.
        """
        tensors = self._flat.tensors
        items = self.due(is_due)
        near_items = [item for item in self._near_items if is_due(item.leaf)]
        if self._near is not None and near_items:
            near, found = self._near, None
            with self._falling_back():
                found = TensorReads(
                    *(near.storage, near.path, near_items, tensors, self._near_digests), on_read=on_read, is_new=is_new
                )
            if found is not None:
                self._near_reads = found
                yield found
        if self._near is None:
            items += self._planned({item.leaf for item in near_items})
        yield TensorReads(
            *(self._storage, self._folder, items, tensors, self._digests),
            on_read=on_read,
            handed=handed,
            is_new=is_new,
        )

    def guard(self, reads: TensorReads) -> AbstractContextManager[None]:
        """Log failures of ``reads`` from this node's folder; raise others."""
        return self._falling_back() if reads is self._near_reads else nullcontext()

    @contextmanager
    def _falling_back(self) -> Iterator[None]:
        """Log a failure of the local part, and stop using it."""
        near = self._near
        assert near is not None
        try:
            yield
        except (CheckpointDamagedError, StorageError) as error:
            log.warning("%s\nReading from %s/%s instead.", error, self._storage.root, self._folder)
            with suppress(StorageError):
                catalog.mark_damaged(near.storage, near.path, str(error), now=time.time())
            self._near = None
