"""Qwen 3, dense: the decoder with RMS-normed queries and keys and Hugging Face's order of the rotary pairs."""

from __future__ import annotations

from milepost.train.models.decoder import Attention, Block, Decoder, FeedForward
from milepost.train.models.flavors import ModelArgs
from milepost.train.models.rope import rotate_halves

__all__ = ["Qwen3"]


class Qwen3(Decoder):
    """Tokens (B, T) to logits (B, T, V)."""

    def __init__(self, args: ModelArgs, seq_len: int):
        super().__init__(args, seq_len, _block)


def _block(args: ModelArgs) -> Block:
    attention = Attention(args, rotate_halves, qk_norm=True)
    return Block(args, attention, feed_forward=FeedForward(args.dim, args.hidden_dim))
