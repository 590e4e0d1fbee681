"""Every layout trains as one process does: same initial weights, same losses, same gradient norms."""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny_layouts import MODELS, MOE, SEQ_LEN, TINY, Layout, build, on, random_batches, whole

from milepost.errors import ConfigError
from milepost.format.box import Box
from milepost.parallelism.degrees import Degrees
from milepost.parallelism.placement import STAGES_PER_RANK, Coordinates, box_of, stages_of
from milepost.tensors.layout import tensor_leaf
from milepost.testing.world import run_world
from milepost.train.parallel import Meshes

STEPS = 5
BATCH = 8

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
        on("llama3", "pp2"),
        on("qwen3", "pp2", schedule="GPipe", microbatch_size=4),
        on("llama3 tied", "pp2", schedule="Interleaved1F1B", accumulate=2),
        on("llama3", "cp2"),
        on("qwen3 moe", "fsdp2"),
        on("qwen3 moe", "tp2"),
        on("qwen3 moe", "cp2"),
        on("qwen3 moe", "pp2", recompute=True, microbatch_size=4),
        on("qwen3 moe", "fsdp2 ep2"),
        on("llama3", "pp2", dtype="bfloat16", microbatch_size=4),
        on("qwen3 moe", "fsdp2 ep2", dtype="bfloat16"),
    ],
    4: [
        on("llama3", "replicate2 fsdp2", accumulate=2),
        on("llama3", "fsdp2 tp2"),
        on("llama3 tied", "fsdp2 pp2"),
        on("llama3 tied", "tp2 pp2", schedule="Interleaved1F1B", microbatch_size=4),
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
    """The results of a run on one rank."""

    losses: list[float]
    norms: list[float]
    initial: dict[str, int]
    """CRC-32 of each initial parameter, gathered whole; of the stages that this rank computes."""
    boxes: dict[str, list[Box]]
    """What this rank's DTensors hold of each parameter."""


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


@pytest.mark.parametrize("layout", [layout for layouts in LAYOUTS.values() for layout in layouts], ids=str)
def test_the_boxes_of_plan_resume_are_those_of_the_trainers_tensors(layout: Layout) -> None:
    """One set of rules, so that a plan can't drift from the trainer."""
    _, args = MODELS[layout.model]
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in MODELS[layout.model][0](args, SEQ_LEN).state_dict().items()}
    for rank, outcome in enumerate(outcomes(layout.world_size)[layout]):
        stages = stages_of(
            Coordinates.of(rank, layout.degrees).pp,
            layout.degrees,
            stages_per_rank=STAGES_PER_RANK[layout.schedule],
            num_layers=args.n_layers,
            tied=args.tied_embeddings,
        )
        planned = {
            key: [box] if (box := box_of(key, shape, layout.degrees, rank)).numel else []
            for key, shape in shapes.items()
            if any(stage.holds(key) for stage in stages)
        }
        assert outcome.boxes == planned


def test_every_layout_is_a_row_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.+?) \| \d \| (\d\.\d+) \|", page, re.MULTILINE))
    assert list(rows) == [str(layout) for layouts in LAYOUTS.values() for layout in layouts]
    for layout in REFERENCES:
        assert float(rows[str(layout)]) == pytest.approx(outcomes(1)[layout][0].losses[-1], abs=1e-4)


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
    meshes = Meshes.build(layout.degrees, "cpu")
    model = build(layout, meshes, batch=BATCH)
    initial = {
        name: zlib.crc32(whole(parameter).numpy().tobytes())
        for part in model.parts
        for name, parameter in part.named_parameters()
    }
    boxes = {
        name: [piece.box for piece in tensor_leaf(name, parameter).pieces if piece.box.numel]
        for part in model.parts
        for name, parameter in part.named_parameters()
    }
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in model.parts]
    losses, norms = [], []
    for batch in random_batches(STEPS, BATCH):
        mine = batch.chunk(meshes.dp_degree)[meshes.dp_rank]
        shares = [
            model.forward_backward(rows[:, :-1], rows[:, 1:], BATCH * SEQ_LEN) for rows in mine.chunk(layout.accumulate)
        ]
        losses.append(model.reduce_loss(torch.stack(shares).sum()))
        norms.append(model.clip_grad_norm(1.0).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return Outcome(losses, norms, initial, boxes)


def _balance_losses() -> list[float]:
    """The first loss of the mixture of experts without and with its load-balancing loss."""
    losses = []
    for weight in (0.0, 0.01):
        args = replace(MOE, moe=replace(MOE.moe, balance_loss_weight=weight))
        model = build(on("qwen3 moe"), Meshes.build(Degrees(), "cpu"), batch=BATCH, args=args)
        tokens = torch.arange(BATCH * SEQ_LEN).view(BATCH, SEQ_LEN) % TINY.vocab_size
        losses.append(model.reduce_loss(model.forward_backward(tokens, tokens, tokens.numel())))
    return losses


def _impossible() -> list[str]:
    """Tries to spread three heads and 17 positions over two ranks."""
    meshes = Meshes.build(Degrees(tensor_parallel_degree=2), "cpu")
    args = replace(TINY, n_heads=6, n_kv_heads=3)
    with pytest.raises(ConfigError) as refused:
        build(on("llama3"), meshes, batch=BATCH, args=args, seq_len=17)
    return list(refused.value.problems)
