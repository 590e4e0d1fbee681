"""Initial weights that depend only on the seed and the parameter's name, not on the degrees.

Each parameter is drawn in full, on the CPU, from its own generator, and every rank keeps its part. (Random
initialisation of a sharded tensor in place would, on the CPU, give every rank the same numbers.) This costs time: each
rank draws all numbers of its stage. Large models start from a seed checkpoint instead.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from milepost.tensors.layout import tensor_leaf
from milepost.train.models.decoder import Decoder

__all__ = ["init_weights", "initial_weight"]

STD = 0.02
RESIDUAL_PROJECTIONS = ("wo.weight", "feed_forward.w2.weight", "experts.w2")


def init_weights(part: Decoder, seed: int) -> None:
    """Fill every parameter of ``part`` with its initial value for ``seed``."""
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            whole = initial_weight(name, parameter.shape, part.args.n_layers, seed)
            copy_local_part(parameter, whole)


def initial_weight(name: str, shape: torch.Size, n_layers: int, seed: int) -> Tensor:
    """Return the full initial value of parameter ``name``: float32, on the CPU.

    Norms are one. All others are normal with a standard deviation of 0.02, divided for the projections that add to the
    residual stream by the square root of their number, ``2 * n_layers`` (GPT-2, Radford et al. 2019).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = STD / (2 * n_layers) ** 0.5 if name.endswith(RESIDUAL_PROJECTIONS) else STD
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def copy_local_part(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of ``whole`` into ``target``, without communication.

    Uses the checkpoints' layout to find the part: torch's ``compute_local_shape_and_global_offset`` is wrong for some
    uneven sizes that FSDP cuts over tensor parallelism.
    """
    leaf = tensor_leaf("weight", target)
    for index, piece in enumerate(leaf.pieces):
        leaf.view(index).copy_(whole[piece.box.index()])
