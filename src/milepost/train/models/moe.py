"""The mixture of experts: a router sends each token to its top-k experts, whose outputs it mixes.

Nothing in this module depends on ranks. Under expert parallelism `MoE.exchange` sends rows to the ranks that hold their
experts and back; under sequence or context parallelism `MoE.sum_over_sequence` sums per-sequence counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from milepost.interop.names.model_sizes import MoEArgs

__all__ = ["Exchange", "Experts", "MoE", "Router"]

Exchange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]
"""(rows grouped by expert, rows per expert) -> the same two for the experts held here, and the function that returns
outputs."""


class Router(nn.Module):
    """Scores of every expert for every token."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (B, T, E), in float32, of the experts for tokens ``x`` (B, T, C)."""
        return F.softmax(self.gate(x).float(), dim=-1)


class Experts(nn.Module):
    """SwiGLU feed-forwards side by side: every weight is one parameter [experts, in, out]."""

    def __init__(self, dim: int, args: MoEArgs):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(args.num_experts, dim, args.hidden_dim))
        self.w2 = nn.Parameter(torch.empty(args.num_experts, args.hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(args.num_experts, dim, args.hidden_dim))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """``rows`` (R, C), grouped by expert, of which the i-th expert held here takes ``counts[i]``."""
        if len(rows) == 0:
            # No token chose an expert held here. The kernel rejects empty input, but this rank must take part in the
            # backward pass and its collectives: pass one zero row, which belongs to no group.
            return self.forward(F.pad(rows, (0, 0, 0, 1)), counts)[:0]
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.w2, self.w3))
        ends = counts.cumsum(0).to(torch.int32)
        hidden = F.silu(F.grouped_mm(rows, w1, offs=ends)) * F.grouped_mm(rows, w3, offs=ends)
        return F.grouped_mm(hidden, w2, offs=ends)


class MoE(nn.Module):
    """Top-k routing with normalised weights, and the load-balancing loss.

    The balancing loss is taken per sequence (as in DeepSeek-V3, arXiv 2412.19437, section 2.1.2), for E experts ``E *
    sum_e share of the choices that went to e * mean probability of e``, 1 when all are used alike. Per sequence,
    because the degrees determine how a batch is cut into microbatches and ranks, and the loss must not depend on them.
    Its gradient is added here and not at the end of the model, so that every pipeline stage handles its own layers.
    """

    def __init__(self, dim: int, args: MoEArgs):
        super().__init__()
        self.args = args
        self.router = Router(dim, args.num_experts)
        self.experts = Experts(dim, args)
        self.exchange: Exchange = _stay
        self.sum_over_sequence: Callable[[Tensor], Tensor] = _as_is
        self.balance_scale = 0.0
        """Factor of a sequence's balancing loss, including the trainer's normalisation."""
        self.balance_loss: Tensor | None = None
        """This rank's part of the (scaled) balancing loss of the backward passes since it was last None, 0-d."""

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.router(x)  # (B, T, E)
        weights, chosen = probabilities.topk(self.args.top_k, dim=-1)  # (B, T, K)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training and torch.is_grad_enabled():
            weights = _JoinLoss.apply(weights, self._balance_loss(probabilities, chosen), self)
        order = chosen.flatten().argsort(stable=True)  # (B * T * K,), grouped by expert
        rows = x.flatten(0, 1)[order // self.args.top_k]
        counts = torch.bincount(chosen.flatten(), minlength=self.args.num_experts)
        rows, counts, back = self.exchange(rows, counts)
        out = back(self.experts(rows, counts))
        out = out[order.argsort()].view(*weights.shape, -1)  # (B, T, K, C)
        return (out * weights.unsqueeze(-1)).sum(dim=-2).type_as(x)

    def _balance_loss(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """This rank's part of the (scaled) balancing loss of its sequences."""
        counts = F.one_hot(chosen, self.args.num_experts).sum(dim=(1, 2)).float()  # (B, E)
        # Choices are counted over the whole sequence; probabilities enter linearly, so each rank adds its own tokens'.
        counts = self.sum_over_sequence(counts)
        num_choices = counts.sum(dim=-1, keepdim=True)
        share = counts / num_choices
        probability = probabilities.sum(dim=1) / (num_choices / self.args.top_k)
        return (share * probability).sum() * self.args.num_experts * self.balance_scale


class _JoinLoss(torch.autograd.Function):
    """Passes ``x`` through; in the backward pass adds ``loss`` to the model's (gradient one) and records it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, moe: MoE) -> Tensor:
        ctx.moe, ctx.loss = moe, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # Recorded here and not in the forward pass, which runs twice under activation checkpointing.
        noted = ctx.moe.balance_loss
        ctx.moe.balance_loss = ctx.loss if noted is None else noted + ctx.loss
        return grad, torch.ones_like(ctx.loss), None


def _stay(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The identity exchange, for a rank that holds all experts."""
    return rows, counts, _as_is


def _as_is(x: Tensor) -> Tensor:
    return x
