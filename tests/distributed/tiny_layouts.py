"""Layouts of tiny models, for tests that walk many of them inside one world."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from milepost.interop.names.model_sizes import ModelArgs, MoEArgs, RopeScaling
from milepost.parallelism.degrees import Degrees
from milepost.train.config import ActivationCheckpointConfig, Dtype, ParallelismConfig, PipelineSchedule, TrainingConfig
from milepost.train.models.decoder import Decoder
from milepost.train.models.llama3 import Llama3
from milepost.train.models.qwen3 import Qwen3
from milepost.train.parallel import Meshes, ParallelModel, parallelize

# Putting together what FSDP and tensor parallelism cut takes two gathers; torch says so once a rank.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

SEQ_LEN = 16

# Nothing but heads and sequence divides evenly: the vocabulary is a prime, the hidden widths have odd factors.
TINY = ModelArgs(
    dim=40,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=10,
    hidden_dim=60,
    vocab_size=101,
    max_seq_len=64,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    rope_scaling=RopeScaling(factor=8.0, original_seq_len=8),
)
MOE = replace(TINY, rope_scaling=None, moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=24, balance_loss_weight=0.01))
MODELS: dict[str, tuple[type[Decoder], ModelArgs]] = {
    "llama3": (Llama3, TINY),
    # Four stages of a pipeline need four layers.
    "llama3 tied": (Llama3, replace(TINY, tied_embeddings=True, n_layers=4)),
    "qwen3": (Qwen3, replace(TINY, rope_scaling=None)),
    "qwen3 moe": (Qwen3, MOE),
}

OPTIONS = {
    "replicate": "data_parallel_replicate_degree",
    "fsdp": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "cp": "context_parallel_degree",
    "ep": "expert_parallel_degree",
}


@dataclass(frozen=True)
class Layout:
    """A model, the degrees above 1, and how it is run."""

    model: str
    axes: tuple[tuple[str, int], ...] = ()
    """By the keys of `OPTIONS`."""
    schedule: PipelineSchedule = "1F1B"
    microbatch_size: int = 2
    """Of a pipeline, in sequences."""
    accumulate: int = 1
    """Calls of forward and backward to a step."""
    recompute: bool = False
    dtype: Dtype = "float32"

    @property
    def world_size(self) -> int:
        return math.prod(degree for axis, degree in self.axes if axis != "ep")

    @property
    def degrees(self) -> Degrees:
        return Degrees(**{OPTIONS[axis]: degree for axis, degree in self.axes})

    def __str__(self) -> str:
        extras = [self.schedule] if "pp" in dict(self.axes) else []
        extras += ["recompute"] if self.recompute else []
        extras += [f"accumulate {self.accumulate}"] if self.accumulate > 1 else []
        extras += [self.dtype] if self.dtype != "float32" else []
        axes = " ".join(f"{axis}{degree}" for axis, degree in self.axes) or "one process"
        return ", ".join([self.model, axes, *extras])


def on(model: str, axes: str = "", **options: Any) -> Layout:
    """``on("llama3", "fsdp2 tp2")``."""
    words = [(word.rstrip("0123456789"), int(word.lstrip("abcdefghijklmnopqrstuvwxyz"))) for word in axes.split()]
    return Layout(model, tuple(words), **options)


def build(
    layout: Layout, meshes: Meshes, *, batch: int, args: ModelArgs | None = None, seq_len: int = SEQ_LEN
) -> ParallelModel:
    """The model of ``layout``, spread over ``meshes`` and with its initial weights; ``args`` replaces its sizes."""
    model_class, sizes = MODELS[layout.model]
    with torch.device("meta"):
        model = model_class(args or sizes, seq_len)
    training = TrainingConfig(
        seq_len=seq_len,
        local_batch_size=batch // meshes.dp_degree // layout.accumulate,
        mixed_precision_param=layout.dtype,
    )
    pipeline = ParallelismConfig(
        pipeline_parallel_schedule=layout.schedule, pipeline_parallel_microbatch_size=layout.microbatch_size
    )
    recompute = ActivationCheckpointConfig(mode="full" if layout.recompute else "none")
    parallel = parallelize(model, meshes, training, pipeline, recompute)
    parallel.init_weights(seed=3)
    parallel.train()
    return parallel


def random_batches(number: int, batch: int) -> Iterator[Tensor]:
    """Token sequences (batch, SEQ_LEN + 1), the same on every rank. A few of the words only: something to learn."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        yield torch.randint(0, 9, (batch, SEQ_LEN + 1), generator=generator)


def whole(tensor: Tensor) -> Tensor:
    """All of a distributed tensor, gathered (collective); another tensor as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
