"""Pipeline parallelism: the model cut into stages, and the schedule that runs microbatches through them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from milepost.parallelism.placement import STAGES_PER_RANK, stages_of
from milepost.train.models.decoder import Decoder
from milepost.train.parallel.gradients import local_part
from milepost.train.parallel.meshes import Meshes
from milepost.train.parallel.tensor import local_vocab_size, token_loss

Schedule = ScheduleGPipe | Schedule1F1B | ScheduleInterleaved1F1B

__all__ = ["Microbatches", "Pipeline", "split_into_stages"]


@dataclass(frozen=True, slots=True)
class Microbatches:
    """The microbatches of one call of a pipeline."""

    number: int
    size: int
    """Sequences per microbatch."""
    seq_len: int
    """Tokens per sequence, over all ranks."""
    dtype: torch.dtype
    """Dtype of the hidden states sent from stage to stage."""


def split_into_stages(model: Decoder, meshes: Meshes, schedule: str) -> list[Decoder]:
    """Return this rank's stages of ``model`` (on the meta device), in order. Stage i is rank ``i % pp``'s."""
    parts = []
    for stage in stages_of(
        meshes.pp_rank,
        meshes.degrees,
        stages_per_rank=STAGES_PER_RANK[schedule],
        num_layers=model.args.n_layers,
        tied=model.args.tied_embeddings,
    ):
        part = copy.deepcopy(model)
        part.keep_stage(stage)
        parts.append(part)
    return parts


class Pipeline:
    """Runs this rank's stages on microbatches, together with the other ranks of the pipeline."""

    def __init__(self, parts: list[Decoder], meshes: Meshes, schedule: str, microbatches: Microbatches):
        self.parts = parts
        self.meshes = meshes
        self.group = meshes.dense.get_group("pp")
        self.num_global_tokens = 1
        stages = [self._stage(part, index, schedule, microbatches) for index, part in enumerate(parts)]
        self.schedule = self._schedule(schedule, stages, microbatches.number)

    def forward_backward(self, tokens: Tensor, labels: Tensor, num_global_tokens: int) -> Tensor:
        """Accumulate the gradients of the batch; returns the cross-entropy over ``num_global_tokens``.

        Stages other than the last return zero. All ranks of the pipeline call this with the same batch.
        """
        self.num_global_tokens = num_global_tokens
        embedding = self.tied_embedding()
        gradient_before = None
        if embedding is not None:
            gradient_before, embedding.grad = embedding.grad, None
        losses: list[Tensor] = []
        inputs = (tokens,) if self.meshes.pp_rank == 0 else ()
        if self.meshes.last_stage:
            self.schedule.step(*inputs, target=labels, losses=losses, return_outputs=False)
        else:
            self.schedule.step(*inputs)
        if embedding is not None:
            self._add_other_end(embedding, gradient_before)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=tokens.device)

    def _schedule(self, name: str, stages: Sequence[PipelineStage], number: int) -> Schedule:
        # The loss is a sum, already divided by the tokens of the step: microbatches add up without scaling.
        if name == "Interleaved1F1B":
            return ScheduleInterleaved1F1B(list(stages), number, self._loss, scale_grads=False)
        (stage,) = stages
        if name == "1F1B":
            return Schedule1F1B(stage, number, self._loss, scale_grads=False)
        return ScheduleGPipe(stage, number, self._loss, scale_grads=False)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return token_loss(logits, labels, self.meshes.tensor, self.parts[-1].args.vocab_size) / self.num_global_tokens

    def _stage(self, part: Decoder, index: int, schedule: str, microbatches: Microbatches) -> PipelineStage:
        """Build stage ``index`` of this rank. Shapes are given, so that torch need not run the model to infer them."""
        degrees = self.meshes.degrees
        length = microbatches.seq_len // degrees.context_parallel_degree
        tokens = torch.empty(microbatches.size, length, dtype=torch.int64, device="meta")
        hidden = torch.empty(
            *(microbatches.size, length // degrees.tensor_parallel_degree, part.args.dim),
            dtype=microbatches.dtype,
            device="meta",
            requires_grad=True,
        )
        logits = hidden.new_empty(
            *(microbatches.size, length, local_vocab_size(part.args.vocab_size, self.meshes.tensor)), requires_grad=True
        )
        return PipelineStage(
            part,
            self.meshes.pp_rank + index * degrees.pipeline_parallel_degree,
            degrees.pipeline_parallel_degree * STAGES_PER_RANK[schedule],
            self.meshes.device,
            input_args=tokens if part.embeds else hidden,
            output_args=logits if part.projects else hidden,
            group=self.group,
        )

    def tied_embedding(self) -> Tensor | None:
        """The embedding matrix if another stage also holds (and trains) it."""
        for part in self.parts:
            if part.args.tied_embeddings and part.tok_embeddings is not None:
                return part.tok_embeddings.weight
        return None

    def _add_other_end(self, embedding: Tensor, gradient_before: Tensor | None) -> None:
        """Sum the gradient of the tied ``embedding`` over the first and last stage, on both."""
        assert embedding.grad is not None, "both ends of the pipeline use it"
        mine = local_part(embedding.grad)
        other = torch.empty_like(mine)
        peer = 0 if self.meshes.last_stage else self.meshes.degrees.pipeline_parallel_degree - 1
        operations = [
            dist.P2POp(dist.isend, mine.clone(), group=self.group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        mine += other
        if gradient_before is not None:
            mine += local_part(gradient_before)
