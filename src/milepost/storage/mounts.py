"""Folders that can't be replaced by a rename: mount points, and this process's working directory."""

from __future__ import annotations

import os
import re

_OCTAL = re.compile(r"\\([0-7]{3})")


def why_fixed(full: str) -> str:
    """Return the reason why the folder ``full`` can't be replaced by a rename; empty if it can."""
    real = os.path.realpath(full)
    if os.path.ismount(real) or real in _mount_points():
        return "is a mount point, so no other folder can take its place"
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:
        return ""
    if here == real or here.startswith(f"{real}/"):
        return "is the working directory, which would disappear once another folder took its place"
    return ""


def _mount_points() -> set[str]:
    """Return the mount points of this process's mount namespace, including bind mounts of one file system."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            return {_OCTAL.sub(lambda match: chr(int(match[1], 8)), line.split()[4]) for line in lines}
    except (OSError, IndexError):
        return set()
