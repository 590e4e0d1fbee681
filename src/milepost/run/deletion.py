"""Deletion of folders in a run's folder: all hidden from readers first, then removed together.

Each folder is hidden by one atomic rename into a place that no reader takes for a checkpoint and whose marker proves
that it is Milepost's. There is one place and one marker for all of them, since each sync is a commit of the file
system's journal. After a commit the attempt itself becomes the place: it carries its owner's record already.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

from milepost.errors import StorageError
from milepost.run.owner import OWNER_PREFIX, this_process
from milepost.run.step_names import DELETING_PREFIX
from milepost.storage.base import Storage, join, split

_log = logging.getLogger(__name__)

MARKER_NAME = "milepost-is-deleting-this"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}


class Deletion:
    """Folders in ``folder`` that are deleted together; the storage must be able to rename. Call :meth:`finish` last."""

    def __init__(self, storage: Storage, folder: str):
        self._storage = storage
        self._folder = folder
        self._place = ""
        self._places: list[str] = []
        self._hidden: list[str] = []
        self._afterwards: list[str] = []
        self._may_return = False
        """True if a power cut may undo the last rename."""

    def begin_with(self, attempt: str) -> None:
        """Delete this process's save attempt; its owner's record, which is durable, marks it as the place for others.

        Raises StorageError. No error if it is gone.
        """
        place = self._new_place()
        try:
            self._storage.rename(attempt, place)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
        else:
            self._use(place)
            self._hidden.append(place)

    def hide(self, path: str) -> str | None:
        """Rename a folder so that no reader finds it; return its new path, or None if it is gone.

        After a power cut none that was hidden before it is back. Raises StorageError; the folder is then still there.
        """
        if self._may_return:
            self._storage.sync_folder(self._folder)
            self._may_return = False
        while self._storage.stat(path) is not None:
            hidden = self._free_name(split(path)[1])
            try:
                self._storage.rename(path, hidden)
            except StorageError as error:
                if error.errno != errno.ENOENT:
                    raise
                # Another process renamed the folder first, or swept the empty place as stale.
                if self._place and self._storage.stat(self._place) is None:
                    self._place = ""
                continue
            self._hidden.append(hidden)
            self._may_return = True
            return hidden
        return None

    def show(self, hidden: str, path: str) -> None:
        """Undo :meth:`hide`."""
        self._storage.rename(hidden, path)
        self._hidden.remove(hidden)
        self._storage.sync_folder(self._folder)
        self._may_return = False

    def remove_afterwards(self, path: str) -> None:
        """Remove the file ``path``, if there is one, once what it belongs to is durably hidden."""
        self._afterwards.append(path)

    def finish(self) -> None:
        """Remove all that was hidden, each also if another can't be removed.

        Raises StorageError: something was not removed. It is visible to no reader, and a later sweep removes it.
        """
        if self._hidden:
            # Otherwise a folder could reappear, half deleted, after a power cut.
            for folder in (*self._places, self._folder):
                self._sync(folder)
        failures = [
            *self._failures(self._storage.remove, self._afterwards),
            *self._failures(self._storage.remove_tree, [path for path in self._hidden if path not in self._places]),
            *self._failures(self._remove_place, self._places),
        ]
        if failures:
            raise failures[0]

    @staticmethod
    def _failures(remove: Callable[[str], None], paths: Iterable[str]) -> Iterator[StorageError]:
        for path in paths:
            try:
                remove(path)
            except StorageError as error:
                yield error

    def finish_quietly(self) -> None:
        """:meth:`finish`, but a failure is logged, not raised: the next sweep tries again."""
        try:
            self.finish()
        except StorageError as error:
            _log.warning("%s/%s could not be removed yet: %s", self._storage.root, self._place or self._folder, error)

    def _sync(self, folder: str) -> None:
        try:
            self._storage.sync_folder(folder)
        except StorageError as error:
            if error.errno != errno.ENOENT:  # another process's sweep was quicker
                raise

    def _free_name(self, name: str) -> str:
        try:
            return f"{self._place or self._make_place()}/{name}"
        except StorageError as error:
            if error.errno not in _NO_ROOM:
                raise
            # A full disk has no space for the marker; a rename needs neither space nor a descriptor.
            return self._new_place()

    def _make_place(self) -> str:
        place = self._new_place()
        try:
            self._storage.make_folder(place, synced=False)
            marker = this_process(time.time()).dump()
            self._storage.write(f"{place}/{MARKER_NAME}", marker)  # syncs the file and the folder
        except BaseException:  # Ctrl-C too: a place without its marker would count as in use
            with contextlib.suppress(StorageError):
                self._storage.remove_tree(place)
            raise
        self._use(place)
        return place

    def _use(self, place: str) -> None:
        self._place = place
        self._places.append(place)

    def _new_place(self) -> str:
        return join(self._folder, DELETING_PREFIX + uuid.uuid4().hex)

    def _remove_place(self, place: str) -> None:
        """Remove a place and all that is in it, its markers last."""
        for entry in self._storage.list(place):
            if entry.name != MARKER_NAME and not entry.name.startswith(OWNER_PREFIX):
                self._storage.remove_tree(f"{place}/{entry.name}")
        self._storage.remove_tree(place)


@contextlib.contextmanager
def deleting(storage: Storage, folder: str, together: Deletion | None = None) -> Iterator[Deletion]:
    """Yield ``together``, which its owner finishes, or else a new deletion that is finished at the end of the block."""
    if together is not None:
        yield together
        return
    deletion = Deletion(storage, folder)
    try:
        yield deletion
    except BaseException:
        with contextlib.suppress(StorageError):  # report the first error
            deletion.finish()
        raise
    deletion.finish()
