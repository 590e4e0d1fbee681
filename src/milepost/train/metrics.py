"""Metrics of a run: one log line every N steps, and the same values for TensorBoard."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milepost.errors import ConfigError
from milepost.train.config import MetricsConfig
from milepost.training.events import SaveEvent

log = logging.getLogger("milepost.train")

_SAVE_SECONDS = ("stall_s", "plan_s", "stage_s", "write_s", "commit_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """Metrics of one step."""

    step: int
    loss: float
    grad_norm: float
    lr: float


class Meter:
    """Log metrics; between two lines, measure tokens per second and the time blocked by checkpoints.

    ``tokens_per_step`` are those of the whole job. Only the process with ``writes_tensorboard`` writes files.
    """

    def __init__(
        self, config: MetricsConfig, *, tb_folder: Path, tokens_per_step: int, num_steps: int, writes_tensorboard: bool
    ):
        self._config = config
        self._tb_folder = tb_folder
        self._tokens_per_step = tokens_per_step
        self._num_steps = num_steps
        self._writes_tensorboard = config.enable_tensorboard and writes_tensorboard
        self._writer: Any = None
        self._measure_from(0, 0.0)

    def start(self, *, step: int, blocked_s: float) -> None:
        """Begin after ``step`` steps, when checkpoints have blocked training for ``blocked_s`` seconds."""
        self._measure_from(step, blocked_s)
        if self._writes_tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

            # Drop values that an earlier start wrote after the step resumed from.
            try:
                self._writer = SummaryWriter(str(self._tb_folder), purge_step=step + 1)
            except OSError as error:
                raise ConfigError(
                    f"metrics.save_tb_folder: {self._tb_folder} can't be written: {error.strerror or error}"
                ) from error

    def _measure_from(self, step: int, blocked_s: float) -> None:
        self._since_step, self._since_s, self._since_blocked_s = step, time.perf_counter(), blocked_s

    def log(self, figures: StepFigures, *, blocked_s: float) -> None:
        """Log the metrics of a step, if it is due.

        ``blocked_s`` is the running total of seconds blocked by checkpoints.
        """
        step = figures.step
        if not (step == 1 or step == self._num_steps or step % self._config.log_freq == 0):
            return
        elapsed_s = time.perf_counter() - self._since_s
        blocked_since_s = blocked_s - self._since_blocked_s
        training_s = max(elapsed_s - blocked_since_s, 1e-9)
        tokens_per_s = (step - self._since_step) * self._tokens_per_step / training_s
        memory_gib = peak_memory_bytes() / 2**30
        log.info(
            f"step {step}/{self._num_steps}  loss {figures.loss:.4f}  grad_norm {figures.grad_norm:.3f}  "
            f"lr {figures.lr:.2e}  tokens/s {tokens_per_s:,.0f}  memory {memory_gib:.2f} GiB  "
            f"blocked by checkpoints {blocked_since_s:.2f} s"
        )
        self._write(
            step,
            {
                "loss": figures.loss,
                "grad_norm": figures.grad_norm,
                "lr": figures.lr,
                "tokens_per_s": tokens_per_s,
                "memory_gib": memory_gib,
                "checkpoint/blocked_s": blocked_since_s,
            },
        )
        self._measure_from(step, blocked_s)

    def log_saves(self, events: Sequence[SaveEvent]) -> None:
        """Write the times of committed saves for TensorBoard; the manager has logged them already."""
        for event in events:
            seconds = {f"checkpoint/{name}": getattr(event, name) for name in _SAVE_SECONDS}
            self._write(event.step, {**seconds, "checkpoint/nbytes": event.nbytes})

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def peak_memory_bytes() -> int:
    """Return the peak memory use so far: reserved on this rank's GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
