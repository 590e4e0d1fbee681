"""Degrees that are refused before anything starts, and the messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from milepost.interop.names.model_sizes import model_args
from milepost.parallelism.degrees import Degrees
from milepost.parallelism.fit import run_problems

DENSE = model_args("llama3", "debugmodel")  # 6 layers, 16 heads
MOE = model_args("qwen3", "debugmodel_moe")  # 8 experts, 4 key/value heads


def problems(
    args: Any = DENSE,
    seq_len: int = 64,
    local_batch_size: int = 8,
    schedule: str = "1F1B",
    microbatch_size: int = 1,
    **degrees: int,
) -> list[str]:
    resolved = Degrees(**{f"{name}_parallel_degree": degree for name, degree in degrees.items()})
    return run_problems(
        args,
        resolved,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        schedule=schedule,
        microbatch_size=microbatch_size,
    )


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (
            {"args": MOE, "tensor": 8},
            "parallelism.tensor_parallel_degree 8 does not divide the model's 4 key/value heads",
        ),
        (
            {"seq_len": 66, "context": 2, "tensor": 2},
            "training.seq_len 66 can't be split evenly over 4 ranks (parallelism.context_parallel_degree 2 x "
            "parallelism.tensor_parallel_degree 2)",
        ),
        (
            {"expert": 2},
            "parallelism.expert_parallel_degree 2 needs a model with experts; this one has none",
        ),
        (
            {"args": MOE, "expert": 3},
            "parallelism.expert_parallel_degree 3 does not divide the model's 8 experts",
        ),
        (
            {"pipeline": 4, "schedule": "Interleaved1F1B"},
            "parallelism.pipeline_parallel_degree 4 makes 8 stages (2 on each rank), but the model has only 6 layers",
        ),
        (
            {"pipeline": 2, "microbatch_size": 3},
            "parallelism.pipeline_parallel_microbatch_size 3 does not divide training.local_batch_size 8",
        ),
        (
            {"pipeline": 4, "microbatch_size": 4},
            "training.local_batch_size 8 makes 2 microbatches of parallelism.pipeline_parallel_microbatch_size 4, but "
            "1F1B needs at least one for each of 4 stages",
        ),
        (
            {"pipeline": 2, "local_batch_size": 5, "schedule": "Interleaved1F1B"},
            "training.local_batch_size 5 makes 5 microbatches of parallelism.pipeline_parallel_microbatch_size 1, but "
            "Interleaved1F1B needs fewer than 4 or a multiple of 2",
        ),
        (
            {"pipeline": 2, "schedule": "ZeroBubble"},
            "parallelism.pipeline_parallel_schedule must be one of GPipe, 1F1B, Interleaved1F1B, not ZeroBubble",
        ),
    ],
)
def test_impossible_degrees_are_refused(layout: dict[str, Any], problem: str) -> None:
    assert problems(**layout) == [problem]


def test_all_problems_are_reported_at_once() -> None:
    assert len(problems(args=replace(MOE, n_layers=1), tensor=8, expert=3, pipeline=2, microbatch_size=3)) == 4


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 16, "context": 4},
        {"pipeline": 6},
        {"pipeline": 3, "schedule": "Interleaved1F1B", "local_batch_size": 6},
        {"pipeline": 4, "schedule": "GPipe", "microbatch_size": 8},
        {"args": MOE, "expert": 8, "tensor": 4, "pipeline": 2},
        # The pipeline's options are of no concern without one.
        {"microbatch_size": 3},
    ],
    ids=str,
)
def test_possible_degrees_pass(layout: dict[str, Any]) -> None:
    assert problems(**layout) == []
