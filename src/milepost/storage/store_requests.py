"""``StoreRequests``: requests for objects below one URL, through obstore, with retries and errors that name them."""

from __future__ import annotations

import datetime
import errno
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from milepost.errors import ConfigError, StorageError
from milepost.storage.base import Bytes, check_name, format_nbytes, join
from milepost.storage.retry import Retry
from milepost.storage.store_errors import cause_of
from milepost.storage.store_urls import StoreUrl, connect, parse_store_url

T = TypeVar("T")

NUM_STREAMS = 8
"""Number of requests for one object, or of objects of one call, sent concurrently."""
REQUEST_TIMEOUT_S = 300.0
"""A request without an answer by then is retried: a part of 16 MiB needs 55 KB/s."""
CONNECT_TIMEOUT_S = 10.0
AHEAD_NBYTES = 128 << 20
"""Limit on bytes fetched ahead, over all open objects of a storage."""

_PROBE = b"a store that takes this has no conditional put"


class Aborted(Exception):
    """Raised inside an abandoned upload, so that obstore aborts it."""


class Budget:
    """Limit on bytes fetched ahead of the reads, shared by all objects of one store."""

    def __init__(self, nbytes: int):
        self._left = nbytes
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Reserve ``nbytes`` if available, until the caller returns them; returns whether they were."""
        with self._lock:
            fits = nbytes <= self._left
            self._left -= nbytes if fits else 0
        return fits

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self._left += nbytes


class StoreRequests:
    """Requests for objects below ``url``, named relative to it. None is made before the first operation.

    Every method retries transient failures and raises StorageError for the others.
    """

    def __init__(self, url: str, *, store: Any, retry: Retry | None, timeout_s: float):
        """See ``ObjectStorage``."""
        if store is None and importlib.util.find_spec("obstore") is None:
            raise ConfigError(f"{url.partition('://')[0]}:// needs obstore: pip install 'milepost[cloud]'")
        self.url = parse_store_url(url) if store is None else _given(url)
        self.root = str(self.url)
        self.ahead = Budget(AHEAD_NBYTES)
        self._retry = retry if retry is not None else Retry()
        self._timeout_s = timeout_s
        self._clients: dict[bool, Any] = {} if store is None else {True: store, False: store}
        self._pool: ThreadPoolExecutor | None = None
        self._is_proved = False
        self._lock = threading.Lock()

    def describe(self, name: str) -> str:
        """Name an object for people."""
        return join(self.root, name)

    def key(self, name: str) -> str:
        """Return the key of a name: below the bucket, not below the root."""
        return join(self.url.path, check_name(self.root, name)) if name else self.url.path

    def pool(self) -> ThreadPoolExecutor:
        """Threads for concurrent requests."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="milepost-store")
            return self._pool

    # ---- look and read ----

    def list_level(self, folder: str) -> tuple[list[Any], list[str]]:
        """Return the metadata of the objects of a folder, and the keys of the folders in it."""
        doing = f"listing {self.describe(folder)}"
        found = self.send("list", folder, doing, lambda: self._client().list_with_delimiter(self.key(folder)))
        return found["objects"], found["common_prefixes"]

    def list_below(self, folder: str) -> list[Any]:
        """Return the metadata of all objects below a folder."""
        doing = f"listing {self.describe(folder)}"
        return self.send("list", folder, doing, lambda: self._client().list(self.key(folder) or None).collect())

    def has_any(self, folder: str) -> bool:
        """Return whether an object is below a folder. A listed name is not enough: some stores list empty folders."""

        def act() -> bool:
            return any(self._client().list(self.key(folder) or None, chunk_size=1))

        return self.send("stat", folder, f"reading the status of {self.describe(folder)}", act)

    def head(self, name: str) -> Any:
        """Request an object's metadata; None if it does not exist."""
        doing = f"reading the status of {self.describe(name)}"
        try:
            return self.send("stat", name, doing, lambda: self._client().head(self.key(name)))
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def nbytes_of(self, name: str) -> int | None:
        """Request an object's size; None if it does not exist."""
        meta = self.head(name)
        return meta["size"] if meta is not None else None

    def get(self, name: str, limit: int) -> tuple[bytes, str] | None:
        """Read an object of at most ``limit`` bytes, and the tag of its version; None if it does not exist."""

        def act() -> tuple[bytes, str]:
            result = self._client().get(self.key(name))
            nbytes = result.meta["size"]
            if nbytes > limit:
                raise StorageError(
                    f"{self.describe(name)} has {format_nbytes(nbytes)}; expected at most {format_nbytes(limit)}",
                    operation="read",
                    path=self.describe(name),
                    errno=errno.EFBIG,
                )
            data = bytes(result.bytes())
            if len(data) != nbytes:
                raise _CutShort
            return data, version_of(result.meta)

        try:
            return self.send("read", name, f"reading {self.describe(name)}", act)
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def get_range(self, name: str, start: int, stop: int, tag: str | None) -> Any:
        """Read the bytes ``[start, stop)`` of version ``tag`` of an object; the result supports the buffer protocol."""
        options: dict[str, Any] = {"range": (start, stop)}
        if tag is not None:
            options["if_match"] = tag
        nbytes = stop - start

        def act() -> Any:
            data = self._client().get(self.key(name), options=options).bytes()
            if len(data) != nbytes:
                raise _CutShort
            return data

        return self.send(
            "read", name, f"reading {format_nbytes(nbytes)} at offset {start} of {self.describe(name)}", act
        )

    # ---- write ----

    def create(self, name: str, data: Bytes) -> None:
        """Put an object that must not exist, in one request."""
        try:
            self.put("create", name, data, f"writing {self.describe(name)}")
        except StorageError as error:
            if error.errno == errno.ENOTSUP:
                raise self._unconditional("refuses") from error
            raise
        self._prove(name, data)

    def put(self, mode: Any, name: str, data: Bytes, doing: str) -> None:
        """Put an object in one request. ``mode`` is obstore's: ``create``, ``overwrite``, or the version to replace."""
        key = self.key(name)
        payload = memoryview(data).cast("B") if memoryview(data).nbytes else b""
        try:
            self.send("write", name, doing, lambda: self._client().put(key, payload, mode=mode, use_multipart=False))
        except StorageError as error:
            # An earlier delivery of this request may have succeeded: then the object is ours. Objects that must belong
            # to one process name it in their bytes.
            if error.errno != errno.EEXIST or not self._holds(name, payload):
                raise

    def _holds(self, name: str, data: Bytes) -> bool:
        found = self.get(name, 1 << 30)
        return found is not None and found[0] == bytes(data)

    def put_parts(self, name: str, pieces: Iterable[memoryview], part_nbytes: int) -> None:
        """Put an object in parts, cut from ``pieces``. obstore retries parts, not the upload."""
        sent = _Counted(pieces)
        key = self.key(name)
        try:
            self._client(is_upload=True).put(
                key, iter(sent), use_multipart=True, chunk_size=part_nbytes, max_concurrency=NUM_STREAMS
            )
        except Aborted:
            return
        except StorageError:  # from the pieces
            raise
        except Exception as error:
            cause = cause_of(error)
            # The last answer may have been lost although the upload was completed. No one else writes under this name.
            if not sent.is_spent or self.nbytes_of(name) != sent.nbytes:
                raise cause.error("write", self.describe(name), f"writing {self.describe(name)}") from error
        found = self.nbytes_of(name)
        if found != sent.nbytes:
            raise StorageError(
                f"{self.describe(name)} has {format_nbytes(found or 0)} after {format_nbytes(sent.nbytes)} were sent; "
                "do not trust this store",
                operation="write",
                path=self.describe(name),
                errno=errno.EIO,
            )

    def copy(self, src: str, dst: str) -> None:
        """Copy an object within the store."""
        doing = f"copying {self.describe(src)} to {self.describe(dst)} within the store"
        self.send("share", dst, doing, lambda: self._client().copy(self.key(src), self.key(dst)))

    def delete(self, path: str, keys: list[str]) -> None:
        """Delete objects by key; no error if some are absent. ``path`` names them in messages."""

        def act() -> None:
            try:
                self._client().delete(keys)
            except FileNotFoundError:
                if len(keys) > 1:  # a store that deletes one by one has stopped at this error
                    for key in keys:
                        self.delete(path, [key])

        if keys:
            self.send("remove", path, f"removing {self.describe(path)}", act)

    def _prove(self, name: str, data: Bytes) -> None:
        """Check once that the store honours conditional puts. Commits to one that ignores them are not safe."""
        if self._is_proved:
            return
        try:
            self.send(
                "write",
                name,
                f"checking whether {self.root} has conditional puts",
                lambda: self._client().put(self.key(name), _PROBE, mode="create", use_multipart=False),
            )
        except StorageError as error:
            if error.errno == errno.EEXIST:
                self._is_proved = True
                return
            raise
        self.put("overwrite", name, data, f"replacing {self.describe(name)}")
        raise self._unconditional("overlooks")

    def _unconditional(self, what_it_does: str) -> ConfigError:
        return ConfigError(
            f"the store of {self.root} {what_it_does} the condition that an object is absent (If-None-Match), without "
            "which two runs could overwrite each other's checkpoints: use a store with conditional puts (see the table "
            "in docs/howto/object-stores.md)"
        )

    # ---- one request ----

    def send(self, operation: str, name: str, doing: str, act: Callable[[], T]) -> T:
        """Make a request, with retries of transient failures. ``doing`` describes it in messages."""
        try:
            return self._retry.call(doing, act, _why_again)
        except (StorageError, ConfigError):
            raise
        except _CutShort as error:
            raise StorageError(
                f"the answer was truncated while {doing}",
                operation=operation,
                path=self.describe(name),
                errno=errno.ECONNRESET,
            ) from error
        except Exception as error:
            raise cause_of(error).error(operation, self.describe(name), doing) from error

    def _client(self, *, is_upload: bool = False) -> Any:
        _forbid_after_fork()
        with self._lock:
            if is_upload not in self._clients:
                self._clients[is_upload] = connect(
                    self.url,
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


def version_of(meta: Any) -> str:
    """Return a version's tag for ``put_if``: the entity tag for S3 and Azure, the generation for GCS."""
    known = {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
    return json.dumps(known, sort_keys=True) if known else ""


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
