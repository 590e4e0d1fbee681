"""Saving without stopping training, against one plain copy, a synchronous save and stock ``dcp.async_save``.

Run: ``python benchmarks/bench_async.py [--rounds 5] [--folder DIR] [--device cuda] [--json FILE]``. One process, one
torch thread, 96 fp32 tensors of 2048 x 2048 (1.6 GB). The training thread does matrix products all the while. Figures
are of the second save on. On a GPU the plain copy goes into pinned memory.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import milepost
from figures import Figures as Goals
from milepost.collective.comm import SingleProcess
from milepost.run.assemble import SaveInfo
from milepost.saving.async_save import AsyncSaver
from milepost.saving.request import SaveRequest
from milepost.storage import open_storage

SIDE = 2048
INFO = SaveInfo(step=None, kind="state")


@dataclass
class Figures:
    """Seconds, one entry a round."""

    blocked: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    """From the call to the end of the save."""
    step: list[float] = field(default_factory=list)
    """Median time of a training step while the save was written."""


class Training:
    """Steps of matrix products on the training thread."""

    def __init__(self, device: str) -> None:
        side = 8192 if device == "cuda" else 1024
        self.a, self.b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
        self.scale = side**0.5

    def step(self) -> float:
        started = time.perf_counter()
        for _ in range(2):
            self.a = torch.mm(self.a, self.b).div_(self.scale)
        if self.a.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def run(self, until: Callable[[], bool], at_least_s: float = 0.0) -> list[float]:
        times: list[float] = []
        started = time.perf_counter()
        while not until() or time.perf_counter() - started < at_least_s:
            times.append(self.step())
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.NamedTemporaryFile() as rendezvous:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous.name}", rank=0, world_size=1)
        state = {f"layers.{i}.weight": torch.randn(SIDE, SIDE, device=args.device) for i in range(args.tensors)}
        args.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            goals = Goals(f"bench_async.py --tensors {args.tensors} --rounds {args.rounds}")
            measure(state, Path(folder), args.rounds, goals)
            goals.finish(args.json)
    logging.shutdown()
    os._exit(0)


def measure(state: dict[str, torch.Tensor], folder: Path, rounds: int, goals: Goals) -> None:
    device = next(iter(state.values())).device
    training = Training(device.type)
    nbytes = sum(t.nbytes for t in state.values())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    size = f"{len(state)} fp32 tensors of {SIDE} x {SIDE}: {nbytes / 1e9:.2f} GB"
    print(f"on {where}: {size}, {rounds} rounds after a first one")
    storage, _ = open_storage(folder / "x")
    savers = {mode: AsyncSaver(storage, SingleProcess(), mode) for mode in ("async", "async_with_pinned_mem")}
    contenders: dict[str, Callable[[Figures], None]] = {
        "milepost async": lambda f: ours(savers["async"], state, training, f),
        "milepost async_with_pinned_mem": lambda f: ours(savers["async_with_pinned_mem"], state, training, f),
        "stock async_save, thread": lambda f: stock(AsyncCheckpointerType.THREAD, state, folder, training, f),
        "stock async_save, process": lambda f: stock(AsyncCheckpointerType.PROCESS, state, folder, training, f),
        "milepost.save (synchronous)": lambda f: synchronous(state, folder, f),
    }
    figures = {name: Figures() for name in contenders}
    first: dict[str, float] = {}
    copies: list[float] = []
    quiet: list[float] = []
    spare = {key: torch.zeros(v.shape, dtype=v.dtype, pin_memory=v.is_cuda) for key, v in state.items()}
    undisturbed = statistics.median(training.run(lambda: True, at_least_s=1.5))
    for mode, saver in savers.items():  # as a manager does after the first step
        saver.prepare(nbytes + (2 << 20))
        steps = training.run(lambda: True, at_least_s=4.0)
        print(
            f"{mode}: memory allocated ahead of the first save; steps meanwhile {1e3 * statistics.mean(steps):.1f} "
            f"ms in the mean, {1e3 * max(steps):.1f} ms the slowest, {1e3 * undisturbed:.1f} ms before"
        )
    for round_number in range(rounds + 1):
        if round_number == 1:  # the first round makes plans and starts processes
            first = {name: found.blocked[0] for name, found in figures.items()}
            figures = {name: Figures() for name in contenders}
            copies, quiet = [], []
        quiet.append(statistics.median(training.run(lambda: True, at_least_s=1.5)))
        started = time.perf_counter()
        for key, value in state.items():
            spare[key].copy_(value, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        copies.append(time.perf_counter() - started)
        for name, act in contenders.items():
            os.sync()
            act(figures[name])
    report(figures, copies, quiet)
    hold(figures, first, quiet, goals)
    for mode, saver in savers.items():
        print(f"{mode}: arena {saver.arena_nbytes / 1e6:.1f} MB for {nbytes / 1e6:.1f} MB of state")
        saver.close()
    print(
        f"peak RSS of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB (state, a copy "
        "of it for comparison, both arenas and what stock keeps)"
    )


def ours(saver: AsyncSaver, state: dict[str, torch.Tensor], training: Training, figures: Figures) -> None:
    started = time.perf_counter()
    handle = saver.save(SaveRequest("milepost", lambda: state, INFO))
    blocked = time.perf_counter() - started
    # Forward and backward: longer than the copy. Then the optimizer's turn.
    steps = training.run(handle.is_staged)
    wait = time.perf_counter()
    handle.staged()
    blocked += time.perf_counter() - wait
    steps += training.run(handle.done)
    figures.blocked.append(blocked)
    figures.commit.append(time.perf_counter() - started)
    figures.step.append(statistics.median(steps))
    handle.result()


def stock(
    kind: AsyncCheckpointerType, state: dict[str, torch.Tensor], folder: Path, training: Training, figures: Figures
) -> None:
    path = folder / "stock"
    shutil.rmtree(path, ignore_errors=True)
    started = time.perf_counter()
    future = dcp.async_save(state, checkpoint_id=str(path), async_checkpointer_type=kind)
    figures.blocked.append(time.perf_counter() - started)
    steps = training.run(future.done)
    figures.commit.append(time.perf_counter() - started)
    figures.step.append(statistics.median(steps))
    future.result()


def synchronous(state: dict[str, torch.Tensor], folder: Path, figures: Figures) -> None:
    started = time.perf_counter()
    milepost.save(folder / "synchronous", state, comm=SingleProcess())
    seconds = time.perf_counter() - started
    figures.blocked.append(seconds)
    figures.commit.append(seconds)


def hold(figures: dict[str, Figures], first: dict[str, float], quiet: list[float], goals: Goals) -> None:
    """Hold both background modes to their goals."""
    sync, step = figures["milepost.save (synchronous)"].commit, statistics.median(quiet)
    for mode in ("async", "async_with_pinned_mem"):
        found = figures[f"milepost {mode}"]
        times = {mode: found.commit, "sync": sync}
        goals.note(f"{mode}, until committed", times)
        goals.ratio(f"{mode}: seconds until committed, of a synchronous save", times, mode, "sync", "at most", 1.1)
        slower = 100 * (statistics.median(found.step) / step - 1)
        goals.hold(f"{mode}: training steps meanwhile are slower by, %", "at most", 5.0, slower)
        blocked = first[f"milepost {mode}"] / statistics.median(found.blocked)
        goals.hold(f"{mode}: the first save blocks, of what later ones do", "at most", 1.3, blocked)


def report(figures: dict[str, Figures], copies: list[float], quiet: list[float]) -> None:
    copy, step = statistics.median(copies), statistics.median(quiet)
    sync = statistics.median(figures["milepost.save (synchronous)"].commit)
    table = Table(title="medians (minima)", title_justify="left")
    for column in ("", "blocked s", "in plain copies", "to commit s", "in sync saves", "training slower by"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in figures.items():
        blocked, commit = statistics.median(found.blocked), statistics.median(found.commit)
        slower = f"{100 * (statistics.median(found.step) / step - 1):.0f} %" if found.step else ""
        table.add_row(
            name,
            f"{blocked:.3f} ({min(found.blocked):.3f})",
            f"{blocked / copy:.2f}x",
            f"{commit:.2f} ({min(found.commit):.2f})",
            f"{commit / sync:.2f}x",
            slower,
        )
    Console(width=120).print(table)
    print(f"one plain copy: {copy:.3f} ({min(copies):.3f}) s; a training step without a save: {1e3 * step:.1f} ms")


if __name__ == "__main__":
    main()
