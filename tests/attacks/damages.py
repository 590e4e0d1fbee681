"""Damage to a checkpoint's files, as by a disk, a network, an interrupted copy or a person.

Each is a function of the folder; all are made from a seed. They keep away from what only an attacker does (a CRC-32
recomputed): those are in ``test_forged_checkpoints.py``.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME, SHARDS_NAME

SECTOR = 512


@dataclass(frozen=True)
class Damage:
    """``files`` are those that differ from what was written."""

    what: str
    files: tuple[str, ...]
    apply: Callable[[Path], None]


def damages(intact: Path, older: Path, seed: int, count: int) -> Iterator[Damage]:
    """Yield ``count`` damages to copies of ``intact``, each a real change; ``older`` is another similar save."""
    rng = random.Random(seed)
    small = [name for name in (MANIFEST_NAME, SHARDS_NAME, DIGESTS_NAME, METADATA_NAME) if (intact / name).exists()]
    data = sorted(path.name for path in intact.iterdir() if path.name not in small)
    made = 0
    while made < count:
        # Every second one in a data file, which have most of the bytes.
        name = rng.choice(data) if made % 2 else rng.choice([*small, *data])
        kind = rng.choice([*_CONTENTS, *_CONTENTS, *_FILES])
        if kind in _CONTENTS:
            before = (intact / name).read_bytes()
            after = _CONTENTS[kind](rng, before, (older / name).read_bytes())
            if after == before:
                continue
            yield Damage(f"{kind}: {name}", (name,), _writes(name, after))
        else:
            damage = _FILES[kind](intact, older, name, data, small)
            if damage is None:
                continue
            yield damage
        made += 1


def _writes(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        (step / name).write_bytes(content)

    return apply


# ---- what is in a file ----

Content = Callable[[random.Random, bytes, bytes], bytes]


def _flip(rng: random.Random, data: bytes, older: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes, older: bytes) -> bytes:
    return data[: rng.choice((0, len(data) // 2, len(data) - 1, rng.randrange(len(data))))]


def _grow(rng: random.Random, data: bytes, older: bytes) -> bytes:
    return data + rng.choice((b"\0", bytes(SECTOR), data[:100]))


def _sector(rng: random.Random, data: bytes) -> tuple[int, int]:
    nbytes = rng.choice((1, SECTOR, SECTOR, 8 * SECTOR))
    start = rng.randrange(0, len(data)) // nbytes * nbytes
    return start, min(len(data), start + nbytes)


def _zero(rng: random.Random, data: bytes, older: bytes) -> bytes:
    start, stop = _sector(rng, data)
    return data[:start] + bytes(stop - start) + data[stop:]


def _all_zero(rng: random.Random, data: bytes, older: bytes) -> bytes:
    """A file whose size was journaled and whose data was not."""
    return bytes(len(data))


def _garbage(rng: random.Random, data: bytes, older: bytes) -> bytes:
    start, stop = _sector(rng, data)
    return data[:start] + rng.randbytes(stop - start) + data[stop:]


def _misdirected(rng: random.Random, data: bytes, older: bytes) -> bytes:
    """A sector of the file that was written over another one."""
    start, stop = _sector(rng, data)
    at = rng.randrange(0, len(data) - (stop - start) + 1)
    return data[:at] + data[start:stop] + data[at + stop - start :]


def _stale(rng: random.Random, data: bytes, older: bytes) -> bytes:
    """A sector of the previous save, as after a lost write."""
    start, stop = _sector(rng, data)
    return data[:start] + older[start:stop].ljust(stop - start, b"\0") + data[stop:]


def _shifted(rng: random.Random, data: bytes, older: bytes) -> bytes:
    at = rng.randrange(len(data))
    return (data[:at] + b"\0" + data[at:])[: len(data)]


def _half_and_half(rng: random.Random, data: bytes, older: bytes) -> bytes:
    at = rng.randrange(1, len(data))
    return data[:at] + older[at:]


_CONTENTS: dict[str, Content] = {
    "flipped bits": _flip,
    "cut": _cut,
    "grown": _grow,
    "a zeroed sector": _zero,
    "all zeros": _all_zero,
    "garbage": _garbage,
    "a misdirected write": _misdirected,
    "a sector of the save before": _stale,
    "shifted by a byte": _shifted,
    "the end of the save before": _half_and_half,
}


# ---- which files are there ----

Files = Callable[[Path, Path, str, list[str], list[str]], Damage | None]


def _deleted(intact: Path, older: Path, name: str, data: list[str], small: list[str]) -> Damage:
    return Damage(f"deleted: {name}", (name,), lambda step: (step / name).unlink())


def _swapped(intact: Path, older: Path, name: str, data: list[str], small: list[str]) -> Damage | None:
    first, second = data[0], data[-1]
    if first == second or (intact / first).read_bytes() == (intact / second).read_bytes():
        return None

    def apply(step: Path) -> None:
        (step / first).rename(step / "aside")
        (step / second).rename(step / first)
        (step / "aside").rename(step / second)

    return Damage(f"swapped: {first} and {second}", (first, second), apply)


def _from_older(files: list[str], what: str, intact: Path, older: Path) -> Damage | None:
    files = [name for name in files if (intact / name).read_bytes() != (older / name).read_bytes()]
    if not files:
        return None

    def apply(step: Path) -> None:
        for name in files:
            shutil.copyfile(older / name, step / name)

    return Damage(f"{what} of the save before: {', '.join(files)}", tuple(files), apply)


def _linked(intact: Path, older: Path, name: str, data: list[str], small: list[str]) -> Damage:
    def apply(step: Path) -> None:
        (step / name).unlink()
        (step / name).symlink_to(intact / name)

    return Damage(f"a link in place of {name}", (name,), apply)


def _a_folder(intact: Path, older: Path, name: str, data: list[str], small: list[str]) -> Damage:
    def apply(step: Path) -> None:
        (step / name).unlink()
        (step / name).mkdir()

    return Damage(f"a folder in place of {name}", (name,), apply)


def _touched(intact: Path, older: Path, name: str, data: list[str], small: list[str]) -> Damage:
    """Same size and times: only the content differs."""
    stat = (intact / name).stat()
    content = bytearray((intact / name).read_bytes())
    content[len(content) // 3] ^= 0x10

    def apply(step: Path) -> None:
        (step / name).write_bytes(content)
        os.utime(step / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return Damage(f"changed, with its times put back: {name}", (name,), apply)


_FILES: dict[str, Files] = {
    "deleted": _deleted,
    "swapped": _swapped,
    "linked": _linked,
    "a folder": _a_folder,
    "touched": _touched,
    "one file": lambda intact, older, name, data, small: _from_older([name], "one file", intact, older),
    "all data": lambda intact, older, name, data, small: _from_older(data, "all data", intact, older),
    "all but data": lambda intact, older, name, data, small: _from_older(small, "all but the data", intact, older),
    "everything": lambda intact, older, name, data, small: _from_older([*data, *small], "everything", intact, older),
}


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two states have the same keys and values."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )
