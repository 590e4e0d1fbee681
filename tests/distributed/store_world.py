"""Two ranks on a store, in a process of their own: ranks are forks, and a process that has used a store must not fork.

python store_world.py URL SCRATCH     prints what the world's ranks return, as JSON
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import milepost
from milepost.testing.world import run_world
from milepost.train.loop import Trainer
from milepost.train.options import load_config


def train(*flags: str) -> list[float]:
    """The losses of a run of the debug model."""
    options = {
        "training.seq_len": 32,
        "training.local_batch_size": 4,
        "training.mixed_precision_param": "float32",
        "metrics.log_freq": 1,
        "checkpoint.interval": 1,
    }
    argv = [f"--{name}={value}" for name, value in options.items()]
    trainer = Trainer(load_config([*argv, "--checkpoint.enable", *flags], dist.get_world_size()))
    losses: list[float] = []
    log = trainer.meter.log

    def watched(figures: Any, **rest: Any) -> None:
        losses.append(figures.loss)
        log(figures, **rest)

    trainer.meter.log = watched  # type: ignore[method-assign]
    trainer.run()
    return losses


def training(url: str, scratch: str) -> dict[str, list[float]]:
    """A run on the store from its first step to Hugging Face files, then one that starts from these."""
    assets = f"--model.hf_assets_path={os.environ['ASSETS']}"
    run = (f"--checkpoint.folder={url}/run", f"--job.dump_folder={scratch}/run", assets)
    start = (f"--checkpoint.folder={url}/next", f"--checkpoint.initial_load_path={url}/run/step-3")
    return {
        "begun": train(*run, "--training.steps=1", "--checkpoint.last_save_model_only=false"),
        "resumed": train(
            *run, "--training.steps=3", "--checkpoint.last_save_in_hf", "--checkpoint.async_mode=async_with_pinned_mem"
        ),
        "from_hf": train(
            *(*start, "--checkpoint.initial_load_in_hf", "--checkpoint.async_mode=async"),
            *(assets, f"--job.dump_folder={scratch}/run", "--training.steps=1"),
        ),
    }


def state() -> dict[str, Any]:
    """Of this rank."""
    torch.manual_seed(dist.get_rank())
    return {f"part-{dist.get_rank()}": torch.rand(64, 8), "shared": torch.arange(6.0), "n": 3}


def functions(url: str) -> dict[str, bool]:
    """``save``, ``load``, ``async_save``, and DCP with Milepost's reader and writer."""
    saved = state()

    def holds(path: str) -> bool:
        loaded = {key: torch.zeros_like(value) if torch.is_tensor(value) else 0 for key, value in saved.items()}
        milepost.load(path, loaded)
        return all(torch.equal(torch.as_tensor(loaded[key]), torch.as_tensor(saved[key])) for key in saved)

    milepost.save(f"{url}/saved", saved)
    milepost.async_save(f"{url}/async", saved).result()
    dcp.save(saved, storage_writer=milepost.StorageWriter(f"{url}/dcp"))
    loaded = {key: torch.zeros_like(value) for key, value in saved.items() if torch.is_tensor(value)}
    dcp.load(loaded, storage_reader=milepost.StorageReader(f"{url}/saved"))
    return {
        "save": holds(f"{url}/saved"),
        "async_save": holds(f"{url}/async"),
        "writer": holds(f"{url}/dcp"),
        "reader": all(torch.equal(loaded[key], saved[key]) for key in loaded),
    }


def everything(url: str, scratch: str) -> dict[str, Any]:
    """All of the above."""
    return {"functions": functions(url), "training": training(url, scratch)}


if __name__ == "__main__":
    print(json.dumps(run_world(everything, 2, *sys.argv[1:], timeout_s=150)))
