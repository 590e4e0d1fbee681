"""Find stored keys that no rank has, from one bit per key and rank."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from milepost.collective.comm import Comm


@dataclass(frozen=True, slots=True)
class _Brought:
    """One rank's unwanted keys: as ``bits`` over the keys that all ranks know, and as ``keys``."""

    bits: bytes
    keys: frozenset[str]
    fits_something: bool
    node: int


def unwanted_everywhere(
    comm: Comm,
    unwanted: Collection[str],
    *,
    stored: Collection[str],
    known: Collection[str],
    fits_something: bool,
    node: int,
) -> tuple[list[str], bool]:
    """Find the keys that all ranks of a ``node`` find ``unwanted``, sorted; and if any rank ``fits_something``.

    They are ``stored`` keys, or parts of composed tensors. Collective. ``known`` are the same keys on every rank, or
    none. If they are its stored keys, a rank sends one bit per key, which compresses to some hundred bytes; the keys
    themselves would be megabytes per rank. Ranks with other stored keys (per-node folders, names of another program)
    send keys.
    """
    keys = sorted(known)
    is_alike = bool(keys) and set(stored) == set(known)
    brought = comm.gather(
        _Brought(
            bits=_packed([key in unwanted for key in keys]) if is_alike else b"",
            keys=frozenset(unwanted).difference(keys) if is_alike else frozenset(unwanted),
            fits_something=fits_something,
            node=node,
        )
    )
    found = None
    if brought is not None:
        by_node: dict[int, list[_Brought]] = {}
        for one in brought:
            by_node.setdefault(one.node, []).append(one)
        nowhere = set[str]().union(*(_common(keys, ranks) for ranks in by_node.values()))
        found = sorted(nowhere), any(one.fits_something for one in brought)
    found = comm.broadcast(found)
    assert found is not None
    return found


def _packed(flags: Sequence[bool]) -> bytes:
    return zlib.compress(np.packbits(np.array(flags, np.bool_)).tobytes())


def _common(keys: Sequence[str], brought: Sequence[_Brought]) -> set[str]:
    """The keys that are unwanted on all of these ranks."""
    sets = [set(one.keys) for one in brought if not one.bits]
    alike = [one for one in brought if one.bits]
    if alike:
        distinct = {one.bits for one in alike}
        all_bits = np.bitwise_and.reduce([np.frombuffer(zlib.decompress(bits), np.uint8) for bits in distinct])
        flags = np.unpackbits(all_bits, count=len(keys))
        beside = set(alike[0].keys).intersection(*(one.keys for one in alike[1:]))
        sets.append({*beside, *(keys[place] for place in np.flatnonzero(flags).tolist())})
    return set.intersection(*sets)
