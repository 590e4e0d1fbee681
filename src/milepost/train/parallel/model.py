"""``parallelize``: from a model on the meta device to one that is spread over the ranks and trains."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from milepost.train.models.decoder import Decoder
from milepost.train.parallel.data import apply_data_parallel
from milepost.train.parallel.gradients import clip_gradients, squared_norm_share
from milepost.train.parallel.initial import init_weights
from milepost.train.parallel.meshes import Meshes

__all__ = ["ParallelModel", "parallelize"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingOptions(Protocol):
    """What the parallelisms need to know of section ``training``."""

    @property
    def dtype(self) -> str: ...
    @property
    def mixed_precision_param(self) -> str: ...
    @property
    def mixed_precision_reduce(self) -> str: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def local_batch_size(self) -> int: ...


class PipelineOptions(Protocol):
    """What the parallelisms need to know of section ``parallelism`` beside the degrees."""

    @property
    def pipeline_parallel_schedule(self) -> str: ...
    @property
    def pipeline_parallel_microbatch_size(self) -> int: ...


class ActivationCheckpointOptions(Protocol):
    """What the parallelisms need to know of section ``activation_checkpoint``."""

    @property
    def mode(self) -> str: ...


def parallelize(
    model: Decoder,
    meshes: Meshes,
    training: TrainingOptions,
    parallelism: PipelineOptions,
    activation_checkpoint: ActivationCheckpointOptions,
) -> ParallelModel:
    """Spreads ``model`` (on the meta device; consumed) over the meshes. Collective; the weights are not yet set."""
    model.to(DTYPES[training.dtype])
    parts = [model]
    for part in parts:
        for block in part.layers.values():
            block.recompute = activation_checkpoint.mode == "full"
        apply_data_parallel(
            part, meshes, DTYPES[training.mixed_precision_param], DTYPES[training.mixed_precision_reduce]
        )
        part.to_empty(device=meshes.device)
        part.reset_buffers()
    return ParallelModel(parts, meshes)


class ParallelModel:
    """The parts of the model that this rank computes, trained as one model with those of all other ranks."""

    def __init__(self, parts: list[Decoder], meshes: Meshes):
        self.parts: list[Decoder] = parts
        """One module a pipeline stage held here; without pipeline parallelism, the whole model."""
        self.meshes = meshes

    def init_weights(self, seed: int) -> None:
        """Sets every parameter to its initial value, which depends on ``seed`` alone, not on the layout."""
        for part in self.parts:
            init_weights(part, seed)

    def train(self) -> None:
        for part in self.parts:
            part.train()

    def forward_backward(self, tokens: Tensor, labels: Tensor, num_global_tokens: int) -> Tensor:
        """Adds the gradients of these samples' part of the loss; returns this rank's share of it.

        ``tokens`` and ``labels``: int64 (local batch, seq_len), the same on all ranks of one ``meshes.dp_rank``.
        The loss is the cross-entropy summed over tokens, divided by ``num_global_tokens``, those of the whole step.
        The share is a detached 0-d tensor; `reduce_loss` makes the whole of it.
        """
        device = self.meshes.device
        tokens, labels = tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = token_loss(self.parts[0](tokens), labels) / num_global_tokens
        loss.backward()
        return loss.detach()

    def reduce_loss(self, share: Tensor) -> float:
        """The loss of the whole step, on every rank, from all ranks' (summed) shares. Collective."""
        total = share.detach().double()
        dist.all_reduce(total)
        return total.item()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The norm of the whole model's gradient (0-d, float32), which is then scaled down to ``max_norm``. Collective.

        ``max_norm`` 0 leaves the gradients as they are.
        """
        parameters = [p for part in self.parts for p in part.parameters()]
        squared = squared_norm_share(parameters, self.meshes.device)
        dist.all_reduce(squared)
        norm = squared.sqrt()
        if max_norm > 0:
            clip_gradients(parameters, norm, max_norm)
        return norm


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float32, summed over all tokens with a label (-100 is none). Logits (B, T, V), labels (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
