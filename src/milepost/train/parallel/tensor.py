"""Tensor parallelism: the model's plan applied to a part of it, and the loss over a split vocabulary.

Sequence parallel throughout: between attention and feed-forward each rank holds 1/tp of the positions (Korthikanti et
al., arXiv 2205.05198). The embedding and the output projection are split by vocabulary; logits are never gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

from milepost.train.models.decoder import Decoder
from milepost.train.parallel.meshes import Meshes

__all__ = ["apply_tensor_parallel", "local_vocab_size", "token_loss"]


def apply_tensor_parallel(part: Decoder, meshes: Meshes) -> None:
    """Split ``part`` over the tensor mesh by its plan."""
    held = {name for name, _ in part.named_modules()}
    plan = part.tensor_parallel_plan()
    parallelize_module(part, meshes.tensor, {name: style for name, style in plan.items() if name in held})


def local_vocab_size(vocab_size: int, mesh: DeviceMesh) -> int:
    """Return the number of vocabulary rows on this rank of the tensor mesh (the last chunk may be smaller)."""
    chunk = -(-vocab_size // mesh.size())
    return max(0, min(chunk, vocab_size - chunk * mesh.get_local_rank()))


def token_loss(logits: Tensor, labels: Tensor, mesh: DeviceMesh, vocab_size: int) -> Tensor:
    """Compute the cross-entropy in float32, summed over all tokens with a label (-100: no label). Labels are (B, T).

    ``logits`` (B, T, V / tp) are this rank's part of the vocabulary over ``mesh``. With more than one rank, call it and
    the backward pass under ``loss_parallel()``.
    """
    logits = logits.flatten(0, 1).float()
    if mesh.size() == 1:
        return F.cross_entropy(logits, labels.flatten(), reduction="sum")
    whole = torch.Size((logits.shape[0], vocab_size))
    split = DTensor.from_local(logits, mesh, [Shard(-1)], run_check=False, shape=whole, stride=(vocab_size, 1))
    loss = F.cross_entropy(split, labels.flatten(), reduction="sum")
    return loss.to_local() if isinstance(loss, DTensor) else loss
