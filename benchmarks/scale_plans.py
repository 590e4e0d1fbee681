"""What the first save of a large world costs before a byte is written: fabricated layouts, no processes and no data.

For each size, in a process of its own: the processor time of one rank to describe its state and to make its plan; of
rank 0 to sort out what all ranks hold; the bytes that a rank brings, that one of each kind brings besides, and that all
are told; and the memory that it all takes at its peak. Each rank has four values of its own, as its random generators
are. Beside it, where it fits, stock DCP: a local plan a rank, and the global plan that its rank 0 makes of all of them.

Run: python benchmarks/scale_plans.py [--ranks 64 256 1024 4096 16384] [--tensors 291 3411 10000]
     [--worlds fsdp tp8 pp16 hsdp] [--stock 400000] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from bench_scale import SHAPES, keys_of
from milepost.saving.structure import Nesting, Roster, structure_of
from milepost.tensors.layout import axis_cuts, shard_pieces
from milepost.tensors.plan import LocalLayout, Mesh, Spread, TensorSpec
from milepost.tensors.sharing import plan_alone

WORLDS = ("fsdp", "tp8", "pp16", "hsdp")


class World:
    """A mesh over all ranks, or over those of each stage; and how tensors lie on it."""

    def __init__(self, name: str, num_ranks: int, num_tensors: int):
        self.num_ranks = num_ranks
        self.keys = keys_of(num_tensors)
        self.num_stages = 16 if name == "pp16" else 1
        per_stage = num_ranks // self.num_stages
        self.matrix: tuple[Placement, ...] = (Shard(0),)
        shape: tuple[int, ...] = (per_stage,)
        if name == "tp8":
            shape, self.matrix = (per_stage // 8, 8), (_StridedShard(0, split_factor=8), Shard(0))
        elif name == "hsdp":
            shape, self.matrix = (per_stage // 32, 32), (Replicate(), Shard(0))
        self.vector = (*self.matrix[:-1], Replicate()) if name == "tp8" else self.matrix
        if name == "tp8":
            self.vector = (Shard(0), Replicate())
        self.meshes = [
            Mesh.of(shape, range(stage * per_stage, (stage + 1) * per_stage)) for stage in range(self.num_stages)
        ]

    def stage_of(self, rank: int) -> int:
        """The number of the rank's stage."""
        return rank // (self.num_ranks // self.num_stages)

    def layout(self, rank: int) -> LocalLayout:
        """What the rank would bring."""
        mesh = self.meshes[self.stage_of(rank)]
        coordinate = [index.item() for index in torch.tensor(mesh.ranks).view(mesh.shape).eq(rank).nonzero()[0]]
        keys = [key for n, key in enumerate(self.keys) if n % self.num_stages == self.stage_of(rank)]
        boxes = {}
        spreads = {}
        for shape in SHAPES:
            placements = self.matrix if len(shape) > 1 else self.vector
            boxes[shape] = tuple(p.box for p in shard_pieces(shape, mesh.shape, coordinate, placements))
            spreads[shape] = Spread(mesh, axis_cuts(placements))
        shapes = list(itertools.islice(itertools.cycle(SHAPES), len(keys)))
        tensors = [
            TensorSpec(key, "float32", shape, boxes[shape], spreads[shape])
            for key, shape in zip(keys, shapes, strict=True)
        ]
        own = [f"rng.rank{rank}.{name}" for name in ("torch", "numpy", "python", "cuda")]
        return LocalLayout(tuple(tensors), ("train_state.step", "lr_scheduler.last_epoch", *own))


def nesting_of(layout: LocalLayout) -> Nesting:
    """As a flat state dict has it."""
    keys = [*(spec.key for spec in layout.tensors), *layout.objects]
    return Nesting({key: tuple(key.split(".")) for key in keys}, (), {"": b""})


def timed(act: Callable[[], Any], *, tries: int = 1) -> tuple[Any, float]:
    """The result, and processor seconds: of the quickest of several tries."""
    seconds = []
    for _ in range(tries):
        started = time.process_time()
        found = act()
        seconds.append(time.process_time() - started)
    return found, min(seconds)


def measure(name: str, num_ranks: int, num_tensors: int, *, with_stock: bool) -> dict[str, Any]:
    """One size, in this process."""
    world = World(name, num_ranks, num_tensors)
    base_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rank = num_ranks // 2
    layout = world.layout(rank)
    structure, describe_s = timed(lambda: structure_of(layout, nesting_of(layout), rank), tries=3)
    _, digest_s = timed(lambda: (structure.shared.digest(), structure.own.digest()), tries=3)
    # Of the others only what they tell: the digest of their kind, and their own part.
    firsts = [stage * (num_ranks // world.num_stages) for stage in range(world.num_stages)]
    described = {}
    for first in firsts:
        mine = world.layout(first)
        described[world.stage_of(first)] = structure_of(mine, nesting_of(mine), first).shared
    kinds = {stage: portion.digest() for stage, portion in described.items()}
    told, owns = [], {}
    for other in range(num_ranks):
        values = LocalLayout((), world_values(other))
        own = structure_of(values, Nesting({k: tuple(k.split(".")) for k in values.objects}, (), {}), other).own
        told.append((kinds[world.stage_of(other)], own.digest()))
        owns[told[-1][1]] = own
    roster = Roster()
    roster.add_own(owns)
    asked = roster.ask(told)
    brought = [type(structure)(described[world.stage_of(first)], owns[told[first][1]]) for first in asked]
    _, learn_s = timed(lambda: roster.learn(told, brought))
    sharing, sort_s = timed(roster.sort_out)
    assert not sharing.placed
    (plan, _), plan_s = timed(lambda: plan_alone(rank, layout, sharing, own=structure.own.nesting.paths), tries=3)
    assert plan.num_items or name == "hsdp"
    found = {
        "world": name,
        "ranks": num_ranks,
        "tensors": num_tensors,
        "describe_s": describe_s + digest_s,
        "plan_s": plan_s,
        "rank_0_s": learn_s + sort_s,
        "offer_b": len(pickle.dumps((told[rank], structure.own))),
        "kinds": len(asked),
        "kind_b": len(pickle.dumps(structure.shared)),
        "told_b": len(pickle.dumps(sharing)),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base_mb,
    }
    if with_stock:
        found |= measure_stock(world)
    return found


def world_values(rank: int) -> tuple[str, ...]:
    """The keys that are a rank's own."""
    return tuple(f"rng.rank{rank}.{name}" for name in ("torch", "numpy", "python", "cuda"))


def measure_stock(world: World) -> dict[str, float]:
    """Stock DCP's plans of the same world: a local one a rank, and the global one of all of them."""
    base_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    plans, local_s = timed(lambda: [stock_plan(world.layout(rank)) for rank in range(world.num_ranks)])
    num_items = sum(len(plan.items) for plan in plans)
    nbytes = len(pickle.dumps(plans[0]))
    _, global_s = timed(lambda: DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans))
    return {
        "stock_local_s": local_s / world.num_ranks,
        "stock_global_s": global_s,
        "stock_offer_b": nbytes,
        "stock_items": num_items,
        "stock_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base_mb,
    }


def stock_plan(layout: LocalLayout) -> SavePlan:
    """As its planner makes it of DTensors."""
    properties = TensorProperties(dtype=torch.float32)
    items = [
        WriteItem(
            index=MetadataIndex(spec.key, torch.Size(box.offsets)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)), properties, torch.Size(spec.shape)
            ),
        )
        for spec in layout.tensors
        for box in spec.boxes
    ]
    items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in layout.objects]
    return SavePlan(items)


def growth(found: Sequence[dict[str, Any]], name: str) -> float:
    """The power of the number of ranks by which a quantity grows, over the last step."""
    one, other = found[-2:]
    return math.log(max(other[name], 1e-9) / max(one[name], 1e-9)) / math.log(other["ranks"] / one["ranks"])


def main() -> None:
    """Measure each size in a process of its own, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--tensors", type=int, nargs="+", default=[3411])
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--stock", type=int, default=400_000, help="stock DCP too, up to so many shards")
    parser.add_argument("--json", type=Path, help="all figures, to a file")
    parser.add_argument("--one", action="store_true", help="measure the one size given here, and print it as JSON")
    args = parser.parse_args()
    if args.one:
        size = args.ranks[0], args.tensors[0]
        print(json.dumps(measure(args.worlds[0], *size, with_stock=math.prod(size) <= args.stock)))
        return
    columns = ("world", "ranks", "tensors", "describe_s", "plan_s", "rank_0_s", "offer_b", "kinds", "kind_b", "told_b")
    columns += ("peak_mb", "stock_local_s", "stock_global_s", "stock_offer_b", "stock_peak_mb")
    print("  ".join(f"{name:>13}" for name in columns))
    everything = []
    for world, num_tensors in itertools.product(args.worlds, args.tensors):
        series: list[dict[str, Any]] = []
        for num_ranks in args.ranks:
            size = ["--ranks", str(num_ranks), "--tensors", str(num_tensors), "--worlds", world]
            command = [sys.executable, __file__, "--one", *size, "--stock", str(args.stock)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1800, check=True)
            series.append(json.loads(done.stdout))
            print("  ".join(_cell(series[-1].get(name, "")) for name in columns), flush=True)
        if len(series) > 1:
            grown = ", ".join(f"{name} {growth(series, name):.2f}" for name in ("plan_s", "rank_0_s", "told_b"))
            print(f"    grows with the ranks to the power of: {grown}", flush=True)
        everything += series
    if args.json is not None:
        args.json.write_text(json.dumps(everything, indent=1))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:>13.4f}" if value < 1 else f"{value:>13.1f}"
    return f"{value:>13,}" if isinstance(value, int) else f"{value:>13}"


if __name__ == "__main__":
    main()
