"""Rotary position embeddings: the table of angles and the two ways to apply it.

Meta's weights expect each pair of *neighbouring* channels to be rotated (`rotate_interleaved`), Hugging Face's expect
channel ``i`` paired with ``i + head_dim / 2`` (`rotate_halves`). A checkpoint of one kind runs in the other after a
permutation of the rows of ``wq`` and ``wk``. Source: RoFormer (arXiv 2104.09864); the scaling is Llama 3.1's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milepost.interop.names.model_sizes import ModelArgs, RopeScaling

__all__ = ["rope_table", "rotate_halves", "rotate_interleaved"]


def rope_table(args: ModelArgs, seq_len: int, device: torch.device | str | None = None) -> Tensor:
    """Cosines and sines of every position's angles: float32, (seq_len, head_dim / 2, 2)."""
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device=device) / args.head_dim
    frequencies = 1.0 / args.rope_theta**exponents  # (head_dim / 2,)
    if args.rope_scaling is not None:
        frequencies = _scaled(frequencies, args.rope_scaling)
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretch long wavelengths by the factor, keep short ones, blend those between."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_seq_len / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate_interleaved(x: Tensor, table: Tensor) -> Tensor:
    """Rotates channel pairs (0, 1), (2, 3), ... of ``x`` (B, T, H, D) by ``table`` (T, D / 2, 2), in float32."""
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]  # (T, 1, D / 2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, D / 2) each
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotates channel pairs (0, D / 2), (1, D / 2 + 1), ... of ``x`` (B, T, H, D) by ``table``, in float32."""
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]  # (T, 1, D / 2)
    first, second = x.float().chunk(2, dim=-1)  # (B, T, H, D / 2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)
