"""Optimizers, and the learning rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from milepost.train.config import LRSchedulerConfig, OptimizerConfig


def build_optimizers(parts: Sequence[nn.Module], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Build one optimizer for each model part of this rank (a pipeline rank may hold several stages)."""
    cls = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[config.name]
    return [
        cls(
            [p for p in part.parameters() if p.requires_grad],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        for part in parts
    ]


def lr_factor(step: int, num_steps: int, config: LRSchedulerConfig) -> float:
    """Return the factor of ``optimizer.lr`` in ``step``, counted from 1: warm-up, stable, decay (WSD).

    The warm-up rises to 1 at ``warmup_steps``; the decay ends at ``min_lr_factor`` in the last step. Without a
    ``decay_ratio`` there is no stable phase: the decay follows the warm-up. A warm-up longer than the run is cut to it.
    The shapes are those of torchtitan's scheduler ("sqrt": Hägele et al., 2024, "1-sqrt").
    """
    warmup_steps = min(config.warmup_steps, num_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    decay_steps = num_steps - warmup_steps
    if config.decay_ratio is not None:
        decay_steps = min(decay_steps, round(num_steps * config.decay_ratio))
    stable_until = num_steps - decay_steps
    if step <= stable_until:
        return 1.0
    progress = (step - stable_until) / decay_steps if step < num_steps else 1.0
    shape = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.decay_type]
    return config.min_lr_factor + (1 - config.min_lr_factor) * shape


class LRSchedule:
    """Set the learning rate of every optimizer for the next step. The state is the number of steps done."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], *, lr: float, num_steps: int, config: LRSchedulerConfig
    ):
        self._optimizers = optimizers
        self._lr = lr
        self._num_steps = num_steps
        self._config = config
        self.last_epoch = 0  # torch's name for the number of steps done, also used by other programs' checkpoints
        self.apply()

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._lr * lr_factor(self.last_epoch + 1, self._num_steps, self._config)

    def step(self) -> None:
        """Count an optimizer step."""
        self.last_epoch += 1
        self.apply()

    def apply(self) -> None:
        """Set the learning rate of the next step and its base value, as torch's schedules do."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
                group["initial_lr"] = self._lr

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after ``last_epoch`` steps, with the schedule of the current options."""
        self.last_epoch = int(state["last_epoch"])
        self.apply()
