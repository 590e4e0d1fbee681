"""Any tensors, sharded in any way over any number of ranks, load bit for bit onto any other sharding.

Ranks are simulated in one process: each gets the pieces that its coordinate implies, plans, writes and signs off as a
real one does. Sizes of blocks, slabs and tasks are drawn too, so that tiny tensors take every path of large ones.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from milepost.format.box import Box
from milepost.format.digest import BlockDigests, block_crcs
from milepost.format.manifest import Manifest
from milepost.loading import reader
from milepost.loading.reader import read_tensors
from milepost.run import checkpoint_record, commit
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import begin_attempt, new_save_id
from milepost.run.place import Place
from milepost.run.signoff import SignOff, segment_of, sign_off, wait_for_sign_offs
from milepost.saving import stage
from milepost.saving.stage import TensorBlocks
from milepost.saving.writer import write_file
from milepost.storage import LocalStorage
from milepost.tensors.layout import Piece, TensorLeaf, axis_cuts, shard_pieces
from milepost.tensors.plan import LocalLayout, Mesh, Spread, WritePlan, deal, plan_save
from milepost.tensors.read_plan import plan_load
from milepost.tensors.sharing import FromRank0, description, only, plan_alone, sort_out

DTYPES = ("float32", "bfloat16", "int64", "bool", "complex64", "float8_e5m2", "uint16", "float4_e2m1fn_x2")
CASTS = {"float32": ("bfloat16", "float64"), "bfloat16": ("float32",), "int64": ("int32",)}


@dataclass(frozen=True)
class Sharding:
    """A mesh, the placements on it, and whether local tensors are column-major in memory."""

    mesh_shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    column_major: bool

    def leaf(self, key: str, dtype: torch.dtype, shape: tuple[int, ...], rank: int) -> TensorLeaf:
        """Return the part that ``rank`` holds, not filled yet."""
        coordinate = list(itertools.product(*map(range, self.mesh_shape)))[rank]
        pieces = shard_pieces(shape, self.mesh_shape, coordinate, self.placements)
        if math.prod(shape) == 0:  # every rank brings it, as `tensor_leaf` says
            pieces = (Piece(Box.whole(shape), Box.whole(shape)),)
        sizes = tuple(max((p.local.stops[dim] for p in pieces), default=0) for dim in range(len(shape)))
        if self.column_major:
            local = torch.empty(tuple(reversed(sizes)), dtype=dtype).permute(tuple(reversed(range(len(sizes)))))
        else:
            local = torch.empty(sizes, dtype=dtype)
        spread = Spread(Mesh.of(self.mesh_shape, range(math.prod(self.mesh_shape))), axis_cuts(self.placements))
        return TensorLeaf(key, dtype, shape, pieces, local, spread=spread if math.prod(shape) else None)


@dataclass(frozen=True)
class Tensor:
    """One tensor, as it is saved and as it is wanted."""

    dtype: str
    wanted_dtype: str
    shape: tuple[int, ...]
    saved: Sharding
    wanted: Sharding


def meshes(world_size: int) -> list[tuple[int, ...]]:
    """The shapes of up to three dims with this number of ranks."""
    pairs = [(n, world_size // n) for n in range(1, world_size + 1) if world_size % n == 0]
    return [(world_size,), *pairs, *[(a, b, 1) for a, b in pairs]]


@st.composite
def shardings(draw: st.DrawFn, world_size: int, ndim: int) -> Sharding:
    mesh_shape = draw(st.sampled_from(meshes(world_size)))
    if ndim == 0:
        return Sharding(mesh_shape, (Replicate(),) * len(mesh_shape), False)
    one = st.one_of(st.just(Replicate()), st.integers(0, ndim - 1).map(Shard))
    placements: list[Placement] = draw(st.lists(one, min_size=len(mesh_shape), max_size=len(mesh_shape)))
    if len(mesh_shape) == 2 and mesh_shape[1] > 1 and draw(st.booleans()):
        dim = draw(st.integers(0, ndim - 1))
        placements = [_StridedShard(dim, split_factor=mesh_shape[1]), Shard(dim)]  # FSDP over TP
    return Sharding(mesh_shape, tuple(placements), draw(st.booleans()))


@st.composite
def tensors(draw: st.DrawFn, num_saving: int, num_loading: int) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    return Tensor(
        dtype=dtype,
        wanted_dtype=draw(st.sampled_from((dtype, dtype, *CASTS.get(dtype, ())))),
        shape=shape,
        saved=draw(shardings(num_saving, len(shape))),
        wanted=draw(shardings(num_loading, len(shape))),
    )


WORLDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
CASES = WORLDS.flatmap(lambda sizes: st.tuples(st.just(sizes), st.lists(tensors(*sizes), min_size=1, max_size=3)))


def random_tensor(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    high = 2 if dtype == "bool" else 256
    raw = torch.randint(0, high, (math.prod(shape) * kind.itemsize,), dtype=torch.uint8, generator=generator)
    return torch.empty(0, dtype=kind).set_(raw.untyped_storage(), 0, shape)  # type: ignore[call-overload]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    start = tensor.storage_offset() * tensor.element_size()
    raw = torch.empty(0, dtype=torch.uint8)
    return raw.set_(tensor.untyped_storage(), start, (tensor.numel() * tensor.element_size(),))  # type: ignore[call-overload]


def plans_made_alone(layouts: Sequence[LocalLayout]) -> list[WritePlan]:
    """The plan that each rank makes by itself, given what follows from a description common to all ranks."""
    assert len({repr(description(layout)) for layout in layouts}) == 1
    sharing = sort_out([description(layouts[0])], [0] * len(layouts), {})
    dealt = deal([only(layout, sharing.placed) for layout in layouts])
    return [plan_alone(rank, own, sharing, given=FromRank0(dealt[rank]))[0] for rank, own in enumerate(layouts)]


def save(
    storage: LocalStorage, num_ranks: int, cases: Sequence[Tensor], wholes: Sequence[torch.Tensor], *, alone: bool
) -> Manifest:
    ranks: list[dict[str, TensorLeaf]] = []
    for rank in range(num_ranks):
        leaves = {}
        for number, (case, whole) in enumerate(zip(cases, wholes, strict=True)):
            leaf = case.saved.leaf(f"w{number}", whole.dtype, case.shape, rank)
            for index, piece in enumerate(leaf.pieces):
                leaf.view(index).copy_(whole[piece.box.index()])
            leaves[leaf.key] = leaf
        ranks.append(leaves)
    layouts = [LocalLayout(tuple(leaf.spec for leaf in leaves.values()), ()) for leaves in ranks]
    plans = plans_made_alone(layouts) if alone else plan_save(layouts)
    save_id = new_save_id()
    attempt = begin_attempt(storage, "step-1", save_id)
    for rank, (plan, leaves) in enumerate(zip(plans, ranks, strict=True)):
        files = ()
        if not plan.is_empty:
            files = (write_file(storage, Place(f"{attempt}/data"), plan, TensorBlocks(leaves), {}),)
        sign_off(storage, attempt, SignOff(rank, save_id, segment_of(files)))
    signed = wait_for_sign_offs(storage, attempt, num_ranks, save_id, timeout_s=10)
    return commit.publish(storage, attempt, "step-1", signed, SaveInfo(step=1, kind="state"), now=0.0)


def small_digests(folder: Path, manifest: Manifest, block_nbytes: int) -> BlockDigests:
    """The digests that a writer of smaller blocks would have left."""
    crcs, starts = [np.empty(0, dtype="<u4")], {}
    total = 0
    for key, tensor in manifest.tensors.items():
        bounds = [0]
        for shard in tensor.shards:
            offset = shard.data_offset or 0
            data = (folder / shard.file).read_bytes()[offset : offset + shard.data_nbytes]
            crcs.append(block_crcs(data, block_nbytes))
            bounds.append(bounds[-1] + len(crcs[-1]))
        starts[key] = total, bounds
        total += bounds[-1]
    return BlockDigests(manifest.save_id, block_nbytes, np.concatenate(crcs), starts)


def check_load(
    storage: LocalStorage,
    manifest: Manifest,
    digests: BlockDigests | None,
    rank: int,
    cases: Sequence[Tensor],
    wholes: Sequence[torch.Tensor],
) -> None:
    leaves: Mapping[str, TensorLeaf] = {
        f"w{number}": case.wanted.leaf(f"w{number}", getattr(torch, case.wanted_dtype), case.shape, rank)
        for number, case in enumerate(cases)
    }
    items = plan_load(manifest, [leaf.spec for leaf in leaves.values()])
    stats = read_tensors(storage, "step-1", items, leaves, digests)
    assert stats.wanted_nbytes == sum(leaf.local.nbytes for leaf in leaves.values())
    for leaf, whole in zip(leaves.values(), wholes, strict=True):
        for index, piece in enumerate(leaf.pieces):
            wanted = whole[piece.box.index()]
            if leaf.dtype == whole.dtype:
                assert torch.equal(bits(leaf.view(index)), bits(wanted)), (leaf.key, piece)
            else:  # which NaN a cast makes depends on how torch vectorises it
                cast = wanted.to(leaf.dtype)
                torch.testing.assert_close(leaf.view(index), cast, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=CASES,
    seed=st.integers(0, 1 << 30),
    block_nbytes=st.sampled_from([16, 48, 64, 1024]),
    slab_nbytes=st.sampled_from([16, 100, 4096]),
    task_nbytes=st.sampled_from([16, 80, 4096]),
    alone=st.booleans(),
)
def test_any_sharding_onto_any_other(
    case: tuple[tuple[int, int], list[Tensor]],
    seed: int,
    block_nbytes: int,
    slab_nbytes: int,
    task_nbytes: int,
    alone: bool,
) -> None:
    """``alone``: each rank plans by itself, instead of one rank for all."""
    (num_saving, num_loading), cases = case
    generator = torch.Generator().manual_seed(seed)
    wholes = [random_tensor(tensor.dtype, tensor.shape, generator) for tensor in cases]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        storage = LocalStorage(folder)
        with mock.patch.multiple(stage, SLAB_NBYTES=slab_nbytes):
            save(storage, num_saving, cases, wholes, alone=alone)
        manifest = checkpoint_record.read_manifest(storage, "step-1")
        stored = sum(shard.data_nbytes for tensor in manifest.tensors.values() for shard in tensor.shards)
        assert stored == sum(whole.nbytes for whole in wholes)
        own = checkpoint_record.read_digests(storage, "step-1", manifest)
        small = small_digests(Path(folder) / "step-1", manifest, block_nbytes)
        with mock.patch.multiple(reader, TASK_NBYTES=task_nbytes):
            for rank in range(num_loading):
                for digests in (own, small, None):
                    check_load(storage, manifest, digests, rank, cases, wholes)
