"""The degrees of parallelism that fill a world."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.errors import ConfigError
from milepost.parallelism.degrees import Degrees
from milepost.train.config import ParallelismConfig

small = st.integers(1, 4)


@given(replicate=small, tensor=small, pipeline=small, context=small, left=small)
def test_minus_one_takes_what_the_other_degrees_leave(replicate, tensor, pipeline, context, left):
    options = ParallelismConfig(
        data_parallel_replicate_degree=replicate,
        tensor_parallel_degree=tensor,
        pipeline_parallel_degree=pipeline,
        context_parallel_degree=context,
    )
    degrees = Degrees.resolve(options.degrees(), replicate * tensor * pipeline * context * left)
    assert degrees.data_parallel_shard_degree == left
    assert degrees.world_size == replicate * tensor * pipeline * context * left
    assert degrees.data_parallel_degree == replicate * left


def test_experts_are_spread_over_ranks_that_other_degrees_count():
    options = ParallelismConfig(tensor_parallel_degree=2, expert_parallel_degree=4)
    assert Degrees.resolve(options.degrees(), 4).world_size == 4
    with pytest.raises(ConfigError, match="expert_parallel_degree = 4 must divide the 2 ranks"):
        Degrees.resolve(options.degrees(), 2)


def test_every_degree_out_of_range_is_reported():
    options = ParallelismConfig(data_parallel_shard_degree=-2, context_parallel_degree=0)
    with pytest.raises(ConfigError) as caught:
        Degrees.resolve(options.degrees(), 1)
    assert caught.value.problems == (
        "parallelism.data_parallel_shard_degree must be at least 1 (or -1 for what the others leave), not -2",
        "parallelism.context_parallel_degree must be at least 1, not 0",
    )
