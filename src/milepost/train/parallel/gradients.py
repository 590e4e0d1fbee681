"""The norm of the gradient over all meshes and stages, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["clip_gradients", "squared_norm_share"]


def squared_norm_share(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """This rank's share of the squared gradient norm: summed over all ranks, each gradient element counts once.

    A shard that several ranks hold (replicas) is counted by each of them in part.
    """
    total = torch.zeros((), dtype=torch.float32, device=device)
    for parameter in parameters:
        if parameter.grad is not None:
            total += local_tensor(parameter.grad).float().square().sum() / num_copies(parameter)
    return total


def clip_gradients(parameters: list[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scales all gradients by ``max_norm / norm`` where ``norm`` is larger."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, scale)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, sharing memory with it; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_copies(parameter: Tensor) -> int:
    """How many ranks of the parameter's mesh hold the same part of it."""
    if not isinstance(parameter, DTensor):
        return dist.get_world_size()
    copies = 1
    for axis, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            copies *= parameter.device_mesh.size(axis)
    return copies
