"""Comparison of replicas: values that several ranks hold under one key must be equal, since they are stored once.

Values are compared at every save, by a digest of their encoded bytes, and so are the tensors of a training loop, which
may be equal at first (counters, masks of seen samples). Tensors of models and optimizers are compared by a sample of
their elements when the structure of the state is new, and completely on request. Ranks with the same keys form a group,
for which each sends one digest; the differing keys are requested only if digests differ.
"""

from __future__ import annotations

import hashlib
import socket
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from milepost.config import part_of
from milepost.errors import SaveError, listed
from milepost.format.box import Box
from milepost.tensors.layout import TensorLeaf
from milepost.tensors.sharing import Group, own_to_each

Depth = Literal["values", "sample", "whole"]
"""Scope of a comparison: only values; also samples of tensors; also all bytes of tensors."""

SAMPLE_NUMEL = 256
"""Number of sampled elements per tensor, evenly spaced."""
MAX_WHOLE_NBYTES = 64 << 20
"""Maximum size of a tensor on the CPU of which all elements are compared at every save; larger ones are sampled."""
MAX_WHOLE_FLOATS_NBYTES = 4 << 20
"""The same for floating-point tensors, which may be averages of all weights, and for tensors on a device."""
MAX_RANKS_NAMED = 8
_JOINED_NBYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class Digests:
    """One rank's digests of the keys of one group: of its tensors' boxes, then of its values, in the group's order."""

    tensors: tuple[bytes, ...]
    objects: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """A key under which ranks hold different data: ``camps`` are groups of ranks that agree with each other."""

    key: str
    is_tensor: bool
    camps: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """One digest of a rank's state in a group of ``num_ranks``."""

    num_ranks: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Brought:
    """A rank's share of the groups in which ranks differ, by the groups' digests."""

    held: Mapping[bytes, Digests]
    groups: Mapping[bytes, Group]
    """The groups of which it is the lowest rank."""
    roots: Mapping[str, str]
    """The top-level name of each key."""
    shards: Mapping[str, str]
    """Key of the DTensor, for parts that are in each of its shards."""
    buffers: frozenset[str]
    host: str


def digests_of(
    group: Group,
    tensors: Mapping[str, TensorLeaf],
    objects: Mapping[str, bytes],
    depth: Depth,
    *,
    always: Collection[str],
) -> Digests:
    """Return this rank's digests of the state shared with the others of a group.

    Replicas of a tensor are compared by ``depth``; those of ``always`` at every save. So are parts with a copy in every
    shard: they may belong to the shard (a scale), and be equal only by chance.
    """
    chosen = [(key, box) for key, box in group.tensors if depth != "values" or key in always or tensors[key].shard_of]
    whole = {key for key, _ in chosen if depth == "whole" or (key in always and _is_compared_whole(tensors[key]))}
    digests = dict(zip(chosen, _tensor_digests(chosen, tensors, whole), strict=True))
    return Digests(
        tuple(digests.get(held, b"") for held in group.tensors),
        tuple(_digest(objects[key]) for key in group.objects),
    )


def _is_compared_whole(leaf: TensorLeaf) -> bool:
    is_large = leaf.local.is_floating_point() or leaf.local.is_complex() or leaf.local.device.type != "cpu"
    return leaf.local.nbytes <= (MAX_WHOLE_FLOATS_NBYTES if is_large else MAX_WHOLE_NBYTES)


def summary_of(held: Digests) -> bytes:
    """Combine a group's digests into one."""
    return _digest(b"".join((*held.tensors, b"|", *held.objects)))


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _tensor_digests(
    held: Sequence[tuple[str, Box]], tensors: Mapping[str, TensorLeaf], whole: Collection[str]
) -> list[bytes]:
    parts = [_elements(tensors[key], box, whole=key in whole) for key, box in held]
    small = [n for n, part in enumerate(parts) if part.numel() <= _JOINED_NBYTES]
    for n, part in zip(small, _moved_together([parts[n] for n in small]), strict=True):  # one copy per device
        parts[n] = part
    return [_digest(part.cpu().numpy().data) for part in parts]


def _elements(leaf: TensorLeaf, box: Box, *, whole: bool) -> torch.Tensor:
    """Return some or all elements of a piece as a flat tensor of bytes, in an order that depends only on the shape."""
    view = leaf.view([piece.box for piece in leaf.pieces].index(box)).detach()
    if not whole and view.numel() > SAMPLE_NUMEL:
        at = torch.linspace(0, view.numel() - 1, SAMPLE_NUMEL, dtype=torch.float64, device=view.device).long()
        if view.element_size() == 1:  # `take` does not support 8-bit floats
            view = view.view(torch.uint8)
        view = torch.take(view, at)
    return view.contiguous().view(-1).view(torch.uint8)


def _moved_together(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        by_device[part.device].append(index)
    moved: dict[int, torch.Tensor] = {}
    for indices in by_device.values():
        joined = torch.cat([parts[index] for index in indices]).cpu()
        moved |= zip(indices, joined.split([parts[index].numel() for index in indices]), strict=True)
    return [moved[index] for index in range(len(parts))]


def unlike_groups(brought: Sequence[Mapping[bytes, Summary]]) -> list[bytes]:
    """Return the groups whose ranks sent different summaries. ``brought`` is by rank and group digest.

    Raises:
        SaveError: not all ranks of a group sent one: they planned from different descriptions.
    """
    found: dict[bytes, list[Summary]] = defaultdict(list)
    for mine in brought:
        for group, summary in mine.items():
            found[group].append(summary)
    if any(len(summaries) != summaries[0].num_ranks for summaries in found.values()):
        raise SaveError("ranks disagree on what they have in common, nothing was saved (a bug in Milepost)")
    return [group for group, summaries in found.items() if len({one.digest for one in summaries}) > 1]


def keys_that_differ(brought: Sequence[Brought]) -> list[Difference]:
    """Return the differing keys in the ranks' contributions. ``brought`` is by rank."""
    found: dict[str, Difference] = {}
    for digest, group in ((digest, group) for one in brought for digest, group in one.groups.items()):
        held = [brought[rank].held[digest] for rank in group.ranks]
        columns = [(key, True, [h.tensors[n] for h in held]) for n, (key, _) in enumerate(group.tensors)]
        columns += [(key, False, [h.objects[n] for h in held]) for n, key in enumerate(group.objects)]
        for key, is_tensor, digests in columns:
            camps: dict[bytes, list[int]] = defaultdict(list)
            for rank, held_digest in zip(group.ranks, digests, strict=True):
                camps[held_digest].append(rank)
            if len(camps) > 1:
                found.setdefault(key, Difference(key, is_tensor, tuple(map(tuple, camps.values()))))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Ruling:
    """The decision on differences: stored per rank, allowed, or refused."""

    per_rank: frozenset[str] = frozenset()
    """Top-level names whose values must be stored per rank."""
    buffers: tuple[str, ...] = ()
    """Keys of buffers that differ, of which the lowest rank's are stored."""
    error: SaveError | None = None


def judge(
    found: Sequence[Difference],
    *,
    per_rank: Collection[str],
    roots: Mapping[str, str],
    buffers: Collection[str],
    hosts: Sequence[str],
) -> Ruling:
    """Decide on differences. ``roots`` maps keys to top-level names, ``hosts`` ranks to hosts."""
    own = frozenset(roots[d.key] for d in found if roots.get(d.key) in per_rank)
    let_pass = tuple(d.key for d in found if d.is_tensor and d.key in buffers)
    refused = [d for d in found if roots.get(d.key) not in own and d.key not in let_pass]
    return Ruling(own, let_pass, _refusal(refused, hosts) if refused else None)


def _refusal(found: Sequence[Difference], hosts: Sequence[str]) -> SaveError:
    several_hosts = len(set(hosts)) > 1

    def named(ranks: tuple[int, ...]) -> str:
        shown = [f"{rank} on {hosts[rank]}" if several_hosts else str(rank) for rank in ranks[:MAX_RANKS_NAMED]]
        more = f" and {len(ranks) - MAX_RANKS_NAMED} more" if len(ranks) > MAX_RANKS_NAMED else ""
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(shown)}{more}"

    lines = listed([f"{d.key}: {' / '.join(named(camp) for camp in d.camps)}" for d in found])
    causes = []
    replicas = [d for d in found if d.is_tensor and part_of(d.key) in ("model", "optimizer")]
    if replicas:
        causes.append(
            "Tensors that should be replicas differ: two pipeline stages or models use the same names (give each its "
            "own), a gradient all-reduce is missing, or a device computes wrongly"
        )
    if any(part_of(d.key) == "optimizer" for d in replicas):
        causes.append(
            "State that an optimizer keeps for each rank's shard of a parameter has to be a DTensor, so that it can be "
            "stored by shards"
        )
    if len(replicas) < len(found):
        advice = own_to_each(d.key for d in found if d not in replicas)
        causes.append(f"One value is stored under a key: {advice}")
    cause = "\n".join(causes)
    text = "\n  ".join(lines)
    return SaveError(
        f"ranks hold different values under the same key, nothing was saved:\n  {text}\n{cause}", key=found[0].key
    )


def host_name() -> str:
    """Return this rank's host, for messages."""
    return socket.gethostname()
