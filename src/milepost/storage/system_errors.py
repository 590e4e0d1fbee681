"""The operating system's errors as ``StorageError``: cause, operation, place and advice."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from milepost.errors import StorageError

_ADVICE = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some of the quota, or write elsewhere",
    errno.EACCES: "check the owner and the mode of the folder",
    errno.EPERM: "check the owner and the mode of the folder",
    errno.EROFS: "mount it writable, or write elsewhere",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the device is failing: see the kernel's log, and do not trust this disk",
    errno.ESTALE: "the file server has lost the file; mount it again",
}
_NETWORK_ADVICE = "the network file system or its server failed: see their logs, and try again when it answers"
_NETWORK_TYPES = ("nfs", "cifs", "smb", "ceph", "lustre", "gluster", "beegfs", "gpfs", "9p", "afs", "fuse", "virtiofs")
"""Prefixes of the names of network file systems."""


def storage_error(error: OSError, operation: str, path: str, doing: str) -> StorageError:
    """Build the StorageError for a system error: cause, operation, place and advice."""
    cause = (error.strerror or "unknown error").lower()
    advice = _ADVICE.get(error.errno or 0)
    if error.errno == errno.EIO and is_on_network(path):
        advice = _NETWORK_ADVICE
    message = f"{cause} while {doing}" + (f"; {advice}" if advice else "")
    return StorageError(message, operation=operation, path=path, errno=error.errno)


def is_on_network(path: str) -> bool:
    """Return True if ``path`` is on a network file system. The path itself is not accessed."""
    import psutil  # imported here: 20 ms that only a failure costs

    full = os.path.abspath(path)
    mounts = [
        (len(part.mountpoint), part.fstype)
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath((full, part.mountpoint)) == part.mountpoint
    ]
    return max(mounts, default=(0, ""))[1].startswith(_NETWORK_TYPES)


@contextlib.contextmanager
def explained(operation: str, path: str, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, operation, path, doing) from error
