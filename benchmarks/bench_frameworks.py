"""A save inside each framework, by its own code and by Milepost, one after the other in one run.

Run: ``python benchmarks/bench_frameworks.py [--rounds 5] [--side 1024] [--folder DIR] [FRAMEWORK ...]``; torchtitan in
the environment of its own: ``.venv-torchtitan/bin/python benchmarks/bench_frameworks.py torchtitan``. One process, a
model of 16 square matrices (of torchtitan its debug model, 75 MB a save) with AdamW's state. What is measured is the
framework's own call: how long training is blocked, and how long it takes until the checkpoint is there. The frameworks'
own saves are not synced to the disk, so that theirs are there before they are safe.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from milepost import CheckpointConfig

Save = Callable[[Path], Any]
"""Begins a save in a fresh folder; what is returned, if callable, waits for its end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    installed = [name for name in ("accelerate", "transformers", "lightning") if importlib.util.find_spec(name)]
    parser.add_argument("frameworks", nargs="*", choices=(*CONTENDERS, []), default=installed)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("transformers", "accelerate", "lightning.pytorch", "milepost"):
        logging.getLogger(name).setLevel(logging.ERROR)
    args.folder.mkdir(parents=True, exist_ok=True)
    table = Table(
        "framework", "blocked: its own, s", "Milepost, s", "ratio", "until it is there: its own, s", "Milepost, s"
    )
    for name in args.frameworks:
        with tempfile.TemporaryDirectory(dir=args.folder) as work, CONTENDERS[name](Path(work), args.side) as (a, b):
            figures = measure({"stock": a, "ours": b}, Path(work), args.rounds)
        blocked, there = ([statistics.median(figures[who][n]) for who in ("stock", "ours")] for n in (0, 1))
        ratio = f"{blocked[0] / blocked[1]:.1f}x"
        table.add_row(name, *(f"{value:.3f}" for value in blocked), ratio, *(f"{value:.3f}" for value in there))
    Console().print(table)
    nbytes = 16 * args.side**2 * 12
    print(f"{nbytes / 1e6:.0f} MB a save, {args.rounds} rounds, medians; the first round is not counted")


def measure(saves: dict[str, Save], work: Path, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds blocked, and until the end, of each round but the first; contenders take turns."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in saves}
    for number in range(rounds + 1):
        for name, save in saves.items():
            started = time.perf_counter()
            wait = save(work / f"{name}-{number}")
            blocked = time.perf_counter() - started
            if callable(wait):
                wait()
            if number:
                found[name][0].append(blocked)
                found[name][1].append(time.perf_counter() - started)
        for name in saves:
            if number > 1:
                shutil.rmtree(work / f"{name}-{number - 1}", ignore_errors=True)
    return found


def trained(side: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(16)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, side)).sum().backward()
    optimizer.step()
    return model, optimizer


@contextmanager
def accelerate(work: Path, side: int) -> Iterator[tuple[Save, Save]]:
    """``save_state`` against ``CheckpointManager.save``."""
    from accelerate import Accelerator

    from milepost.integrations.accelerate import checkpoint_manager

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*trained(side))
    config = CheckpointConfig(enable=True, interval=1, async_mode="async", keep_latest_k=2)
    with checkpoint_manager(accelerator, work / "ours-0", config) as manager:
        steps = iter(range(1, 1000))

        def ours(folder: Path) -> Callable[[], None]:
            manager.save(next(steps))
            manager.maybe_wait_for_staging()
            return manager.maybe_wait_for_saving

        yield lambda folder: (accelerator.save_state(str(folder)), None)[1], ours


@contextmanager
def transformers(work: Path, side: int) -> Iterator[tuple[Save, Save]]:
    """The Trainer's own checkpoint against that of ``MilepostCallback``, called as the Trainer does."""
    from transformers import Trainer, TrainingArguments

    from milepost.integrations.transformers import MilepostCallback

    def trainer_in(folder: Path) -> Any:
        args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1)
        trainer = Trainer(trained(side)[0], args, train_dataset=[{"input": torch.ones(side)}])
        trainer.create_optimizer_and_scheduler(1)
        trainer.model_wrapped = trainer.model
        trainer.optimizer = trained_by(trainer.optimizer, trainer.model)
        return trainer

    stock = trainer_in(work / "stock")
    with_ours = trainer_in(work / "ours-0")
    with_ours._tr_loss, with_ours._globalstep_last_logged = torch.zeros(()), 0  # as its training loop does
    callback = MilepostCallback(with_ours)
    callback.on_train_begin(with_ours.args, with_ours.state, with_ours.control)

    def save(trainer: Any) -> None:
        trainer.state.global_step += 1
        trainer._save_checkpoint(trainer.model, trial=None)

    def ours(folder: Path) -> Callable[[], None]:
        save(with_ours)
        callback.manager.maybe_wait_for_staging()
        return callback.manager.maybe_wait_for_saving

    yield lambda folder: save(stock), ours
    callback.on_train_end(with_ours.args, with_ours.state, with_ours.control)


def trained_by(optimizer: Any, model: nn.Module) -> Any:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@contextmanager
def lightning(work: Path, side: int) -> Iterator[tuple[Save, Save]]:
    """``TorchCheckpointIO`` against ``MilepostCheckpointIO``, with the checkpoint that a Trainer hands them."""
    from lightning.fabric.plugins import TorchCheckpointIO

    from milepost.integrations.lightning import MilepostCheckpointIO

    model, optimizer = trained(side)
    checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 1}
    stock, ours = TorchCheckpointIO(), MilepostCheckpointIO()

    def save(folder: Path) -> Callable[[], None]:
        ours.save_checkpoint(dict(checkpoint), folder)
        return ours.teardown

    yield lambda folder: stock.save_checkpoint(checkpoint, str(folder)), save


@contextmanager
def torchtitan(work: Path, side: int) -> Iterator[tuple[Save, Save]]:
    """torchtitan's checkpoint manager against Milepost's, in its trainer with the debug model, both in mode async."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integrations"))
    import os

    from titan_run import make_trainer

    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29571",
    }
    options = {"async_mode": "async", "interval": 1, "last_save_model_only": False, "keep_latest_k": 2}
    trainers = {
        stock: make_trainer(str(work / f"titan-{stock}"), stock=stock, steps=1000, **options) for stock in (True, False)
    }
    for trainer in trainers.values():
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
    steps = {stock: iter(range(1, 1000)) for stock in trainers}

    def save(stock: bool) -> Callable[[], None]:
        checkpointer = trainers[stock].checkpointer
        checkpointer.save(next(steps[stock]))
        checkpointer.maybe_wait_for_staging()
        return checkpointer._wait_for_saving if not stock else lambda: checkpointer.save_future.result()

    yield lambda folder: save(True), lambda folder: save(False)
    for trainer in trainers.values():
        trainer.close()


CONTENDERS = {"accelerate": accelerate, "transformers": transformers, "lightning": lightning, "torchtitan": torchtitan}


if __name__ == "__main__":
    main()
