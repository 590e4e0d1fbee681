"""Estimate the memory in which this rank's saves are staged, before the first save is planned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from milepost.format.record import tensor_record
from milepost.tensors.layout import dtype_name
from milepost.tensors.plan import LARGE_ALIGNMENT, LARGE_RECORD_NBYTES, SMALL_ALIGNMENT, align

_OTHER_NBYTES = 1 << 20
"""Allowance for random generators, counters and other small tensors of a training state."""
_UNEVEN = 1.02
"""Allowance for replicas that are not dealt out evenly among their ranks."""


def staging_nbytes(
    modules: Sequence[nn.Module], optimizers: Sequence[Optimizer], num_replicas: int, *, only_trainable: bool = False
) -> int:
    """Estimate the bytes that this rank will write of these modules' and optimizers' tensors, as they are now.

    Args:
        num_replicas: number of ranks that share the writing of tensors that are not DTensors.
        only_trainable: leave out frozen parameters.
    """
    total = 0.0
    for tensor in {id(tensor): tensor for tensor in _tensors(modules, optimizers, only_trainable)}.values():
        local, copies = tensor, num_replicas
        if isinstance(tensor, DTensor):
            sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
            local, copies = tensor._local_tensor, math.prod(size for size, where in sizes if where.is_replicate())
        layout = tensor_record(dtype_name(local.dtype), tuple(local.shape))
        large = layout.data_nbytes >= LARGE_RECORD_NBYTES
        total += align(layout.nbytes, LARGE_ALIGNMENT if large else SMALL_ALIGNMENT) / copies
    return align(int(total * (1 if num_replicas == 1 else _UNEVEN)) + _OTHER_NBYTES, LARGE_ALIGNMENT)


def _tensors(
    modules: Sequence[nn.Module], optimizers: Sequence[Optimizer], only_trainable: bool
) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from (p for p in module.parameters() if p.requires_grad or not only_trainable)
        yield from module.buffers()
    for optimizer in optimizers:
        for entry in optimizer.state.values():
            values = entry.values() if isinstance(entry, Mapping) else ()
            yield from (value for value in values if isinstance(value, torch.Tensor))
