"""Qwen 3, dense and MoE: RMS-normed queries and keys, Hugging Face's order of the rotary pairs, and its tensor plan.

Parameter names are torchtitan's; the experts' weights are [experts, in, out].
"""

from __future__ import annotations

from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import PrepareModuleInput, SequenceParallel

from milepost.interop.names.model_sizes import ModelArgs
from milepost.train.models.decoder import Attention, Block, Decoder, FeedForward, TensorParallelPlan
from milepost.train.models.llama3 import dense_plan
from milepost.train.models.moe import MoE
from milepost.train.models.rope import rotate_halves

__all__ = ["Qwen3"]


class Qwen3(Decoder):
    """Tokens (B, T) to logits (B, T, V)."""

    @staticmethod
    def make_block(args: ModelArgs) -> Block:
        attention = Attention(args, rotate_halves, qk_norm=True)
        if args.moe is not None:
            return Block(args, attention, MoE(args.dim, args.moe))
        return Block(args, attention, FeedForward(args.dim, args.hidden_dim))

    @staticmethod
    def block_plan(args: ModelArgs) -> TensorParallelPlan:
        plan = dense_plan()
        # Queries and keys are (B, T, H / tp, D) here: the norms, of all heads alike, see a part of dim 2.
        plan["attention.q_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        plan["attention.k_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        if args.moe is not None:
            plan = {name: style for name, style in plan.items() if not name.startswith("feed_forward")}
            # Experts are not split by width: each rank routes its own positions to complete experts on any rank.
            plan["moe"] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Shard(1),), use_local_output=True
            )
            plan["moe.router.gate"] = SequenceParallel(use_local_output=True)
        return plan
