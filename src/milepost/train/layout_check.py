"""Whether a model can be spread over the ranks as asked: pure arithmetic, before any process group exists."""

from __future__ import annotations

from collections.abc import Iterator

from milepost.parallelism.degrees import Degrees
from milepost.train.models.flavors import ModelArgs

__all__ = ["STAGES_PER_RANK", "layout_problems", "stage_layers"]

STAGES_PER_RANK = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2}
"""Pipeline schedules, and how many stages each rank computes under them."""


def layout_problems(
    args: ModelArgs,
    degrees: Degrees,
    *,
    seq_len: int,
    local_batch_size: int,
    schedule: str,
    microbatch_size: int,
) -> list[str]:
    """Every reason why a model of ``args`` can't be trained under ``degrees``, one sentence each; empty if it can.

    ``schedule`` is a key of `STAGES_PER_RANK`; ``microbatch_size`` the sequences of one pipeline microbatch.
    """
    problems = [
        *_tensor_problems(args, degrees),
        *_sequence_problems(degrees, seq_len),
        *_expert_problems(args, degrees),
    ]
    if degrees.pipeline_parallel_degree > 1:
        problems += _pipeline_problems(args, degrees, local_batch_size, schedule, microbatch_size)
    return problems


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """The layers of pipeline stage ``stage``: split evenly, the earlier stages take what is left over."""
    each, extra = divmod(num_layers, num_stages)
    start = stage * each + min(stage, extra)
    return range(start, start + each + (stage < extra))


def _tensor_problems(args: ModelArgs, degrees: Degrees) -> Iterator[str]:
    tp = degrees.tensor_parallel_degree
    for number, kind in ((args.n_heads, "attention heads"), (args.n_kv_heads, "key/value heads")):
        if number % tp:
            yield f"parallelism.tensor_parallel_degree {tp} does not divide the model's {number} {kind}"


def _sequence_problems(degrees: Degrees, seq_len: int) -> Iterator[str]:
    cp, tp = degrees.context_parallel_degree, degrees.tensor_parallel_degree
    if seq_len % (cp * tp):
        yield (
            f"training.seq_len {seq_len} can't be split evenly over {cp * tp} ranks "
            f"(parallelism.context_parallel_degree {cp} x parallelism.tensor_parallel_degree {tp})"
        )


def _expert_problems(args: ModelArgs, degrees: Degrees) -> Iterator[str]:
    ep = degrees.expert_parallel_degree
    if ep > 1 and args.moe is None:
        yield f"parallelism.expert_parallel_degree {ep} needs a model with experts; this one has none"
    elif args.moe is not None and args.moe.num_experts % ep:
        yield f"parallelism.expert_parallel_degree {ep} does not divide the model's {args.moe.num_experts} experts"


def _pipeline_problems(
    args: ModelArgs, degrees: Degrees, local_batch_size: int, schedule: str, microbatch_size: int
) -> Iterator[str]:
    pp = degrees.pipeline_parallel_degree
    if schedule not in STAGES_PER_RANK:
        yield f"parallelism.pipeline_parallel_schedule must be one of {', '.join(STAGES_PER_RANK)}, not {schedule}"
        return
    num_stages = pp * STAGES_PER_RANK[schedule]
    if num_stages > args.n_layers:
        yield (
            f"parallelism.pipeline_parallel_degree {pp} makes {num_stages} stages under {schedule}, "
            f"but the model has only {args.n_layers} layers"
        )
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
