"""What frozen tensors cost from the second save on, and that a run without any pays nothing for it.

Run: ``python benchmarks/bench_frozen.py [--tensors 24] [--rounds 7] [--json FILE]``. A LoRA-like run (adapters and
their momentum are 1 % of all) and a run that trains everything, each with ``full_every = 0`` (frozen tensors are
shared) and ``1`` (all is written at each save), interleaved. Bytes are what the saves wrote; times are minimum and
median of all saves but the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from figures import Figures
from milepost import CheckpointConfig, CheckpointManager

SIDE = 2048


class Adapted(nn.Module):
    """A stack of linear layers, and an adapter of 1 % of their parameters."""

    def __init__(self, num_tensors: int, *, is_frozen: bool):
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(num_tensors))
        self.base.requires_grad_(not is_frozen)
        self.adapter = nn.Linear(SIDE, SIDE * num_tensors // 200, bias=False)  # its momentum is as large again


class Run:
    """A run whose saves are timed."""

    def __init__(self, folder: Path, args: argparse.Namespace, *, is_frozen: bool, full_every: int):
        self.model = Adapted(args.tensors, is_frozen=is_frozen)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, momentum=0.9)
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.momentum = optimizer.state[self.model.adapter.weight]["momentum_buffer"]
        config = CheckpointConfig(interval=1, keep_latest_k=2, full_every=full_every, last_save_model_only=False)
        self.folder = folder
        self.manager = CheckpointManager(folder, config, model=self.model, optimizer=optimizer)
        self.nbytes: list[int] = []
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def save(self, step: int) -> None:
        with torch.no_grad():
            self.model.adapter.weight.add_(1.0)
            self.momentum.add_(1.0)
        wall, cpu = time.perf_counter(), time.process_time()
        self.manager.save(step)
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)
        files = (self.folder / f"step-{step}").iterdir()
        self.nbytes.append(sum(file.stat().st_size for file in files if file.stat().st_nlink == 1))

    def result(self) -> dict[str, float]:
        return {
            "first_save_nbytes": self.nbytes[0],
            "later_save_nbytes": max(self.nbytes[1:]),
            "later_save_s_min": min(self.wall_s[1:]),
            "later_save_s_median": statistics.median(self.wall_s[1:]),
            "later_save_cpu_s_min": min(self.cpu_s[1:]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=24, help="fp32 tensors of 2048 x 2048 (16.8 MB each)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        runs = {
            f"{kind}, {how}": Run(Path(folder) / f"{kind}-{full_every}", args, is_frozen=frozen, full_every=full_every)
            for kind, frozen in (("LoRA", True), ("full", False))
            for how, full_every in (("shared", 0), ("written anew", 1))
        }
        for step in range(1, args.rounds + 2):
            for run in runs.values():
                run.save(step)
        results = {name: run.result() for name, run in runs.items()}
        for run in runs.values():
            run.manager.close()
    for name, found in results.items():
        print(f"{name}: {json.dumps({key: round(value, 4) for key, value in found.items()})}")
    lora, full = results["LoRA, shared"], results["full, shared"]
    figures = Figures(f"bench_frozen.py --tensors {args.tensors} --rounds {args.rounds}")
    part = lora["later_save_nbytes"] / lora["first_save_nbytes"]
    figures.hold("LoRA, 1 % trained: bytes of a later save, of the first", "at most", 0.02, part)
    anew = results["full, written anew"]["later_save_cpu_s_min"]
    paid = full["later_save_cpu_s_min"] / anew
    figures.hold("all trained: processor time of a save, of one with full_every = 1", "at most", 1.05, paid)
    figures.note("later saves, minima", {name: [found["later_save_s_min"]] for name, found in results.items()})
    figures.finish(args.json)


if __name__ == "__main__":
    main()
