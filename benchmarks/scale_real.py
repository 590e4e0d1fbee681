"""Saves and loads of real worlds of many ranks: storage operations counted, and wall time beside stock DCP's.

Ranks are forked processes with a gloo group, each with its shards of a few small tensors and two values of its own, so
what is measured is coordination: plans, exchanges, sign-offs, the commit. First one save and one load of Milepost's are
counted; then both programs save and load in turn, from a barrier to a barrier, each save to a new folder.

Run: python benchmarks/scale_real.py [--ranks 8 16 32 64] [--tensors 48] [--rounds 5] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import milepost
from milepost.storage import open_storage
from milepost.storage.base import Storage
from milepost.testing.world import run_world
from milepost.testing.wrap import TraceStorage

ROWS, COLUMNS = 4, 256
WAITING = "names"
"""The one operation whose number depends on time: rank 0 looks for sign-offs, less and less often."""


def state_of(num_tensors: int) -> dict[str, Any]:
    """This rank's shards of each tensor, and values that it alone has."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (num_ranks,))
    tensors = [torch.full((ROWS, COLUMNS), float(rank)) for _ in range(num_tensors)]
    shards = {f"layers.{i}.weight": DTensor.from_local(one, mesh, [Shard(0)]) for i, one in enumerate(tensors)}
    return {**shards, "rng": {f"rank{rank}": {"torch": rank, "python": [rank]}}, "step": 7}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts the operations of Milepost's storages by name."""
    found: Counter[str] = Counter()
    traced: list[TraceStorage] = []

    def opened(path: str) -> tuple[Storage, str]:
        storage, name = open_storage(path)
        traced.append(TraceStorage(storage))
        return traced[-1], name

    with (
        mock.patch("milepost.saving.request.open_storage", opened),
        mock.patch("milepost.loading.load.open_storage", opened),
    ):
        yield found
    for storage in traced:
        found.update(operation.name for operation in storage.operations)


def count(folder: Path, state: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The operations of this rank in a first save, a later one, and a load."""
    acts: dict[str, Callable[[], object]] = {
        "first save": lambda: milepost.save(folder / "counted-0", state),
        "save": lambda: milepost.save(folder / "counted-1", state),
        "load": lambda: milepost.load(folder / "counted-1", state),
    }
    counted = {}
    for name, act in acts.items():
        with counting() as found:
            act()
        counted[name] = dict(found)
    return counted


def measure(folder: Path, num_tensors: int, rounds: int) -> dict[str, Any]:
    """The body of a rank: its operations, and the seconds of each act and round."""
    warnings.filterwarnings("ignore")
    state = state_of(num_tensors)
    stock = {key: value for key, value in state.items() if key != "rng"}  # which rank 0 would write for all
    counted = count(folder, state)
    seconds: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        acts: dict[str, Callable[[], object]] = {
            "milepost.save": lambda n=number: milepost.save(folder / f"ours-{n}", state),
            "dcp.save": lambda n=number: dcp.save(stock, checkpoint_id=folder / f"stock-{n}"),
            "milepost.load": lambda n=number: milepost.load(folder / f"ours-{n}", state),
            "dcp.load": lambda n=number: dcp.load(stock, checkpoint_id=folder / f"stock-{n}"),
        }
        for name, act in acts.items():
            dist.barrier()
            started, worked = time.perf_counter(), time.process_time()
            act()
            worked = time.process_time() - worked  # a barrier may spin
            dist.barrier()
            if number:  # the first round warms up
                seconds.setdefault(name, []).append(time.perf_counter() - started)
                cpu_s.setdefault(name, []).append(worked)
    return {"counted": counted, "seconds": seconds, "cpu_s": cpu_s}


def main() -> None:
    """Run each world, and print its operations and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tensors", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--json", type=Path, help="all figures, to a file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    everything = []
    for num_ranks in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            ranks = run_world(measure, num_ranks, Path(folder), args.tensors, args.rounds, timeout_s=1500)
        everything.append({"ranks": num_ranks, "tensors": args.tensors, "by_rank": ranks})
        print(f"{num_ranks} ranks, {args.tensors} tensors", flush=True)
        for act in ranks[0]["counted"]:
            kinds = Counter(json.dumps(dict(sorted(one["counted"][act].items()))) for one in ranks[1:])
            print(f"  {act}: rank 0 {dict(sorted(ranks[0]['counted'][act].items()))}")
            for kind, number in kinds.items():
                print(f"    {number} ranks {kind}")
        seconds = {name: statistics.median(found) for name, found in ranks[0]["seconds"].items()}
        together = {name: zip(*(one["cpu_s"][name] for one in ranks), strict=True) for name in seconds}
        cpu_s = {name: statistics.median(map(sum, found)) for name, found in together.items()}
        for what, found in (("wall clock", seconds), ("processor, all ranks together", cpu_s)):
            for act in ("save", "load"):
                ours, stock = found[f"milepost.{act}"], found[f"dcp.{act}"]
                print(f"  {act}, {what}: {ours:.3f} s, stock DCP {stock:.3f} s: {stock / ours:.1f} x", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
