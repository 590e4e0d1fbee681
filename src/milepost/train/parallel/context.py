"""Context parallelism: each rank holds one stretch of every sequence and attends over the keys of all before it.

Keys and values are gathered over the mesh before attention and their gradients scattered back after it. That equals
ring attention in result, needs no special kernel (there is none for CPU), and costs the memory of one layer's keys and
values for the whole sequence, which grouped-query attention keeps small. (Llama 3's pre-training did the same: arXiv
2407.21783, section 3.3.2.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from milepost.train.models.decoder import Decoder
from milepost.train.parallel.meshes import Meshes

__all__ = ["apply_context_parallel", "local_stretch"]


def apply_context_parallel(part: Decoder, meshes: Meshes) -> None:
    """Make ``part`` compute this rank's stretch of its sequences, which have ``part.seq_len`` tokens over all ranks."""
    part.first_position = meshes.cp_rank * (part.seq_len // meshes.degrees.context_parallel_degree)
    for block in part.blocks():
        block.attention.core = GatheredAttention(meshes.context_group)


def local_stretch(batch: Tensor, meshes: Meshes) -> Tensor:
    """Return this rank's columns of ``batch`` (B, sequence); all of them without context parallelism."""
    return batch.chunk(meshes.degrees.context_parallel_degree, dim=1)[meshes.cp_rank]


class GatheredAttention(nn.Module):
    """Causal attention of this rank's queries over the keys of its own stretch and all earlier ones."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` (B, H, T, D), ``k`` and ``v`` (B, H_kv, T, D), with T this rank's; returns (B, H, T, D)."""
        length = q.shape[2]
        visible = length * (self.group.rank() + 1)
        k, v = _GatherSequence.apply(torch.stack((k, v)), self.group)[:, :, :, :visible]  # (B, H_kv, visible, D) each
        # The queries are the last of the visible positions, so the causal mask's diagonal ends in the lower right.
        mask = torch.ones(length, visible, dtype=torch.bool, device=q.device).tril(visible - length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


class _GatherSequence(torch.autograd.Function):
    """Gather (..., T, D) of each rank into (..., ranks * T, D) on all; gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        part = x.contiguous()
        whole = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(whole, part, group=group)
        return torch.cat(whole, dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = [part.contiguous() for part in grad.chunk(ctx.group.size(), dim=-2)]
        part = torch.empty_like(parts[0])
        dist.reduce_scatter(part, parts, group=ctx.group)
        return part, None
