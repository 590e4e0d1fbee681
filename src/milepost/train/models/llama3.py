"""Llama 3, 3.1 and 3.2: the decoder with interleaved rotary pairs, and how it is split over a tensor-parallel mesh.

Parameter names and the order of the rotary pairs are Meta's, so the same weights run in torchtitan and torchtune.
"""

from __future__ import annotations

from milepost.train.models.decoder import Attention, Block, Decoder, FeedForward
from milepost.train.models.flavors import ModelArgs
from milepost.train.models.rope import rotate_interleaved

__all__ = ["Llama3"]


class Llama3(Decoder):
    """Tokens (B, T) to logits (B, T, V)."""

    def __init__(self, args: ModelArgs, seq_len: int):
        super().__init__(args, seq_len, _block)


def _block(args: ModelArgs) -> Block:
    attention = Attention(args, rotate_interleaved, qk_norm=False)
    return Block(args, attention, feed_forward=FeedForward(args.dim, args.hidden_dim))
