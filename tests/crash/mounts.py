"""File systems for one test, mounted in a private namespace."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small(kind: str, folder: Path) -> Iterator[Path]:
    """A file system of a few MiB in a private mount namespace; skips the test if mounting is not permitted."""
    folder.mkdir()
    commands = f"mount -t tmpfs -o size=12m none {folder}"
    if kind == "ext4":
        image = folder.with_suffix(".image")
        image.write_bytes(b"")
        os.truncate(image, 16 << 20)
        commands = f"mkfs.ext4 -q -O ^has_journal -m 0 {image} && mount -o loop {image} {folder}"
    holder = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"{commands} && echo mounted && read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    said = holder.stdout.readline()
    try:
        if said != "mounted\n":
            pytest.skip(f"nothing can be mounted here: {said}")
        yield Path(f"/proc/{holder.pid}/root{folder}")
    finally:
        holder.stdin.close()
        holder.wait(30)


def remount(folder: Path, mode: str) -> None:
    """Make what :func:`small` gave read-only (``ro``) or writable (``rw``)."""
    _, proc, pid, _, *names = folder.parts
    inside = ["nsenter", f"--mount=/{proc}/{pid}/ns/mnt", "mount", "-o", f"remount,{mode}", "/" + "/".join(names)]
    # Not by `subprocess`: in a pair of ranks that makes writer processes.
    _, status = os.waitpid(os.posix_spawnp("nsenter", inside, os.environ), 0)
    assert status == 0, f"the file system could not be made {mode}"
