"""Checks that a model can be spread over the ranks as requested: pure arithmetic, before any process group exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from milepost.parallelism.degrees import Degrees
from milepost.parallelism.placement import STAGES_PER_RANK


class ExpertSizes(Protocol):
    """The sizes of a mixture of experts that the checks need."""

    @property
    def num_experts(self) -> int: ...


class ModelSizes(Protocol):
    """The sizes of a model that the checks need; ``ModelArgs`` has them."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def moe(self) -> ExpertSizes | None: ...


def degree_problems(sizes: ModelSizes, degrees: Degrees, *, stages_per_rank: int) -> list[str]:
    """Return all reasons why a model can't be sharded under ``degrees``, one sentence each; empty if it can."""
    tp, ep = degrees.tensor_parallel_degree, degrees.expert_parallel_degree
    problems = [
        f"parallelism.tensor_parallel_degree {tp} does not divide the model's {number} {kind}"
        for number, kind in ((sizes.n_heads, "attention heads"), (sizes.n_kv_heads, "key/value heads"))
        if number % tp
    ]
    if ep > 1 and sizes.moe is None:
        problems.append(f"parallelism.expert_parallel_degree {ep} needs a model with experts; this one has none")
    elif sizes.moe is not None and sizes.moe.num_experts % ep:
        problems.append(
            f"parallelism.expert_parallel_degree {ep} does not divide the model's {sizes.moe.num_experts} experts"
        )
    problems += stage_problems(sizes.n_layers, degrees, stages_per_rank=stages_per_rank)
    return problems


def stage_problems(num_layers: int, degrees: Degrees, *, stages_per_rank: int) -> list[str]:
    """The reasons why ``num_layers`` can't be split into the pipeline's stages."""
    pp = degrees.pipeline_parallel_degree
    num_stages = pp * stages_per_rank
    if pp == 1 or num_stages <= num_layers:
        return []
    return [
        f"parallelism.pipeline_parallel_degree {pp} makes {num_stages} stages ({stages_per_rank} on each rank), "
        f"but the model has only {num_layers} {'layer' if num_layers == 1 else 'layers'}"
    ]


def run_problems(
    sizes: ModelSizes, degrees: Degrees, *, seq_len: int, local_batch_size: int, schedule: str, microbatch_size: int
) -> list[str]:
    """Return all reasons why a model can't be trained under ``degrees``, including the batch's.

    ``schedule`` is a key of `STAGES_PER_RANK`; ``microbatch_size`` the sequences of one pipeline microbatch.
    """
    is_pipeline = degrees.pipeline_parallel_degree > 1
    problems = degree_problems(sizes, degrees, stages_per_rank=STAGES_PER_RANK.get(schedule, 1))
    problems += _sequence_problems(degrees, seq_len)
    if is_pipeline and schedule not in STAGES_PER_RANK:
        problems.append(
            f"parallelism.pipeline_parallel_schedule must be one of {', '.join(STAGES_PER_RANK)}, not {schedule}"
        )
    elif is_pipeline:
        problems += _microbatch_problems(degrees, local_batch_size, schedule, microbatch_size)
    return problems


def _sequence_problems(degrees: Degrees, seq_len: int) -> Iterator[str]:
    cp, tp = degrees.context_parallel_degree, degrees.tensor_parallel_degree
    if seq_len % (cp * tp):
        yield (
            f"training.seq_len {seq_len} can't be split evenly over {cp * tp} ranks "
            f"(parallelism.context_parallel_degree {cp} x parallelism.tensor_parallel_degree {tp})"
        )


def _microbatch_problems(degrees: Degrees, local_batch_size: int, schedule: str, microbatch_size: int) -> Iterator[str]:
    pp = degrees.pipeline_parallel_degree
    if microbatch_size < 1 or local_batch_size % microbatch_size:
        yield (
            f"parallelism.pipeline_parallel_microbatch_size {microbatch_size} does not divide "
            f"training.local_batch_size {local_batch_size}"
        )
        return
    num_microbatches = local_batch_size // microbatch_size
    counted = (
        f"training.local_batch_size {local_batch_size} makes {num_microbatches} microbatches of "
        f"parallelism.pipeline_parallel_microbatch_size {microbatch_size}"
    )
    if schedule == "1F1B" and num_microbatches < pp:
        yield f"{counted}, but 1F1B needs at least one for each of {pp} stages"
    if schedule == "Interleaved1F1B" and num_microbatches % max(1, num_microbatches // pp):
        yield f"{counted}, but Interleaved1F1B needs fewer than {2 * pp} or a multiple of {pp}"
