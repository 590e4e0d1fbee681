"""Expert parallelism: experts sharded over a mesh, and tokens sent to them and back by all-to-all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from milepost.train.models.decoder import Decoder
from milepost.train.parallel.meshes import Meshes

__all__ = ["apply_expert_parallel"]


def apply_expert_parallel(part: Decoder, meshes: Meshes) -> None:
    """Give each rank of the expert mesh an equal run of every layer's experts.

    If ranks hold parts of sequences, also count the choices of experts over complete sequences.
    """
    for moe in part.mixtures():
        moe.sum_over_sequence = _sequence_sum(meshes)
        if meshes.degrees.expert_parallel_degree > 1:
            moe.exchange = TokenExchange(meshes.expert)
            for name, weight in list(moe.experts.named_parameters()):
                # On the meta device nothing is sent.
                dealt = distribute_tensor(weight, meshes.expert, [Shard(0)], src_data_rank=None)
                moe.experts.register_parameter(name, nn.Parameter(dealt))


def _sequence_sum(meshes: Meshes) -> Callable[[Tensor], Tensor]:
    """Return a function that sums counts over the ranks that hold stretches of the same sequences."""
    groups = []
    if meshes.degrees.context_parallel_degree > 1:
        groups.append(meshes.context_group)
    if meshes.degrees.tensor_parallel_degree > 1:
        groups.append(meshes.tensor.get_group())

    def add_up(counts: Tensor) -> Tensor:
        for group in groups:
            dist.all_reduce(counts, group=group)
        return counts

    return add_up


class TokenExchange:
    """Sends each row to the rank that holds its expert; called by all ranks of ``mesh`` together.

    Takes rows (R, C) grouped by expert, and the number of rows of each expert (E,). Returns the rows received, grouped
    by local expert, the number of rows of each of these (E / ep,), and a function that sends the outputs back, in the
    order of the original rows.
    """

    def __init__(self, mesh: DeviceMesh):
        self.group = mesh.get_group()
        self.size = mesh.size()

    def __call__(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        outgoing = counts.view(self.size, -1)  # (ep, E / ep): how many of my rows go to each expert of each rank
        incoming = torch.empty_like(outgoing)  # (ep, E / ep): how many rows of each rank come to each of my experts
        dist.all_to_all_single(incoming, outgoing.contiguous(), group=self.group)
        sent, received = outgoing.sum(dim=1).tolist(), incoming.sum(dim=1).tolist()

        arrived = _AllToAll.apply(rows, received, sent, self.group)
        local_experts = torch.arange(incoming.shape[1], device=rows.device).repeat(self.size)
        by_expert = local_experts.repeat_interleave(incoming.flatten()).argsort(stable=True)

        def back(out: Tensor) -> Tensor:
            return _AllToAll.apply(out[by_expert.argsort()], sent, received, self.group)

        return arrived[by_expert], incoming.sum(dim=0), back


class _AllToAll(torch.autograd.Function):
    """Sends ``sent[r]`` rows to each rank r and receives ``received[r]`` from it; gradients flow the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        arrived = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = grad.new_empty(sum(ctx.sent), grad.shape[1])
        dist.all_to_all_single(back, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return back, None, None, None
