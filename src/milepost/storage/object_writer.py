"""Write an object: parts in parallel, directly from the caller's memory, in bounded memory.

An object becomes visible when its upload is completed, or never. obstore retries failed parts.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from milepost.errors import StorageError
from milepost.storage.base import Bytes, WriteHandle, byte_views
from milepost.storage.store_requests import Aborted, StoreRequests
from milepost.storage.system_errors import storage_error

log = logging.getLogger("milepost")

MIN_PART_NBYTES = 16 << 20
"""Minimum size of an upload's parts; smaller objects are sent in one request."""
MAX_PARTS = 9_000
"""S3 accepts 10,000 parts; a file may be slightly larger than announced."""
MAX_HELD_NBYTES = 4 * MIN_PART_NBYTES
"""Limit on bytes held in memory until they are sent; beyond it, copied early bytes go to an unnamed file."""
SILENCE_S = 20.0
"""An upload that made no progress for this long is logged."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes waiting for their turn: in memory, or at ``place`` in the spill file."""

    nbytes: int
    view: memoryview | None = None
    place: int = 0


class ObjectWriter(WriteHandle):
    """An object being written: accepts ranges in any order and sends them in ascending order.

    A small object is sent in one request, by ``sync``, on the condition that it does not exist. A larger one is sent in
    parts while it is written: nothing of it is visible until ``sync`` has completed the upload.
    """

    is_sequential = True

    def __init__(self, requests: StoreRequests, name: str, nbytes: int):
        self.path = requests.describe(name)
        self._requests = requests
        self._name = name
        self._part_nbytes = max(MIN_PART_NBYTES, -(-nbytes // MAX_PARTS))
        self._changed = threading.Condition()
        self._waiting: dict[int, _Piece] = {}  # by offset, disjoint
        self._next = 0  # the offset up to which all bytes have been written or sent
        self._held_nbytes = 0  # size of the waiting pieces in memory
        self._spill: IO[bytes] | None = None
        self._spilt_nbytes = 0
        self._end = 0
        self._is_complete = False
        self._given_up = False
        self._upload: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._is_stored = False

    def write(self, offset: int, buffers: Sequence[Bytes], *, stable: bool = False) -> None:
        """See ``WriteHandle``. ``stable`` buffers are sent without a copy."""
        for view in byte_views(buffers):
            with self._changed:
                self._put(offset, view, is_stable=stable)
            offset += len(view)

    def _put(self, offset: int, view: memoryview, *, is_stable: bool) -> None:
        self._raise_failure()
        if offset < self._next or offset in self._waiting:
            raise StorageError(f"byte {offset} of {self.path} is written twice", operation="write", path=self.path)
        # Wait only while the upload has data to send: missing bytes may have to come from this thread.
        while self._held_nbytes > MAX_HELD_NBYTES and self._upload and self._next in self._waiting:
            self._changed.wait(1.0)
            self._raise_failure()
        if not is_stable and self._held_nbytes > MAX_HELD_NBYTES and offset != self._next:
            self._waiting[offset] = self._spill_out(view)
        else:
            self._waiting[offset] = _Piece(len(view), view if is_stable else memoryview(bytes(view)))
            self._held_nbytes += len(view)
        self._end = max(self._end, offset + len(view))
        self._changed.notify_all()
        if self._upload is None and self._end > MIN_PART_NBYTES and self._next in self._waiting:
            self._start()

    def _spill_out(self, view: memoryview) -> _Piece:
        try:
            if self._spill is None:
                self._spill = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this handle
            self._spill.seek(self._spilt_nbytes)
            self._spill.write(view)
        except OSError as error:
            doing = f"holding a part of {self.path} in a temporary file (see TMPDIR)"
            raise storage_error(error, "write", self.path, doing) from error
        piece = _Piece(len(view), place=self._spilt_nbytes)
        self._spilt_nbytes += len(view)
        return piece

    def _start(self) -> None:
        self._upload = threading.Thread(target=self._run, name="milepost-upload", daemon=True)
        self._upload.start()

    def _run(self) -> None:
        try:
            self._requests.put_parts(self._name, self._pieces(), self._part_nbytes)
        except BaseException as error:  # noqa: BLE001 - the top of a thread: re-raised where the handle is used
            with self._changed:
                self._failure = error
                self._waiting.clear()
                self._changed.notify_all()

    def _pieces(self) -> Iterator[memoryview]:
        """Yield the object's bytes in ascending order as they arrive. The upload pulls when it has room."""
        while True:
            with self._changed:
                while self._next not in self._waiting and not self._is_complete and not self._given_up:
                    self._changed.wait()
                if self._given_up:
                    raise Aborted
                view = self._take()
            if view is None:
                return
            yield view

    def _take(self) -> memoryview | None:
        """Return the next bytes: those written, zeros in gaps, None at the end."""
        piece = self._waiting.pop(self._next, None)
        if piece is None:
            if self._waiting and min(self._waiting) < self._next:
                raise StorageError(
                    f"byte {min(self._waiting)} of {self.path} was written twice", operation="write", path=self.path
                )
            if self._next >= self._end:
                return None
            view = memoryview(bytes(min(min(self._waiting) - self._next, MIN_PART_NBYTES)))
        elif piece.view is not None:
            view = piece.view
            self._held_nbytes -= piece.nbytes
        else:
            assert self._spill is not None
            self._spill.seek(piece.place)
            view = memoryview(self._spill.read(piece.nbytes))
        self._next += len(view)
        self._changed.notify_all()
        return view

    def sync(self) -> None:
        """Send the remaining bytes; returns once the object is complete and durable."""
        with self._changed:
            self._raise_failure()
            self._is_complete = True
            self._changed.notify_all()
            if self._upload is None and self._end > MIN_PART_NBYTES:
                self._start()
        if self._upload is None:
            self._requests.create(self._name, b"".join(self._pieces()))
        else:
            self._await(self._upload)
        self._is_stored = True

    def _await(self, upload: threading.Thread) -> None:
        sent = -1
        while upload.is_alive():
            upload.join(SILENCE_S)
            if upload.is_alive() and sent == self._next:
                log.warning("%s: the store has accepted no data for %.0f s; still trying", self.path, SILENCE_S)
            sent = self._next
        with self._changed:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Close the handle. Without a ``sync`` nothing is stored: an upload in progress is aborted."""
        if self._upload is not None and not self._is_stored:
            with self._changed:
                self._given_up = True
                self._changed.notify_all()
            self._upload.join()
        self._waiting.clear()
        if self._spill is not None:
            self._spill.close()
