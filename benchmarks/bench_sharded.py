"""Save and load of FSDP shards over two ranks, against stock DCP, as ratios of one run.

Run: ``python benchmarks/bench_sharded.py [--tensors 96] [--rounds 5] [--folder DIR] [--json FILE]``. 96 fp32 tensors of
2048 x 2048 (1.6 GB in all), each sharded by rows over two ranks of one machine; contenders are interleaved.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import milepost
from figures import Figures, show
from milepost.testing.world import run_world

SIDE = 2048
WORLD_SIZE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        times = run_world(measure, WORLD_SIZE, args.tensors, args.rounds, Path(folder), timeout_s=1000.0)[0]
    size = args.tensors * SIDE * SIDE * 4
    print(f"{args.tensors} fp32 tensors of {SIDE} x {SIDE}, {size / 1e9:.2f} GB, rows sharded over {WORLD_SIZE} ranks")
    figures = Figures(f"bench_sharded.py --tensors {args.tensors} --rounds {args.rounds}")
    for act, goal in (("save", 2.0), ("load", 3.0)):
        ours, stock = f"milepost.{act}", f"dcp.{act} (stock)"
        found = {name: times[name] for name in (ours, stock)}
        show(f"{act}, shards of two ranks", found, size)
        figures.note(f"{act}, shards of two ranks", found)
        when = "load right after the save" if act == "load" else act
        figures.ratio(f"{when}, shards of two ranks, of stock DCP's speed", found, stock, ours, "at least", goal)
    figures.finish(args.json)


def measure(num_tensors: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """The body of a rank. Times are from a barrier to a barrier."""
    warnings.filterwarnings("ignore")
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    state = {
        f"layers.{i}.weight": DTensor.from_local(torch.randn(SIDE // WORLD_SIZE, SIDE), mesh, [Shard(0)])
        for i in range(num_tensors)
    }
    into = {
        key: DTensor.from_local(torch.zeros_like(value.to_local()), mesh, [Shard(0)]) for key, value in state.items()
    }
    contenders: dict[str, Callable[[], object]] = {
        "milepost.save": lambda: milepost.save(folder / "milepost", state),
        "dcp.save (stock)": lambda: dcp.save(state, checkpoint_id=str(folder / "stock")),
        "milepost.load": lambda: milepost.load(folder / "milepost", into),
        "dcp.load (stock)": lambda: dcp.load(into, checkpoint_id=str(folder / "stock")),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()
        for name, act in contenders.items():
            dist.barrier()
            started = time.perf_counter()
            act()
            dist.barrier()
            times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
