"""Reading files that may be links: in the Hugging Face hub's cache every file links into the cache's ``blobs``."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from milepost.errors import StorageError
from milepost.storage.base import ReadHandle, Storage, format_nbytes
from milepost.storage.local import LocalStorage


def open_linked(storage: Storage, path: str, limit_nbytes: int | None = None, *, anywhere: bool = False) -> ReadHandle:
    """Open a regular file of at most ``limit_nbytes`` for reading, following an allowed link.

    A link is followed to another file of its folder, and to the blobs of its hub cache; ``anywhere`` follows all links,
    for files that are only read and whose content is validated.

    Raises:
        StorageError: there is no such file, it is not a regular file or larger, or the link leads elsewhere.
    """
    handle = _open(storage, path, anywhere=anywhere)
    if limit_nbytes is not None and handle.nbytes > limit_nbytes:
        handle.close()
        raise StorageError(
            f"{handle.path} has {format_nbytes(handle.nbytes)}: more than the limit of {format_nbytes(limit_nbytes)} "
            f"for such a file",
            operation="open",
            path=handle.path,
            errno=errno.EFBIG,
        )
    return handle


def read_linked(storage: Storage, path: str, limit_nbytes: int) -> bytes:
    """Read a file opened by :func:`open_linked`."""
    with open_linked(storage, path, limit_nbytes) as handle:
        data = bytearray(handle.nbytes)
        handle.read_into(0, [memoryview(data)])
    return bytes(data)


def _open(storage: Storage, path: str, *, anywhere: bool) -> ReadHandle:
    full = Path(storage.root, path)
    if not isinstance(storage, LocalStorage) or not full.is_symlink():
        return storage.open_read(path)
    real = Path(os.path.realpath(full))
    if not anywhere and not any(real.is_relative_to(home) for home in _homes(full.parent)):
        raise _refusal(full, f"points outside its folder (to {real}) and is not followed; put the file itself there")
    if not real.exists():
        raise _refusal(full, f"points to a missing file ({real})")
    return LocalStorage(real.parent).open_read(real.name)


def _refusal(link: Path, reason: str) -> StorageError:
    return StorageError(f"{link} is a link that {reason}", operation="open", path=str(link), errno=errno.ELOOP)


def _homes(folder: Path) -> list[str]:
    """Return the allowed targets of a folder's links: itself, and the ``blobs`` beside ``snapshots/<revision>``."""
    homes = [os.path.realpath(folder)]
    if folder.parent.name == "snapshots":
        homes.append(os.path.realpath(folder.parent.parent / "blobs"))
    return homes
