"""``ObjectStorage``: a prefix of a bucket in S3, GCS, Azure or anything that speaks S3, through obstore.

A store has no folders (only names that begin with the folder's name and a slash), no rename and no append. In return an
object appears completely or not at all, and can be put on the condition that it is absent, or still has the version
that was read.
"""

from __future__ import annotations

import builtins
import datetime
import errno
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from milepost.errors import ConfigError, StorageError
from milepost.storage.base import (
    Bytes,
    Content,
    Entry,
    ReadHandle,
    Storage,
    WriteHandle,
    check_name,
    format_nbytes,
    join,
    split,
)
from milepost.storage.object_reader import Budget, ObjectReader
from milepost.storage.object_writer import NUM_STREAMS, Aborted, ObjectWriter
from milepost.storage.retry import Retry
from milepost.storage.store_errors import cause_of
from milepost.storage.store_urls import StoreUrl, connect, parse_store_url
from milepost.storage.unfinished import abort_s3_uploads

_log = logging.getLogger(__name__)

T = TypeVar("T")

REQUEST_TIMEOUT_S = 300.0
"""A request without an answer by then is retried: a part of 16 MiB needs 55 KB/s."""
CONNECT_TIMEOUT_S = 10.0
AHEAD_NBYTES = 128 << 20
"""Limit on bytes fetched ahead, over all open objects of a storage."""
APPEND_TRIES = 20
MAX_COPY_NBYTES = 5 << 30
"""Maximum size that S3 copies in one request."""

_PROBE = b"a store that takes this has no conditional put"


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
        if store is None and importlib.util.find_spec("obstore") is None:
            raise ConfigError(f"{url.partition('://')[0]}:// needs obstore: pip install 'milepost[cloud]'")
        self._url = parse_store_url(url) if store is None else _given(url)
        self.root = str(self._url)
        self.ahead = Budget(AHEAD_NBYTES)
        self._retry = retry if retry is not None else Retry()
        self._timeout_s = timeout_s
        self._clients: dict[bool, Any] = {} if store is None else {True: store, False: store}
        self._pool: ThreadPoolExecutor | None = None
        self._is_proved = False
        self._lock = threading.Lock()

    # ---- for the handles ----

    def describe(self, name: str) -> str:
        """Name an object for people."""
        return join(self.root, name)

    def pool(self) -> ThreadPoolExecutor:
        """Threads for concurrent requests."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="milepost-store")
            return self._pool

    def get_range(self, name: str, start: int, stop: int, tag: str | None) -> Any:
        """Read the bytes ``[start, stop)`` of version ``tag`` of an object; the result supports the buffer protocol."""
        options: dict[str, Any] = {"range": (start, stop)}
        if tag is not None:
            options["if_match"] = tag
        nbytes = stop - start

        def act() -> Any:
            data = self._client().get(self._key(name), options=options).bytes()
            if len(data) != nbytes:
                raise _CutShort
            return data

        return self._do(
            "read", name, f"reading {format_nbytes(nbytes)} at offset {start} of {self.describe(name)}", act
        )

    def create(self, name: str, data: Bytes) -> None:
        """Put an object that must not exist, in one request."""
        try:
            self._put("create", name, data, f"writing {self.describe(name)}")
        except StorageError as error:
            if error.errno == errno.ENOTSUP:
                raise self._unconditional("refuses") from error
            raise
        self._prove(name, data)

    def _create_of(self, name: str, content: Content) -> None:
        """Create an object from one or several pieces, see :meth:`create`; in parts if it is large."""
        if isinstance(content, Bytes):
            self.create(name, content)
            return
        with self.open_write(name, 0) as handle:
            offset = 0
            for piece in content:
                handle.write(offset, [piece])
                offset += memoryview(piece).nbytes
            handle.sync()

    def put_parts(self, name: str, pieces: Iterable[memoryview], part_nbytes: int, num_streams: int) -> None:
        """Put an object in parts, cut from ``pieces``. obstore retries parts, not the upload."""
        sent = _Counted(pieces)
        key = self._key(name)
        try:
            self._client(is_upload=True).put(
                key, iter(sent), use_multipart=True, chunk_size=part_nbytes, max_concurrency=num_streams
            )
        except Aborted:
            return
        except StorageError:  # from the pieces
            raise
        except Exception as error:
            cause = cause_of(error)
            # The last answer may have been lost although the upload was completed. No one else writes under this name.
            if not sent.is_spent or self._size(name) != sent.nbytes:
                raise cause.error("write", self.describe(name), f"writing {self.describe(name)}") from error
        found = self._size(name)
        if found != sent.nbytes:
            raise StorageError(
                f"{self.describe(name)} has {format_nbytes(found or 0)} after {format_nbytes(sent.nbytes)} were sent; "
                "do not trust this store",
                operation="write",
                path=self.describe(name),
                errno=errno.EIO,
            )

    # ---- Storage ----

    def list(self, path: str) -> builtins.list[Entry]:
        found = self._do(
            "list", path, f"listing {self.describe(path)}", lambda: self._client().list_with_delimiter(self._key(path))
        )
        objects = [meta for meta in found["objects"] if meta["path"] != self._key(path)]  # not its marker
        entries = {name: Entry(name, True, 0, 0.0) for name in map(_last, found["common_prefixes"])}
        for meta in objects:
            entries.setdefault(_last(meta["path"]), _entry(_last(meta["path"]), meta))
        return sorted(entries.values(), key=lambda entry: entry.name)

    def list_files(self, path: str) -> dict[str, Entry]:
        prefix = self._key(path)
        start = len(prefix) + 1 if prefix else 0
        found = self._do(
            "list", path, f"listing {self.describe(path)}", lambda: self._client().list(prefix or None).collect()
        )
        metas = {meta["path"][start:]: meta for meta in found}
        folders = {name[:end] for name in metas for end in _slashes(name)}  # may have an empty object as their marker
        return {name: _entry(name, metas[name]) for name in sorted(metas) if name and name not in folders}

    def stat(self, path: str) -> Entry | None:
        if path:
            meta = self._head(path)
            if meta is not None:
                return _entry(split(path)[1], meta)
        if self._has_any(path):
            return Entry(split(path)[1], True, 0, 0.0)
        return None

    def _has_any(self, path: str) -> bool:
        """Return whether an object is below a folder. A listed name is not enough: some stores list empty folders."""

        def act() -> bool:
            return any(self._client().list(self._key(path) or None, chunk_size=1))

        return self._do("stat", path, f"reading the status of {self.describe(path)}", act)

    def open_read(self, path: str) -> ReadHandle:
        meta = self._head(path)
        if meta is None:
            raise self._missing("open", path)
        return ObjectReader(self, path, meta["size"], meta["e_tag"])

    def open_write(self, path: str, nbytes: int, *, shared: bool = False) -> WriteHandle:
        if shared:
            message = f"{self.describe(path)}: an object can't be written by two processes"
            raise StorageError(message, operation="create", path=self.describe(path), errno=errno.ENOTSUP)
        if self._head(path) is not None:
            raise self._exists("create", path)
        return ObjectWriter(self, path, nbytes)

    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        found = self.read_tagged(path, limit)
        if found is None:
            raise self._missing("read", path)
        return found[0]

    def read_tagged(self, path: str, limit: int = 1 << 30) -> tuple[bytes, str] | None:
        def act() -> tuple[bytes, str]:
            result = self._client().get(self._key(path))
            nbytes = result.meta["size"]
            if nbytes > limit:
                raise StorageError(
                    f"{self.describe(path)} has {format_nbytes(nbytes)}; expected at most {format_nbytes(limit)}",
                    operation="read",
                    path=self.describe(path),
                    errno=errno.EFBIG,
                )
            data = bytes(result.bytes())
            if len(data) != nbytes:
                raise _CutShort
            return data, _tag(result.meta)

        try:
            return self._do("read", path, f"reading {self.describe(path)}", act)
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def write(self, path: str, data: Bytes) -> None:
        self.create(path, data)

    def write_all(self, files: Mapping[str, Content]) -> None:
        try:
            puts = [self.pool().submit(self._create_of, path, content) for path, content in files.items()]
        except RuntimeError:  # the interpreter shuts down: no pool takes work any more
            super().write_all(files)
            return
        for error in [put.exception() for put in puts]:
            if error is not None:
                raise error

    def replace(self, path: str, data: Bytes) -> None:
        self._put("overwrite", path, data, f"replacing {self.describe(path)}")

    def put_if(self, path: str, data: Bytes, tag: str | None) -> None:
        mode = "create" if tag is None else json.loads(tag)
        self._put(mode, path, data, f"replacing {self.describe(path)}")

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

    def make_folder(self, path: str, *, synced: bool = True) -> None:
        """Do nothing: a folder exists once an object is in it."""
        self._key(path)

    def sync_folder(self, path: str) -> None:
        """Do nothing: an object is durable and listed when the store answers."""
        self._key(path)

    def rename(self, src: str, dst: str) -> None:
        message = f"{self.root}: an object store can't rename"
        raise StorageError(message, operation="rename", path=self.describe(src), errno=errno.ENOTSUP)

    def exchange(self, one: str, other: str) -> bool:
        """Return False: a store can't exchange names."""
        return False

    def share(self, src: str, dst: str) -> bool:
        """Copy the object within the store, without transferring bytes to this process."""
        doing = f"copying {self.describe(src)} to {self.describe(dst)} within the store"
        nbytes = self._size(src)
        if nbytes is None or nbytes > MAX_COPY_NBYTES:
            return False
        try:
            self._do("share", dst, doing, lambda: self._client().copy(self._key(src), self._key(dst)))
        except StorageError as error:
            _log.info("not copied within the store, so it is written again: %s", error)
            return False
        return True

    def remove(self, path: str) -> None:
        self._delete(path, [self._key(path)])

    def remove_files(self, folder: str, names: Sequence[str]) -> None:
        self._delete(folder, [self._key(join(folder, name)) for name in names])

    def remove_tree(self, path: str) -> None:
        names = self.list_files(path)
        keys = [join(self._key(path), name) for name in names]
        self._delete(path, keys if keys or not path else [self._key(path)])

    def abort_uploads(self, path: str, is_dead: Callable[[str], bool] = lambda name: True) -> int:
        if self._url.scheme != "s3" or not self._url.bucket:
            return 0  # Azure drops uncommitted blocks itself; for GCS a lifecycle rule does
        prefix = self._key(path)
        return self._do(
            "abort",
            path,
            f"looking for unfinished uploads below {self.describe(path)}",
            lambda: abort_s3_uploads(self._url.bucket, f"{prefix}/" if prefix else "", is_dead),
        )

    # ---- requests ----

    def _key(self, path: str) -> str:
        """Return the key of a name: below the bucket, not below the root."""
        return join(self._url.path, check_name(self.root, path)) if path else self._url.path

    def _client(self, *, is_upload: bool = False) -> Any:
        _forbid_after_fork()
        with self._lock:
            if is_upload not in self._clients:
                self._clients[is_upload] = connect(
                    self._url,
                    client_options={
                        "timeout": datetime.timedelta(seconds=self._timeout_s),
                        "connect_timeout": datetime.timedelta(seconds=min(self._timeout_s, CONNECT_TIMEOUT_S)),
                    },
                    retry_config=self._parts_retry() if is_upload else {"max_retries": 0},
                )
            return self._clients[is_upload]

    def _parts_retry(self) -> dict[str, Any]:
        """Return the same retry rule in obstore's form, for parts."""
        return {
            "max_retries": self._retry.num_tries - 1,
            "retry_timeout": datetime.timedelta(seconds=self._retry.deadline_s),
            "backoff": {
                "init_backoff": datetime.timedelta(seconds=self._retry.first_wait_s),
                "max_backoff": datetime.timedelta(seconds=self._retry.max_wait_s),
                "base": 2,
            },
        }

    def _do(self, operation: str, path: str, doing: str, act: Callable[[], T]) -> T:
        """Make a request, with retries of transient failures."""
        try:
            return self._retry.call(doing, act, _why_again)
        except (StorageError, ConfigError):
            raise
        except _CutShort as error:
            raise StorageError(
                f"the answer was truncated while {doing}",
                operation=operation,
                path=self.describe(path),
                errno=errno.ECONNRESET,
            ) from error
        except Exception as error:
            raise cause_of(error).error(operation, self.describe(path), doing) from error

    def _put(self, mode: Any, path: str, data: Bytes, doing: str) -> None:
        key = self._key(path)
        payload = memoryview(data).cast("B") if memoryview(data).nbytes else b""
        try:
            self._do("write", path, doing, lambda: self._client().put(key, payload, mode=mode, use_multipart=False))
        except StorageError as error:
            # An earlier delivery of this request may have succeeded: then the object is ours. Objects that must belong
            # to one process name it in their bytes.
            if error.errno != errno.EEXIST or not self._holds(path, payload):
                raise

    def _holds(self, path: str, data: Bytes) -> bool:
        found = self.read_tagged(path)
        return found is not None and found[0] == bytes(data)

    def _prove(self, path: str, data: Bytes) -> None:
        """Check once that the store honours conditional puts. Commits to one that ignores them are not safe."""
        if self._is_proved:
            return
        try:
            self._do(
                "write",
                path,
                f"checking whether {self.root} has conditional puts",
                lambda: self._client().put(self._key(path), _PROBE, mode="create", use_multipart=False),
            )
        except StorageError as error:
            if error.errno == errno.EEXIST:
                self._is_proved = True
                return
            raise
        self.replace(path, data)
        raise self._unconditional("overlooks")

    def _unconditional(self, what_it_does: str) -> ConfigError:
        return ConfigError(
            f"the store of {self.root} {what_it_does} the condition that an object is absent (If-None-Match), without "
            "which two runs could overwrite each other's checkpoints: use a store with conditional puts (see the table "
            "in docs/howto/object-stores.md)"
        )

    def _head(self, path: str) -> Any:
        """Request an object's metadata; None if it does not exist."""
        doing = f"reading the status of {self.describe(path)}"
        try:
            return self._do("stat", path, doing, lambda: self._client().head(self._key(path)))
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def _size(self, path: str) -> int | None:
        meta = self._head(path)
        return meta["size"] if meta is not None else None

    def _delete(self, path: str, keys: builtins.list[str]) -> None:
        def act() -> None:
            try:
                self._client().delete(keys)
            except FileNotFoundError:
                if len(keys) > 1:  # a store that deletes one by one has stopped at this error
                    for key in keys:
                        self._delete(path, [key])

        if keys:
            self._do("remove", path, f"removing {self.describe(path)}", act)

    def _missing(self, operation: str, path: str) -> StorageError:
        message = f"no such object: {self.describe(path)}"
        return StorageError(message, operation=operation, path=self.describe(path), errno=errno.ENOENT)

    def _exists(self, operation: str, path: str) -> StorageError:
        message = f"the object exists: {self.describe(path)}"
        return StorageError(message, operation=operation, path=self.describe(path), errno=errno.EEXIST)


class _CutShort(Exception):
    """The store sent fewer bytes than announced."""


class _Counted:
    """Counts the pieces sent to the store."""

    def __init__(self, pieces: Iterable[memoryview]):
        self._pieces = pieces
        self.nbytes = 0
        self.is_spent = False

    def __iter__(self) -> Any:
        for piece in self._pieces:
            self.nbytes += len(piece)
            yield piece
        self.is_spent = True


def _why_again(error: Exception) -> str | None:
    if isinstance(error, StorageError | ConfigError):
        return None
    if isinstance(error, _CutShort):
        return "the response was truncated"
    cause = cause_of(error)
    return cause.text if cause.passes else None


def _given(url: str) -> StoreUrl:
    """Parse the URL for a client given by the caller: its root is the bucket."""
    scheme, _, path = url.partition("://")
    return StoreUrl(scheme, "", path.strip("/"))


def _slashes(name: str) -> list[int]:
    return [index for index, letter in enumerate(name) if letter == "/"]


def _last(key: str) -> str:
    return key.rstrip("/").rpartition("/")[2]


def _entry(name: str, meta: Any) -> Entry:
    return Entry(name, False, meta["size"], meta["last_modified"].timestamp(), tag=_tag(meta))


def _tag(meta: Any) -> str:
    """Return a version's tag for ``put_if``: the entity tag for S3 and Azure, the generation for GCS."""
    known = {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
    return json.dumps(known, sort_keys=True) if known else ""


_pid: int | None = None


def _forbid_after_fork() -> None:
    """Raise in a forked child, where obstore would hang: its threads belong to the process that used it first."""
    global _pid
    if _pid is None:
        _pid = os.getpid()
    elif _pid != os.getpid():
        raise StorageError(
            "this process was forked from one that had used an object store, and lacks its threads: start it by spawn "
            "or forkserver",
            operation="connect",
            path="",
        )
