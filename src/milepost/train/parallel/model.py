"""``parallelize``: turn a model on the meta device into a sharded one that trains."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import loss_parallel

from milepost.errors import ConfigError
from milepost.parallelism.fit import run_problems
from milepost.train.models.decoder import Decoder
from milepost.train.parallel.context import apply_context_parallel, local_stretch
from milepost.train.parallel.data import apply_data_parallel
from milepost.train.parallel.expert import apply_expert_parallel
from milepost.train.parallel.gradients import clip_gradients, squared_norm_share
from milepost.train.parallel.initial import init_weights
from milepost.train.parallel.meshes import Meshes
from milepost.train.parallel.pipeline import Microbatches, Pipeline, split_into_stages
from milepost.train.parallel.tensor import apply_tensor_parallel, token_loss

__all__ = ["ParallelModel", "parallelize"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TrainingOptions(Protocol):
    """The options of section ``training`` that the parallelisms use."""

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
    """The options of section ``parallelism`` that the parallelisms use, besides the degrees."""

    @property
    def pipeline_parallel_schedule(self) -> str: ...
    @property
    def pipeline_parallel_microbatch_size(self) -> int: ...


class ActivationCheckpointOptions(Protocol):
    """The options of section ``activation_checkpoint`` that the parallelisms use."""

    @property
    def mode(self) -> str: ...


def parallelize(
    model: Decoder,
    meshes: Meshes,
    training: TrainingOptions,
    parallelism: PipelineOptions,
    activation_checkpoint: ActivationCheckpointOptions,
) -> ParallelModel:
    """Shard ``model`` (on the meta device; consumed) over the meshes. Collective; the weights are not yet initialised.

    Raises:
        ConfigError: the model can't be sharded this way; with all reasons.
    """
    problems = run_problems(
        model.args,
        meshes.degrees,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        schedule=parallelism.pipeline_parallel_schedule,
        microbatch_size=parallelism.pipeline_parallel_microbatch_size,
    )
    if problems:
        raise ConfigError(problems)
    model.to(DTYPES[training.dtype])
    for block in model.blocks():
        block.recompute = activation_checkpoint.mode == "full"
    if meshes.degrees.pipeline_parallel_degree == 1:
        _spread(model, meshes, training)
        return ParallelModel([model], meshes, None)
    schedule, size = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_microbatch_size
    parts = split_into_stages(model, meshes, schedule)
    for part in parts:
        _spread(part, meshes, training)
    number, dtype = training.local_batch_size // size, DTYPES[training.mixed_precision_param]
    microbatches = Microbatches(number=number, size=size, seq_len=training.seq_len, dtype=dtype)
    return ParallelModel(parts, meshes, Pipeline(parts, meshes, schedule, microbatches))


def _spread(part: Decoder, meshes: Meshes, training: TrainingOptions) -> None:
    """Apply every parallelism except the pipeline to ``part``, innermost first, and allocate its memory."""
    if meshes.degrees.tensor_parallel_degree > 1:
        apply_tensor_parallel(part, meshes)
    if meshes.degrees.context_parallel_degree > 1:
        apply_context_parallel(part, meshes)
    if part.args.moe is not None:
        apply_expert_parallel(part, meshes)
    apply_data_parallel(part, meshes, DTYPES[training.mixed_precision_param], DTYPES[training.mixed_precision_reduce])
    part.to_empty(device=meshes.device)
    part.reset_buffers()


class ParallelModel:
    """The parts of the model that this rank computes, trained as one model with those of all other ranks."""

    def __init__(self, parts: list[Decoder], meshes: Meshes, pipeline: Pipeline | None):
        self.parts = parts
        """One module per pipeline stage held here; without pipeline parallelism, the full model."""
        self.meshes = meshes
        self.pipeline = pipeline

    def init_weights(self, seed: int) -> None:
        """Set every parameter to its initial value, which depends only on ``seed``, not on the degrees."""
        for part in self.parts:
            init_weights(part, seed)

    def train(self) -> None:
        for part in self.parts:
            part.train()

    def forward_backward(self, tokens: Tensor, labels: Tensor, num_global_tokens: int) -> Tensor:
        """Accumulate the gradients of these samples' part of the loss; returns this rank's share of it.

        ``tokens`` and ``labels``: int64 (local batch, seq_len), the same on all ranks of one ``meshes.dp_rank``.
        The loss is the cross-entropy summed over tokens, divided by ``num_global_tokens``, those of the whole step;
        for a mixture of experts, plus the weighted mean of the sequences' load-balancing losses.
        The share is a detached 0-d tensor; `reduce_loss` sums the shares.
        """
        tokens, labels = (local_stretch(x.to(self.meshes.device), self.meshes) for x in (tokens, labels))
        self._set_balance_scale(num_global_tokens)
        # All ranks of the tensor mesh compute the same loss: each counts a part of it.
        with loss_parallel() if self.meshes.tensor.size() > 1 else nullcontext():
            if self.pipeline is not None:
                loss = self.pipeline.forward_backward(tokens, labels, num_global_tokens)
            else:
                loss = self._forward_backward(tokens, labels, num_global_tokens)
        return loss / self.meshes.tensor.size() + self._taken_balance_loss()

    def _forward_backward(self, tokens: Tensor, labels: Tensor, num_global_tokens: int) -> Tensor:
        (model,) = self.parts
        loss = token_loss(model(tokens), labels, self.meshes.tensor, model.args.vocab_size) / num_global_tokens
        loss.backward()
        return loss.detach()

    def _set_balance_scale(self, num_global_tokens: int) -> None:
        """Scale the balancing losses of all sequences of the step so that they sum to their weighted mean."""
        for part in self.parts:
            for moe in part.mixtures():
                moe.balance_scale = moe.args.balance_loss_weight * part.seq_len / num_global_tokens

    def _taken_balance_loss(self) -> Tensor:
        """Return and reset this rank's part of the load-balancing loss of the backward passes since the last call."""
        total = torch.zeros((), device=self.meshes.device)
        for part in self.parts:
            for moe in part.mixtures():
                if moe.balance_loss is not None:
                    total += moe.balance_loss
                    moe.balance_loss = None
        return total

    def reduce_loss(self, share: Tensor) -> float:
        """Return the loss of the full step on every rank, from all ranks' (summed) shares. Collective."""
        total = share.detach().double()
        dist.all_reduce(total)
        return total.item()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Return the norm of the full model's gradient (0-d, float32) and scale it down to ``max_norm``. Collective.

        ``max_norm`` 0 leaves the gradients unchanged.
        """
        parameters = [p for part in self.parts for p in part.parameters()]
        tied = self.pipeline.tied_embedding() if self.pipeline is not None else None
        squared = squared_norm_share(parameters, tied, self.meshes.device)
        dist.all_reduce(squared)
        norm = squared.sqrt()
        if max_norm > 0:
            clip_gradients(parameters, norm, max_norm)
        return norm
