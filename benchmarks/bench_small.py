"""Many small tensors, and a model for debugging: what a save and a load cost beside the bytes.

Run: ``python benchmarks/bench_small.py [--tensors 20000 100000] [--rounds 3] [--folder DIR] [--json FILE]``. Tensors of
16 x 16 (1 KB each), saved and loaded by Milepost and by stock DCP in turn. Then 50 saves of a model of 57 tensors with
AdamW's state through a ``CheckpointManager``, of which the time within calls of the storage is taken away.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import milepost
from figures import Figures, show
from milepost import CheckpointConfig, CheckpointManager
from milepost.storage import local
from milepost.storage.local_files import LocalWrite

OURS, STOCK = "Milepost", "stock DCP"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("WORK", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.memory:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print(peak_nbytes(args.memory[0], int(args.memory[1]), Path(folder)))
        return
    figures = Figures(f"bench_small.py --tensors {' '.join(map(str, args.tensors))} --rounds {args.rounds}")
    for count in args.tensors:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            small_tensors(count, Path(folder), args.rounds, figures)
    least, most = min(args.tensors), max(args.tensors)
    for work in ("save", "load"):
        few, many = (_peak_in_a_process(work, count, args.folder) for count in (least // 4, most))
        per_tensor = (many - few) / (most - least // 4)
        figures.hold(f"memory at the peak of a {work}, KB a small tensor", "at most", 10.0, per_tensor / 1e3)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        debug_model(Path(folder), figures)
    figures.finish(args.json)


def tensors(count: int) -> dict[str, torch.Tensor]:
    """With names as a model of many layers has them."""
    return {f"layers.{i // 10}.block.{i % 10}.weight": torch.full((16, 16), float(i)) for i in range(count)}


def small_tensors(count: int, folder: Path, rounds: int, figures: Figures) -> None:
    state = tensors(count)
    into = {key: torch.zeros_like(value) for key, value in state.items()}
    times: dict[str, dict[str, list[float]]] = {work: {OURS: [], STOCK: []} for work in ("save", "load")}
    works: dict[tuple[str, str], Callable[[], object]] = {
        ("save", OURS): lambda: milepost.save(folder / "ours", state),
        ("load", OURS): lambda: milepost.load(folder / "ours", into),
        ("save", STOCK): lambda: dcp.save(state, checkpoint_id=str(folder / "stock")),
        ("load", STOCK): lambda: dcp.load(into, checkpoint_id=str(folder / "stock")),
    }
    for _ in range(rounds):
        for path in folder.iterdir():
            shutil.rmtree(path)
        for (work, name), act in works.items():
            os.sync()
            started = time.perf_counter()
            act()
            times[work][name].append(time.perf_counter() - started)
    for work, found in times.items():
        show(f"{work} of {count:,} tensors of 16 x 16", found, count * 1024)
        figures.note(f"{work}, {count} tensors", found)
        figures.ratio(f"{work} of {count:,} small tensors, of stock DCP's speed", found, STOCK, OURS, "at least", 3.0)


def peak_nbytes(work: str, count: int, folder: Path) -> int:
    """The memory of this process at its peak, less what it has with the tensors alone."""
    state = tensors(count)
    if work == "load":
        subprocess.run([sys.executable, __file__, "--memory", "make", str(count), "--folder", str(folder)], check=True)
    if work == "make":  # for another process to load
        milepost.save(folder.parent / "step-1", state)
        return 0
    before = _peak_kib()
    if work == "save":
        milepost.save(folder / "step-1", state)
    else:
        milepost.load(folder / "step-1", state)
    return (_peak_kib() - before) * 1024


def _peak_kib() -> int:
    """Of this process alone: ``ru_maxrss`` has that of the process that started it too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def _peak_in_a_process(work: str, count: int, folder: Path) -> int:
    command = [sys.executable, __file__, "--memory", work, str(count), "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def debug_model(folder: Path, figures: Figures) -> None:
    """Saves of a small model, without the time that its storage takes."""
    layers = [[nn.Linear(64, 64, bias=False) for _ in range(7)] + [nn.LayerNorm(64, bias=False)] for _ in range(7)]
    model = nn.ModuleList([nn.Linear(64, 256, bias=False), *(part for layer in layers for part in layer)])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    config = CheckpointConfig(interval=1, keep_latest_k=2)
    beside, whole = [], []
    with CheckpointManager(folder / "run", config, model=model, optimizer=optimizer) as manager, clock() as spent_s:
        for step in range(1, 51):
            optimizer.step()
            before, started = spent_s[0], time.perf_counter()
            manager.save(step)
            whole.append(time.perf_counter() - started)
            beside.append(whole[-1] - (spent_s[0] - before))
    figures.note("save of a model for debugging", {"all of it": whole, "beside its writes": beside})
    milliseconds = 1e3 * statistics.median(beside[1:])
    name = f"save of a model for debugging ({len([*model.parameters()])} tensors and AdamW), ms beside its writes"
    figures.hold(name, "at most", 10.0, milliseconds, 1e3 * min(beside[1:]))


@contextmanager
def clock() -> Iterator[list[float]]:
    """Seconds that all threads together spend within calls of the local storage, in a list of one."""
    spent, depth, lock = [0.0], threading.local(), threading.Lock()

    def timed(act: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(act)
        def run(*args: Any, **kwargs: Any) -> Any:
            if getattr(depth, "value", 0):
                return act(*args, **kwargs)
            depth.value, started = 1, time.perf_counter()
            try:
                return act(*args, **kwargs)
            finally:
                depth.value = 0
                with lock:
                    spent[0] += time.perf_counter() - started

        return run

    reads = ("list", "names", "stat", "open_read", "read")
    writes = ("open_write", "write", "write_all", "leave", "replace", "append", "make_folder", "sync_folder")
    moves = ("rename", "exchange", "keep_access", "remove", "remove_tree")
    patches = [
        mock.patch.object(local.LocalStorage, name, timed(getattr(local.LocalStorage, name)))
        for name in (*reads, *writes, *moves)
    ]
    patches += [mock.patch.object(LocalWrite, n, timed(getattr(LocalWrite, n))) for n in ("write", "sync")]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()


if __name__ == "__main__":
    main()
