"""Llama 3, 3.1 and 3.2: the decoder with interleaved rotary pairs, and its tensor-parallel plan.

Parameter names and the order of the rotary pairs are Meta's, so the same weights run in torchtitan and torchtune.
"""

from __future__ import annotations

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

from milepost.interop.names.model_sizes import ModelArgs
from milepost.parallelism.placement import LAYER_SPLITS
from milepost.train.models.decoder import Attention, Block, Decoder, FeedForward, TensorParallelPlan
from milepost.train.models.rope import rotate_interleaved

__all__ = ["Llama3", "dense_plan"]


class Llama3(Decoder):
    """Tokens (B, T) to logits (B, T, V)."""

    @staticmethod
    def make_block(args: ModelArgs) -> Block:
        attention = Attention(args, rotate_interleaved, qk_norm=False)
        return Block(args, attention, FeedForward(args.dim, args.hidden_dim))

    @staticmethod
    def block_plan(args: ModelArgs) -> TensorParallelPlan:
        return dense_plan()


def dense_plan() -> TensorParallelPlan:
    """Heads and hidden width are split; norms and the residual stream hold 1/tp of the positions, ``Shard(1)``."""
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    } | {
        module: ColwiseParallel() if dim == 0 else RowwiseParallel(output_layouts=Shard(1))
        for module, dim in LAYER_SPLITS.items()
    }
