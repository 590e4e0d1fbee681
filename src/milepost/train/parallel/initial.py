"""Initial weights that depend on the seed and the parameter's name alone, not on how the model is laid out.

Each parameter is drawn whole, on the CPU, from a generator of its own, and every rank keeps its part. (Random
initialisation of a sharded tensor in place would, on the CPU, give every rank the same numbers.) The price is time:
each rank draws all numbers of its stage. Large models start from a seed checkpoint instead.
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
    """Fills every parameter of ``part`` with its initial value for ``seed``."""
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            whole = initial_weight(name, parameter.shape, part.args.n_layers, seed)
            copy_local_part(parameter, whole)


def initial_weight(name: str, shape: torch.Size, n_layers: int, seed: int) -> Tensor:
    """The whole initial value of parameter ``name``: float32, on the CPU.

    Norms are one. All else is normal with a standard deviation of 0.02, for the projections that add to the residual
    stream divided by the square root of their number, ``2 * n_layers`` (GPT-2, Radford et al. 2019).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = STD / (2 * n_layers) ** 0.5 if name.endswith(RESIDUAL_PROJECTIONS) else STD
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def copy_local_part(target: Tensor, whole: Tensor) -> None:
    """Copies into ``target`` the part of ``whole`` that this rank holds of it, without communication.

    Asks the layout of checkpoints what that is: torch's own ``compute_local_shape_and_global_offset`` is wrong for
    some uneven sizes that FSDP cuts over tensor parallelism.
    """
    leaf = tensor_leaf("weight", target)
    for index, piece in enumerate(leaf.pieces):
        leaf.view(index).copy_(whole[piece.box.index()])
