"""The owner of a save attempt: a process, and whether it is alive.

A record names the host, its boot, the pid namespace, the process and its start time, so that neither a reused pid nor
a container with the same host name is taken for the owner. For an owner on another machine only age decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from milepost.errors import FormatError
from milepost.format.typed_json import parse_json, typed
from milepost.storage.base import Storage, join

FOREIGN_LIFETIME_S = 24 * 3600.0
"""An attempt from another machine is assumed dead after this time: no save takes a day."""

OWNER_PREFIX = "owner-"
OWNERLESS_LIFETIME_S = 3600.0
"""An attempt without an owner's record is just being created, or its creation was interrupted."""

MAX_OWNER_NBYTES = 1 << 16
_MAX_TIME_S = 1e11
"""The year 5138: formatting much later times fails."""
_Text = Annotated[str, msgspec.Meta(max_length=1000)]


@dataclass(frozen=True, slots=True)
class Owner:
    """The identity of a process, for later comparison. Fields that the system does not provide are empty."""

    host: _Text
    machine_id: _Text
    boot_id: _Text
    pid_namespace: _Text
    pid: int
    started: _Text
    """Start of the process in clock ticks since the boot, as in ``/proc/<pid>/stat``."""
    created_s: Annotated[float, msgspec.Meta(ge=0, le=_MAX_TIME_S)]
    """Time of this record, in seconds since the epoch."""

    def dump(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process(now: float) -> Owner:
    """The record of the calling process. ``now`` is in seconds since the epoch."""
    pid = os.getpid()
    return Owner(
        host=socket.gethostname(),
        machine_id=_read("/etc/machine-id"),
        boot_id=_read("/proc/sys/kernel/random/boot_id"),
        pid_namespace=_pid_namespace(),
        pid=pid,
        started=_started(pid) or "",
        created_s=now,
    )


def parse_owner(data: bytes, path: str) -> Owner:
    """Read what ``Owner.dump`` wrote. Raises FormatError if it is torn or something else."""
    return typed(parse_json(data, path, "a process's record"), Owner, path)


def owners_of(storage: Storage, attempt: str) -> list[Owner]:
    """The processes that have declared that they work on an attempt."""
    owners = []
    for entry in storage.list(attempt):
        if entry.name.startswith(OWNER_PREFIX):
            with contextlib.suppress(FormatError):  # torn by a crash
                owners.append(parse_owner(storage.read(join(attempt, entry.name), MAX_OWNER_NBYTES), entry.name))
    return owners


def is_here(owner: Owner) -> bool:
    """Return whether both are on one machine and in one container, so that the system knows if it is alive."""
    here = this_process(0.0)
    if (owner.host, owner.machine_id) != (here.host, here.machine_id):
        return False
    return owner.boot_id != here.boot_id or owner.pid_namespace == here.pid_namespace


def is_alive(owner: Owner, now: float) -> bool:
    """Return whether the process may still be at work. True when in doubt, for a day."""
    if is_here(owner):
        return owner.boot_id == this_process(now).boot_id and _started(owner.pid) in (owner.started, None)
    return now - owner.created_s < FOREIGN_LIFETIME_S


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Start time of a process; empty if it does not exist or is a zombie.

    None if it can't be determined, for instance without a free file descriptor.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command name before it may contain any characters
    if len(fields) < 20 or fields[0] in "ZXx":
        return ""
    return fields[19]
