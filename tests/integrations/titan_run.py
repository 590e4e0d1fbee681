"""Trains torchtitan's debug model on CPUs for some steps, with its own checkpoints or with Milepost's."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from dataclasses import dataclass
from typing import Any

import titan_shim as shim  # first: torchtitan asks for a device when it is imported
import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from milepost.integrations.torchtitan import with_milepost


class Letters(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str):
        super().__init__()
        self.eos_id = 0

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return [ord(letter) for letter in args[0]]

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return "".join(map(chr, args[0]))

    def get_vocab_size(self) -> int:
        return 2048


class Numbers(torch.utils.data.IterableDataset):
    """Random sequences by their number, with a state."""

    def __init__(self, rank: int, world_size: int, seq_len: int):
        self.next, self.rank, self.world_size, self.seq_len = 0, rank, world_size, seq_len

    def __iter__(self) -> Any:
        while True:
            seed = self.next * self.world_size + self.rank
            self.next += 1
            ids = torch.randint(0, 2048, (self.seq_len + 1,), generator=torch.Generator().manual_seed(seed))
            yield {"input": ids[:-1], "positions": torch.arange(self.seq_len)}, ids[1:]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class NumbersLoader(ParallelAwareDataloader):
    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        dataset: str = "numbers"

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ):
        data = Numbers(dp_rank, dp_world_size, seq_len)
        super().__init__(data, dp_rank=dp_rank, dp_world_size=dp_world_size, batch_size=local_batch_size)


def train(
    folder: str, *, stock: bool = False, steps: int = 6, kill_at: int = 0, tp: int = 1, **checkpoint: Any
) -> dict[str, Any]:
    """Train up to ``steps``: each loss, and digests of every parameter, of the optimizer's state and the schedule.

    Args:
        stock: with torchtitan's own checkpoint manager.
        kill_at: die at the beginning of this step.
        checkpoint: options of ``[checkpoint]``.
    """
    trainer = make_trainer(folder, stock=stock, steps=steps, tp=tp, **checkpoint)
    losses: list[tuple[int, float]] = []
    log = trainer.metrics_processor.log

    def keep(step: int, loss: float, *args: Any, **kwargs: Any) -> None:
        losses.append((step, float(loss)))
        log(step, loss, *args, **kwargs)

    trainer.metrics_processor.log = keep
    train_step = trainer.train_step

    def step(iterator: Any) -> None:
        if trainer.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(iterator)

    trainer.train_step = step
    try:
        trainer.train()
    except Exception:
        trainer.close()
        raise
    trainer.close()
    return {
        "losses": losses,
        "model": digests(trainer),
        "optimizer": digest(trainer.optimizers.state_dict()),
        "schedule": trainer.lr_schedulers.state_dict(),
        "step": trainer.step,
        "steps_of_optimizer": steps_of(trainer.optimizers.state_dict()),
    }


def make_trainer(folder: str, *, stock: bool, steps: int, tp: int = 1, **checkpoint: Any) -> Trainer:
    """A trainer of the debug model."""
    shim.attend_on_cpu()
    logging.disable(logging.INFO)
    config = llama3_debugmodel()
    config.dump_folder = folder
    config.tokenizer, config.dataloader = Letters.Config(), NumbersLoader.Config()
    config.training.local_batch_size, config.training.seq_len = 2, 32
    config.training.steps, config.training.disable_cuda_graphs = steps, True
    config.training.mixed_precision_param = "float32"
    config.optimizer.implementation = "foreach"
    config.lr_scheduler.total_steps = 100
    config.validator.enable = False
    config.parallelism.spmd_backend = "partial_dtensor"
    config.parallelism.tensor_parallel_degree = tp
    config.debug.seed, config.debug.deterministic = 7, True
    config.comm.trace_buf_size = 0
    if not stock:
        config = with_milepost(config)
    for name, value in {"enable": True, "interval": 2, "keep_latest_k": 2, **checkpoint}.items():
        setattr(config.checkpoint, name, value)
    return config.build()


def steps_of(state: dict[str, Any]) -> set[float]:
    """Return the optimizer's step counts of all parameters."""
    return {float(value) for key, value in state.items() if key.startswith("state.") and key.endswith(".step")}


def digests(trainer: Trainer) -> dict[str, str]:
    return {name: digest({"": value}) for part in trainer.model_parts for name, value in part.state_dict().items()}


def digest(state: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        value = value.full_tensor() if isinstance(value, DTensor) else value
        data = (
            value.detach().contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        )
        found.update(key.encode() + data)
    return found.hexdigest()
