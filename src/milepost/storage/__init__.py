"""Storage of checkpoints: the only part of Milepost that talks to the operating system or to a network.

In reading order::

base            the interface: ``Storage``, its handles and capabilities
syscalls        the Linux calls that Python lacks
write_back      early and bounded write-back of pages
system_errors   the operating system's errors, with advice
local_files     open files of a POSIX file system
local_tree      its files and folders by name
mounts          folders that a rename cannot replace
local           a folder of it
open_files      many files, a bounded number of them open at a time
links           files behind links, as in the Hugging Face hub's cache
ranges          plans of requests for many byte ranges
retry           bounded retries
store_errors    classification of a store's errors
store_urls      from a URL and the environment to a client
unfinished      aborting abandoned uploads
store_requests  the requests to a store, with retries
object_writer   bytes to an object
object_reader   bytes from an object
objectstore     a prefix of a bucket
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from urllib.parse import quote, unquote

from milepost.errors import ConfigError
from milepost.storage.base import PageCache, Storage, split
from milepost.storage.local import LocalStorage

__all__ = [
    "LocalStorage",
    "Storage",
    "expanded",
    "is_folder",
    "is_known",
    "is_url",
    "join_path",
    "open_root",
    "open_storage",
]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_STORES = ("s3", "gs", "az")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
"""As ``os.path.expandvars`` finds them."""
_ONE_SLASH = re.compile(r"(s3|gs|az|file):(?!//)", re.IGNORECASE)
_MEANT = {"gcs": "gs", "s3a": "s3", "s3n": "s3", "azure": "az", "abfs": "az", "abfss": "az", "wasbs": "az"}
_KNOWN = "a path, file://, s3://, gs:// or az://"


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is the URL of an object store."""
    found = _SCHEME.match(os.fspath(path))
    return found is not None and found[1].lower() in _STORES


def is_known(path: str | os.PathLike[str]) -> bool:
    """Return whether ``open_storage`` supports ``path``."""
    found = _SCHEME.match(os.fspath(path))
    return found is None or found[1].lower() in ("file", *_STORES)


def join_path(folder: str | os.PathLike[str], name: str | os.PathLike[str]) -> str:
    """Join ``folder`` and ``name``, each a path or a URL; returns ``name`` if it is absolute or a URL itself."""
    text, last = os.fspath(folder), os.fspath(name)
    if _SCHEME.match(last) or os.path.isabs(last):
        return last
    if (scheme := _SCHEME.match(text)) is not None:
        return f"{text.rstrip('/')}/{quote(last) if scheme[1].lower() == 'file' else last}"
    return os.path.join(text, last)


def expanded(path: str | os.PathLike[str]) -> str:
    """Expand ``~`` and ``$VARIABLE`` in a path or URL. What exists under its literal name is left as is.

    Raises:
        ConfigError: a variable is not set, or there is no such user: the text would become a folder's name.
    """
    text = os.fspath(path)
    has_scheme = _SCHEME.match(text) is not None
    for found in _VARIABLE.finditer(text):
        name = found[1] or found[2]
        if name in os.environ or (not has_scheme and _is_literal(text, found.end())):
            continue
        where = "the URL" if has_scheme else text  # a URL may hold a secret
        raise ConfigError(f"the variable {name} in {where} is not set in the environment: set it, or write it out")
    full = os.path.expanduser(os.path.expandvars(text))
    if full.startswith("~") and not has_scheme and not _is_literal(full, 1):
        raise ConfigError(f"{text}: there is no user {full[1:].partition('/')[0]} here; of a path named so, ./{text}")
    return full


def _is_literal(text: str, end: int) -> bool:
    """Return whether the path exists up to the part with character ``end``, so that its name is meant as it is."""
    rest = text[end:].partition("/")[0]
    return os.path.lexists(os.path.expanduser(os.path.expandvars(text[:end] + rest)))


def open_storage(path: str | os.PathLike[str]) -> tuple[Storage, str]:
    """Open the storage of ``path`` (a path or a URL, ``file://`` percent-encoded); returns it and the name in it.

    ``~`` and ``$VARIABLE`` are expanded, see :func:`expanded`.

    The storage is rooted at the parent, so that siblings of ``path`` are accessible: a commit renames there. A link at
    ``path`` is followed. For the URL of a bucket, which is the root itself, the name is empty.

    Raises:
        ConfigError: it is no path, or empty, names a variable that is not set, its scheme is unknown, or obstore is not
            installed.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"expected the path of a checkpoint, found a {type(path).__name__}")
    text = expanded(path)
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme[1].lower() in _STORES:
        return _open_store(text)
    if scheme is not None:
        if scheme[1].lower() != "file":
            meant = _MEANT.get(scheme[1].lower())
            hint = f"; did you mean {meant}://?" if meant else ""
            raise ConfigError(f"unknown scheme {scheme[1]}://: expected {_KNOWN}{hint}")
        text = _file_path(text)
    elif (found := _ONE_SLASH.match(text)) is not None and not os.path.lexists(text):
        raise ConfigError(f"{text} is not a URL: write {found[1].lower()}://; of a path named so, ./{text}")
    if not text:
        raise ConfigError("the path of a checkpoint must not be empty")
    full = os.path.abspath(text)
    if os.path.islink(full):
        full = os.path.realpath(full)
    return LocalStorage(os.path.dirname(full)), os.path.basename(full)


def _file_path(url: str) -> str:
    """Return the path of a ``file://`` URL."""
    host, slash, path = unquote(url.partition("://")[2]).partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError(f"{url} names a host, not a path: a file:// URL has three slashes, file:///absolute/path")
    return f"/{path}"


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a folder at ``path``, a path or a URL."""
    storage, name = open_storage(path)
    found = storage.stat(name)
    return found is not None and found.is_folder


def open_root(root: str, *, page_cache: PageCache = "auto") -> Storage:
    """Open the storage with this ``root``, in another process, to which the object can't be passed."""
    if not is_url(root):
        return LocalStorage(root, page_cache=page_cache)
    from milepost.storage.objectstore import ObjectStorage

    return ObjectStorage(root)


def _open_store(text: str) -> tuple[Storage, str]:
    from milepost.storage.store_urls import parse_store_url

    url = parse_store_url(text)
    folder, name = split(url.path)
    return open_root(str(replace(url, path=folder))), name
