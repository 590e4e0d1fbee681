"""The decoder-only transformer that Llama 3 and Qwen 3 share: attention, SwiGLU, blocks, and the stack.

Shapes: B batch, T (local) sequence, C model width, H heads, D head width, V vocabulary. Under a parallelism each rank
sees its part of T, H or V; nothing in this module depends on ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from milepost.interop.names.model_sizes import ModelArgs
from milepost.parallelism.placement import Stage
from milepost.train.models.moe import MoE
from milepost.train.models.rope import rope_table

__all__ = ["Attention", "Block", "CausalAttention", "Decoder", "FeedForward", "TensorParallelPlan", "TiedOutput"]

TensorParallelPlan = dict[str, ParallelStyle]
Rotation = Callable[[Tensor, Tensor], Tensor]


class CausalAttention(nn.Module):
    """Softmax attention of each query over the keys up to its own position. Context parallelism replaces it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` (B, H, T, D), ``k`` and ``v`` (B, H_kv, T, D); returns (B, H, T, D)."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; with ``qk_norm``, queries and keys are RMS-normed per head."""

    def __init__(self, args: ModelArgs, rotate: Rotation, *, qk_norm: bool):
        super().__init__()
        self.head_dim = args.head_dim
        self.rotate = rotate
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.q_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps) if qk_norm else None
        self.core: nn.Module = CausalAttention()

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        # Infer the number of heads from the projections: under tensor parallelism a rank holds only some.
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, T, H, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = rope[: q.shape[1]]
        q, k = self.rotate(q, rope), self.rotate(k, rope)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, H, T, D)
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One pre-norm layer: attention, then the feed-forward or, in its place, the mixture of experts."""

    def __init__(self, args: ModelArgs, attention: Attention, ffn: FeedForward | MoE):
        super().__init__()
        self.attention = attention
        # Different attributes, so that the weights' names tell the two apart.
        self.feed_forward = ffn if isinstance(ffn, FeedForward) else None
        self.moe = ffn if isinstance(ffn, MoE) else None
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.recompute = False
        """Keep only the block's input for the backward pass and recompute the rest (activation checkpointing)."""

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """``x`` (B, T, C); ``rope`` holds the angles of its positions and may hold those of later ones."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, rope, use_reentrant=False)
        return self._forward(x, rope)

    def _forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        ffn = self.feed_forward if self.moe is None else self.moe
        assert ffn is not None
        return x + ffn(self.ffn_norm(x))


class TiedOutput(nn.Module):
    """The output projection that reuses the embedding matrix: a module without weights, so that it is stored once."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class Decoder(nn.Module, ABC):
    """Tokens (B, T) to logits (B, T, V); after `keep_stage`, only the part that one pipeline stage computes."""

    rope: Tensor

    def __init__(self, args: ModelArgs, seq_len: int):
        super().__init__()
        self.args = args
        self.seq_len = seq_len
        self.first_position = 0
        """The global position of the first token that this rank sees; context parallelism sets it."""
        self.embeds = True
        self.projects = True
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): self.make_block(args) for i in range(args.n_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output: nn.Module | None = (
            TiedOutput() if args.tied_embeddings else nn.Linear(args.dim, args.vocab_size, bias=False)
        )
        # Not in the state dict: it follows from the configuration. `reset_buffers` fills it after the move from meta.
        self.register_buffer("rope", rope_table(args, seq_len), persistent=False)

    @staticmethod
    @abstractmethod
    def make_block(args: ModelArgs) -> Block:
        """One layer of the model."""

    @staticmethod
    @abstractmethod
    def block_plan(args: ModelArgs) -> TensorParallelPlan:
        """The tensor-parallel plan of one layer, by module name within the layer."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is tokens (B, T) for a stage with the embedding, else hidden states (B, T, C)."""
        rope = self.rope[self.first_position :]
        h = self._embed(x) if self.embeds else x  # (B, T, C)
        for block in self.blocks():
            h = block(h, rope)
        return self._project(h) if self.projects else h

    def _embed(self, tokens: Tensor) -> Tensor:
        assert self.tok_embeddings is not None, "keep_stage leaves it wherever `embeds`"
        return self.tok_embeddings(tokens)

    def _project(self, h: Tensor) -> Tensor:
        assert self.norm is not None, "keep_stage leaves it wherever `projects`"
        assert self.output is not None, "keep_stage leaves it wherever `projects`"
        h = self.norm(h)
        if not self.args.tied_embeddings:
            return self.output(h)  # (B, T, V)
        assert self.tok_embeddings is not None, "keep_stage leaves it on the last stage if tied"
        return self.output(h, self.tok_embeddings.weight)  # (B, T, V)

    def blocks(self) -> list[Block]:
        """The layers held here, in order."""
        return [cast(Block, block) for block in self.layers.values()]

    def mixtures(self) -> list[MoE]:
        """Their mixtures of experts."""
        return [block.moe for block in self.blocks() if block.moe is not None]

    def tensor_parallel_plan(self) -> TensorParallelPlan:
        """The tensor-parallel plan of the full model, by module name, independent of the layers on this rank."""
        plan: TensorParallelPlan = {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1)),
        }
        if self.args.tied_embeddings:
            plan["output"] = PrepareModuleInputOutput(
                input_layouts=(Shard(1), None),
                desired_input_layouts=(Replicate(), None),
                output_layouts=Shard(-1),
                desired_output_layouts=Shard(-1),
            )
        for name in self.layers:
            plan |= {f"layers.{name}.{module}": style for module, style in self.block_plan(self.args).items()}
        return plan

    def keep_stage(self, stage: Stage) -> None:
        """Drop all modules that ``stage`` does not hold; the others keep their names."""
        self.layers = nn.ModuleDict({name: block for name, block in self.layers.items() if int(name) in stage.layers})
        self.embeds, self.projects = stage.is_first, stage.is_last
        if not stage.holds("tok_embeddings.weight"):
            self.tok_embeddings = None
        if not stage.holds("output.weight"):
            self.norm = self.output = None

    def reset_buffers(self) -> None:
        """Recompute the buffers on their current device, in float32 regardless of the weights' dtype."""
        self.rope = rope_table(self.args, self.seq_len, self.rope.device)
