"""Hugging Face Accelerate: a ``CheckpointManager`` of everything that an ``Accelerator`` prepared or registered."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from milepost.config import CheckpointConfig
from milepost.errors import ConfigError
from milepost.training.manager import CheckpointManager

KINDS_OF_THEIR_OWN = ("DEEPSPEED", "MEGATRON_LM", "XLA")
"""Engines that keep models and optimizers in their own forms."""


def checkpoint_manager(
    accelerator: Accelerator,
    folder: str | PathLike[str],
    config: CheckpointConfig | None = None,
    *,
    train_state: Any = None,
    layout: Mapping[str, int] | None = None,
) -> CheckpointManager:
    """Return a manager of everything passed to ``accelerator.prepare()`` and ``register_for_checkpointing()`` so far.

    That is: models, optimizers, schedulers, data loaders with a state (``use_stateful_dataloader``), the gradient
    scaler and the registered objects, in the given order.

    Args:
        train_state: see :class:`milepost.CheckpointManager`.
        layout: degrees of parallelism by name; by default the number of processes.

    Raises:
        ConfigError: no model was prepared, or DeepSpeed, Megatron-LM or XLA trains it.
    """
    kind = accelerator.distributed_type.value
    if kind in KINDS_OF_THEIR_OWN:
        raise ConfigError(f"checkpoint_manager does not support {kind}; use its own checkpoints")
    models = list(accelerator._models)
    if not models:
        raise ConfigError("the Accelerator has no model: call accelerator.prepare() before checkpoint_manager()")
    states = {f"custom{number}": registered for number, registered in enumerate(accelerator._custom_objects)}
    if accelerator.scaler is not None:
        states["scaler"] = accelerator.scaler
    loaders = [loader for loader in accelerator._dataloaders if getattr(loader, "use_stateful_dataloader", False)]
    return CheckpointManager(
        folder,
        config,
        model=models[0] if len(models) == 1 else nn.ModuleDict({f"model{n}": model for n, model in enumerate(models)}),
        optimizer=[unwrapped(optimizer) for optimizer in accelerator._optimizers],
        lr_scheduler=list(accelerator._schedulers),
        dataloader=_Several(loaders) if loaders else None,
        train_state=train_state,
        states=states,
        layout=layout if layout is not None else {"dp": accelerator.num_processes},
    )


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer inside Accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, Optimizer):
        return optimizer
    raise ConfigError(f"expected a torch optimizer, found {type(optimizer).__name__}")


class _Several:
    """Combines the states of several data loaders."""

    def __init__(self, loaders: list[Any]):
        self._loaders = loaders

    def state_dict(self) -> dict[str, Any]:
        return {str(number): loader.state_dict() for number, loader in enumerate(self._loaders)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for number, loader in enumerate(self._loaders):
            loader.load_state_dict(state[str(number)])
