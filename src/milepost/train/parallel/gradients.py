"""The norm of the gradient over all meshes and stages, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["clip_gradients", "local_part", "squared_norm_share"]


def squared_norm_share(parameters: Iterable[nn.Parameter], tied: Tensor | None, device: torch.device) -> Tensor:
    """Return this rank's share of the squared gradient norm: summed over all ranks, each element counts once.

    An element that several ranks hold is counted by each in part; ``tied`` is held by a second pipeline stage too.
    """
    total = torch.zeros((), dtype=torch.float32, device=device)
    for parameter in parameters:
        if parameter.grad is not None:
            copies = num_copies(parameter) * (2 if parameter is tied else 1)
            total += local_part(parameter.grad).float().square().sum() / copies
    return total


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by ``max_norm / norm`` if ``norm`` is larger."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, scale)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor, sharing memory with it."""
    assert isinstance(tensor, DTensor), "fully_shard makes every parameter and gradient a DTensor"
    return tensor.to_local()


def num_copies(parameter: Tensor) -> int:
    """Return the number of ranks in the parameter's mesh that hold the same part of it."""
    assert isinstance(parameter, DTensor), "fully_shard makes every parameter and gradient a DTensor"
    copies = 1
    for axis, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            copies *= parameter.device_mesh.size(axis)
    return copies
