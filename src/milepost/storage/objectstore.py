"""``ObjectStorage``: a prefix of a bucket in S3, GCS, Azure or anything that speaks S3, through obstore.

A store has no folders (only names that begin with the folder's name and a slash), no rename and no append. In return an
object appears completely or not at all, and can be put on the condition that it is absent, or still has the version
that was read.
"""

from __future__ import annotations

import builtins
import errno
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from milepost.errors import StorageError
from milepost.storage.base import Bytes, Content, Entry, ReadHandle, Storage, WriteHandle, join, split
from milepost.storage.object_reader import ObjectReader
from milepost.storage.object_writer import ObjectWriter
from milepost.storage.retry import Retry
from milepost.storage.store_requests import NUM_STREAMS, REQUEST_TIMEOUT_S, StoreRequests, version_of
from milepost.storage.unfinished import abort_s3_uploads

_log = logging.getLogger(__name__)

APPEND_TRIES = 20
MAX_COPY_NBYTES = 5 << 30
"""Maximum size that S3 copies in one request."""


class ObjectStorage(Storage):
    """All objects below ``url``. No request is made before the first operation.

    Do not use it on both sides of a fork, which obstore's threads do not survive. A child may use it if its parent has
    not.
    """

    is_remote = True
    can_rename = False
    can_share = False
    has_conditional_put = True
    num_streams = NUM_STREAMS
    poll_s = 0.05

    def __init__(
        self, url: str, *, store: Any = None, retry: Retry | None = None, timeout_s: float = REQUEST_TIMEOUT_S
    ):
        """``store`` is an obstore client for the bucket of ``url``, used instead of a new one.

        Raises:
            ConfigError: ``url`` is not a store's URL, or obstore is not installed.
        """
        self._requests = StoreRequests(url, store=store, retry=retry, timeout_s=timeout_s)
        self.root = self._requests.root

    # ---- look and read ----

    def list(self, path: str) -> builtins.list[Entry]:
        objects, folders = self._requests.list_level(path)
        entries = {name: Entry(name, True, 0, 0.0) for name in map(_last, folders)}
        for meta in objects:
            if meta["path"] != self._requests.key(path):  # not the folder's own marker
                entries.setdefault(_last(meta["path"]), _entry(_last(meta["path"]), meta))
        return sorted(entries.values(), key=lambda entry: entry.name)

    def list_files(self, path: str) -> dict[str, Entry]:
        prefix = self._requests.key(path)
        start = len(prefix) + 1 if prefix else 0
        metas = {meta["path"][start:]: meta for meta in self._requests.list_below(path)}
        folders = {name[:end] for name in metas for end in _slashes(name)}  # may have an empty object as their marker
        return {name: _entry(name, metas[name]) for name in sorted(metas) if name and name not in folders}

    def stat(self, path: str) -> Entry | None:
        meta = self._requests.head(path) if path else None
        if meta is not None and meta["size"]:
            return _entry(split(path)[1], meta)
        if self._requests.has_any(
            path
        ):  # also if there is an empty object of its name, by which some tools mark a folder
            return Entry(split(path)[1], True, 0, 0.0)
        return _entry(split(path)[1], meta) if meta is not None else None

    def open_read(self, path: str) -> ReadHandle:
        meta = self._requests.head(path)
        if meta is None:
            raise self._missing("open", path)
        return ObjectReader(self._requests, path, meta["size"], meta["e_tag"])

    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        found = self._requests.get(path, limit)
        if found is None:
            raise self._missing("read", path)
        return found[0]

    def read_tagged(self, path: str, limit: int = 1 << 30) -> tuple[bytes, str] | None:
        return self._requests.get(path, limit)

    # ---- write ----

    def open_write(self, path: str, nbytes: int, *, shared: bool = False) -> WriteHandle:
        if shared:
            raise self._error("create", path, errno.ENOTSUP, "{}: an object can't be written by two processes")
        if self._requests.head(path) is not None:
            raise self._exists("create", path)
        return ObjectWriter(self._requests, path, nbytes)

    def write(self, path: str, data: Bytes) -> None:
        self._requests.create(path, data)

    def write_all(self, files: Mapping[str, Content]) -> None:
        try:
            puts = [self._requests.pool().submit(self._write_pieces, path, files[path]) for path in files]
        except RuntimeError:  # the interpreter shuts down: no pool takes work any more
            super().write_all(files)
            return
        for error in [put.exception() for put in puts]:
            if error is not None:
                raise error

    def _write_pieces(self, path: str, content: Content) -> None:
        """Create an object from one or several pieces; in parts if it is large."""
        if isinstance(content, Bytes):
            self._requests.create(path, content)
            return
        with self.open_write(path, 0) as handle:
            offset = 0
            for piece in content:
                handle.write(offset, [piece])
                offset += memoryview(piece).nbytes
            handle.sync()

    def replace(self, path: str, data: Bytes) -> None:
        self._put("overwrite", path, data)

    def put_if(self, path: str, data: Bytes, tag: str | None) -> None:
        self._put("create" if tag is None else json.loads(tag), path, data)

    def _put(self, mode: Any, path: str, data: Bytes) -> None:
        self._requests.put(mode, path, data, f"replacing {self._requests.describe(path)}")

    def append(self, path: str, data: Bytes) -> None:
        """See ``Storage``. The object is read, and replaced if it still has the version that was read."""
        for _ in range(APPEND_TRIES):
            found = self.read_tagged(path)
            old, tag = found if found is not None else (b"", None)
            try:
                return self.put_if(path, old + bytes(data), tag)
            except StorageError as error:
                if error.errno != errno.EEXIST:
                    raise
        raise self._exists("append", path)

    def share(self, src: str, dst: str) -> bool:
        """Copy the object within the store, without transferring bytes to this process."""
        nbytes = self._requests.nbytes_of(src)
        if nbytes is None or nbytes > MAX_COPY_NBYTES:
            return False
        try:
            self._requests.copy(src, dst)
        except StorageError as error:
            _log.info("not copied within the store, so it is written again: %s", error)
            return False
        return True

    # ---- names ----

    def make_folder(self, path: str, *, synced: bool = True) -> None:
        """Only check the name: a folder exists once an object is in it."""
        self._requests.key(path)

    def sync_folder(self, path: str) -> None:
        """Only check the name: an object is durable and listed when the store answers."""
        self._requests.key(path)

    def rename(self, src: str, dst: str) -> None:
        raise self._error("rename", src, errno.ENOTSUP, "{}: an object store can't rename")

    def exchange(self, one: str, other: str) -> bool:
        """Return False: a store can't exchange names."""
        return False

    def remove(self, path: str) -> None:
        self._requests.delete(path, [self._requests.key(path)])

    def remove_files(self, folder: str, names: Sequence[str]) -> None:
        self._requests.delete(folder, [self._requests.key(join(folder, name)) for name in names])

    def remove_tree(self, path: str) -> None:
        names = self.list_files(path)
        key = self._requests.key(path)
        self._requests.delete(path, [join(key, name) for name in names] if names or not path else [key])

    def abort_uploads(self, path: str, is_dead: Callable[[str], bool] = lambda name: True) -> int:
        url, prefix = self._requests.url, self._requests.key(path)
        if url.scheme != "s3" or not url.bucket:
            return 0  # Azure drops uncommitted blocks itself; for GCS a lifecycle rule does
        return self._requests.send(
            "abort",
            path,
            f"looking for unfinished uploads below {self._requests.describe(path)}",
            lambda: abort_s3_uploads(url.bucket, f"{prefix}/" if prefix else "", is_dead),
        )

    def _missing(self, operation: str, path: str) -> StorageError:
        return self._error(operation, path, errno.ENOENT, "no such object: {}")

    def _exists(self, operation: str, path: str) -> StorageError:
        return self._error(operation, path, errno.EEXIST, "the object exists: {}")

    def _error(self, operation: str, path: str, number: int, message: str) -> StorageError:
        where = self._requests.describe(path)
        return StorageError(message.format(where), operation=operation, path=where, errno=number)


def _slashes(name: str) -> list[int]:
    return [index for index, letter in enumerate(name) if letter == "/"]


def _last(key: str) -> str:
    return key.rstrip("/").rpartition("/")[2]


def _entry(name: str, meta: Any) -> Entry:
    return Entry(name, False, meta["size"], meta["last_modified"].timestamp(), tag=version_of(meta))
