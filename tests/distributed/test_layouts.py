"""Every layout trains as one process does: same initial weights, same losses, same gradient norms."""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from milepost.errors import ConfigError
from milepost.testing.world import run_world
from milepost.train.config import ActivationCheckpointConfig, Dtype, ParallelismConfig, PipelineSchedule, TrainingConfig
from milepost.train.degrees import Degrees
from milepost.train.models.decoder import Decoder
from milepost.train.models.flavors import ModelArgs, MoEArgs, RopeScaling
from milepost.train.models.llama3 import Llama3
from milepost.train.models.qwen3 import Qwen3
from milepost.train.parallel import Meshes, ParallelModel, parallelize

STEPS = 5
BATCH = 8
SEQ_LEN = 16

# Nothing but heads and sequence divides evenly: the vocabulary is a prime, the hidden widths have odd factors.
TINY = ModelArgs(
    dim=40,
    n_layers=4,
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
MOE = replace(TINY, moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=24, balance_loss_weight=0.01))
MODELS = {
    "llama3": (Llama3, TINY),
    "llama3 tied": (Llama3, replace(TINY, tied_embeddings=True)),
    "qwen3": (Qwen3, replace(TINY, rope_scaling=None)),
    "qwen3 moe": (Qwen3, replace(MOE, rope_scaling=None)),
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
    """A row of the table: a model, the degrees above 1, and how it is run."""

    model: str
    degrees: tuple[tuple[str, int], ...] = ()
    """By the keys of `OPTIONS`."""
    schedule: PipelineSchedule = "1F1B"
    microbatch_size: int = 2
    accumulate: int = 1
    """Calls of forward and backward to a step."""
    recompute: bool = False
    dtype: Dtype = "float32"

    @property
    def world_size(self) -> int:
        return math.prod(degree for axis, degree in self.degrees if axis != "ep")

    def __str__(self) -> str:
        extras = [self.schedule] if "pp" in dict(self.degrees) else []
        extras += ["recompute"] if self.recompute else []
        extras += [f"accumulate {self.accumulate}"] if self.accumulate > 1 else []
        extras += [self.dtype] if self.dtype != "float32" else []
        degrees = " ".join(f"{axis}{degree}" for axis, degree in self.degrees) or "one process"
        return ", ".join([self.model, degrees, *extras])


def on(model: str, degrees: str, **options: Any) -> Layout:
    """``on("llama3", "fsdp2 tp2")``."""
    axes = [(word.rstrip("0123456789"), int(word.lstrip("abcdefghijklmnopqrstuvwxyz"))) for word in degrees.split()]
    return Layout(model, tuple(axes), **options)


REFERENCES = [Layout(model) for model in MODELS]
LAYOUTS = {
    1: [*REFERENCES, Layout("llama3", recompute=True, accumulate=2), Layout("qwen3 moe", recompute=True, accumulate=2)],
    2: [
        on("llama3", "replicate2"),
        on("llama3", "fsdp2"),
        on("llama3 tied", "fsdp2", recompute=True),
        on("llama3", "tp2"),
        on("llama3 tied", "tp2"),
        on("qwen3", "tp2", recompute=True),
        on("llama3", "pp2", microbatch_size=1),
        on("qwen3", "pp2", schedule="GPipe"),
        on("llama3 tied", "pp2", schedule="Interleaved1F1B", accumulate=2),
        on("llama3", "cp2"),
        on("qwen3 moe", "fsdp2"),
        on("qwen3 moe", "tp2"),
        on("qwen3 moe", "cp2"),
        on("qwen3 moe", "pp2", recompute=True),
        on("qwen3 moe", "fsdp2 ep2"),
        on("llama3", "pp2", dtype="bfloat16"),
        on("qwen3 moe", "fsdp2 ep2", dtype="bfloat16"),
    ],
    4: [
        on("llama3", "replicate2 fsdp2", accumulate=2),
        on("llama3", "fsdp2 tp2"),
        on("llama3 tied", "fsdp2 pp2"),
        on("llama3", "tp2 pp2", schedule="Interleaved1F1B"),
        on("llama3 tied", "pp4", schedule="GPipe"),
        on("llama3", "fsdp2 cp2"),
        on("qwen3", "cp2 tp2"),
        on("qwen3 moe", "fsdp4 ep2"),
        on("qwen3 moe", "fsdp4 ep4", recompute=True),
        on("qwen3 moe", "replicate2 fsdp2 ep2"),
        on("qwen3 moe", "fsdp2 pp2 ep2"),
        on("qwen3 moe", "fsdp2 cp2 ep4"),
        on("qwen3 moe", "fsdp2 tp2 ep2"),
    ],
    8: [
        on("llama3", "fsdp2 tp2 pp2"),
        on("qwen3 moe", "fsdp2 cp2 pp2 ep4"),
        # Two ranks to each expert: its rows are sharded.
        on("qwen3 moe", "fsdp4 tp2 ep4"),
    ],
}


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of a run."""

    losses: list[float]
    norms: list[float]
    initial: dict[str, int]
    """CRC-32 of each initial parameter, gathered whole; of the stages that this rank computes."""


@functools.cache
def outcomes(world_size: int) -> dict[Layout, list[Outcome]]:
    """All ranks' outcomes of every layout of that size. The world is started once, at the first question."""
    ranks = run_world(_walk, world_size, LAYOUTS[world_size], timeout_s=230)
    return {layout: [rank[i] for rank in ranks] for i, layout in enumerate(LAYOUTS[world_size])}


@pytest.mark.parametrize("layout", [layout for layouts in LAYOUTS.values() for layout in layouts], ids=str)
def test_layout_trains_as_one_process(layout: Layout) -> None:
    expected = outcomes(1)[Layout(layout.model)][0]
    exact = layout.dtype == "float32"
    held: set[str] = set()
    for outcome in outcomes(layout.world_size)[layout]:
        assert outcome.losses == pytest.approx(expected.losses, abs=1e-4 if exact else 0.1)
        assert outcome.norms[0] == pytest.approx(expected.norms[0], rel=1e-4 if exact else 1e-2)
        assert outcome.initial.items() <= expected.initial.items(), "an initial weight differs"
        held |= outcome.initial.keys()
    assert held == expected.initial.keys(), "no stage holds some weight"


def test_every_layout_is_a_row_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text(encoding="utf-8")
    for layout in (layout for layouts in LAYOUTS.values() for layout in layouts):
        assert f"\n| {layout} | {layout.world_size} | " in page


def test_balance_loss_matters_to_the_mixture() -> None:
    """Without it the equalities above would hold for a loss that is left out."""
    plain, balanced = run_world(_balance_losses, 1)[0]
    assert balanced - plain == pytest.approx(MOE.n_layers * 0.01, rel=0.2)


def test_impossible_layout_is_refused_with_every_reason() -> None:
    (problems, _) = run_world(_impossible, 2)
    assert len(problems) == 2
    assert "tensor_parallel_degree 2 does not divide the model's 3 key/value heads" in problems[0]
    assert "seq_len 17 can't be split evenly over 2 ranks" in problems[1]


def _walk(layouts: list[Layout]) -> list[Outcome]:
    return [_run(layout) for layout in layouts]


def _run(layout: Layout) -> Outcome:
    """Some steps of AdamW, on the same random samples in every layout."""
    meshes = Meshes.build(Degrees(**{OPTIONS[axis]: degree for axis, degree in layout.degrees}), "cpu")
    model = _parallelize(*MODELS[layout.model], meshes, layout)
    initial = {
        name: zlib.crc32(_whole(parameter).numpy().tobytes())
        for part in model.parts
        for name, parameter in part.named_parameters()
    }
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in model.parts]
    samples = torch.Generator().manual_seed(1)
    losses, norms = [], []
    for _ in range(STEPS):
        # A few of the words only: there is something to learn, and the losses must fall alike.
        batch = torch.randint(0, 9, (BATCH, SEQ_LEN + 1), generator=samples)
        mine = batch.chunk(meshes.dp_degree)[meshes.dp_rank]
        shares = [
            model.forward_backward(rows[:, :-1], rows[:, 1:], BATCH * SEQ_LEN) for rows in mine.chunk(layout.accumulate)
        ]
        losses.append(model.reduce_loss(torch.stack(shares).sum()))
        norms.append(model.clip_grad_norm(1.0).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return Outcome(losses, norms, initial)


def _parallelize(
    model_class: type[Decoder], args: ModelArgs, meshes: Meshes, layout: Layout, seq_len: int = SEQ_LEN
) -> ParallelModel:
    with torch.device("meta"):
        model = model_class(args, seq_len)
    training = TrainingConfig(
        seq_len=seq_len,
        local_batch_size=BATCH // meshes.dp_degree // layout.accumulate,
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


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.detach().full_tensor()


def _balance_losses() -> list[float]:
    """The first loss of the mixture of experts without and with its load-balancing loss."""
    losses = []
    for weight in (0.0, 0.01):
        args = replace(MOE, moe=replace(MOE.moe, balance_loss_weight=weight))
        model = _parallelize(Qwen3, args, Meshes.build(Degrees(), "cpu"), Layout("qwen3 moe"))
        tokens = torch.arange(BATCH * SEQ_LEN).view(BATCH, SEQ_LEN) % TINY.vocab_size
        losses.append(model.reduce_loss(model.forward_backward(tokens, tokens, tokens.numel())))
    return losses


def _impossible() -> list[str]:
    """Tries to spread three heads and 17 positions over two ranks."""
    meshes = Meshes.build(Degrees(tensor_parallel_degree=2), "cpu")
    args = replace(TINY, n_heads=6, n_kv_heads=3)
    with pytest.raises(ConfigError) as refused:
        _parallelize(Llama3, args, meshes, Layout("llama3"), seq_len=17)
    return list(refused.value.problems)
