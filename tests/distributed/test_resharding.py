"""The full training state saved on any degrees is restored on all others bit for bit."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_layouts import MODELS, SEQ_LEN, Layout, build, on, random_batches, whole
from torch import Tensor
from torch.distributed.tensor import DTensor

from milepost import CheckpointConfig, CheckpointManager
from milepost.testing.world import run_world
from milepost.train.loop import TrainState
from milepost.train.parallel import Meshes, ParallelModel
from milepost.train.parallel.initial import copy_local_part

BATCH = 4
STEPS = 2
LEARNING_RATE = 1e-2

DENSE = [
    on("llama3 tied"),
    on("llama3 tied", "fsdp2"),
    on("llama3 tied", "tp2"),
    on("llama3 tied", "pp2"),
    on("llama3 tied", "fsdp4"),
    on("llama3 tied", "replicate2 fsdp2"),
    on("llama3 tied", "fsdp2 tp2"),
    on("llama3 tied", "fsdp2 pp2", microbatch_size=1),
    on("llama3 tied", "tp2 pp2", schedule="GPipe"),
    on("llama3 tied", "fsdp2 cp2"),
    on("llama3 tied", "fsdp2 tp2 pp2", microbatch_size=1),
]
EXPERTS = [
    on("qwen3 moe"),
    on("qwen3 moe", "fsdp2 ep2"),
    on("qwen3 moe", "fsdp4 ep4"),
    on("qwen3 moe", "tp2 pp2 ep2", schedule="Interleaved1F1B"),
]
PAIRS = [pair for family in (DENSE, EXPERTS) for pair in itertools.product(family, repeat=2)]

State = dict[str, np.ndarray]
"""Whole tensors by key: parameters by name, optimizer state by ``<name>/<kind>``."""


@dataclass(frozen=True)
class Saved:
    """One rank's state when it saved: every tensor of its pipeline stages, as full tensors gathered by torch."""

    state: State
    train_state: TrainState
    random: int


@dataclass(frozen=True)
class Loaded:
    """One rank's state after a load."""

    held: set[str]
    wrong: list[str]
    """Keys whose elements on this rank are not those that were saved."""
    train_state: TrainState
    learning_rates: set[float]
    random: int
    notes: tuple[str, ...]


@dataclass
class Run:
    """A training run of some layout on this rank."""

    layout: Layout
    meshes: Meshes
    model: ParallelModel
    optimizers: list[torch.optim.AdamW]
    train_state: TrainState

    @classmethod
    def of(cls, layout: Layout) -> Run:
        meshes = Meshes.build(layout.degrees, "cpu")
        args = MODELS[layout.model][1]
        # Two stages on each of two ranks need four layers; elsewhere fewer save time.
        args = replace(args, n_layers=2 if layout in DENSE else 4)
        model = build(layout, meshes, batch=BATCH, args=args)
        optimizers = [torch.optim.AdamW(part.parameters(), lr=LEARNING_RATE) for part in model.parts]
        return cls(layout, meshes, model, optimizers, TrainState())

    def manager(self, folder: Path, config: CheckpointConfig) -> CheckpointManager:
        return CheckpointManager(
            folder,
            config,
            model=self.model.parts,
            optimizer=self.optimizers,
            train_state=self.train_state,
            layout=self.meshes.degrees.as_dict(),
        )

    def train(self) -> None:
        for batch in random_batches(STEPS, BATCH):
            mine = batch.chunk(self.meshes.dp_degree)[self.meshes.dp_rank]
            share = self.model.forward_backward(mine[:, :-1], mine[:, 1:], BATCH * SEQ_LEN)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.train_state.step += 1
            self.train_state.loss = self.model.reduce_loss(share)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """The parameter's name, the key, and the tensor: every parameter with its optimizer state."""
        for part, optimizer in zip(self.model.parts, self.optimizers, strict=True):
            for name, parameter in part.named_parameters():
                yield name, name, parameter
                for kind, value in optimizer.state[parameter].items():
                    yield name, f"{name}/{kind}", value

    def forget(self) -> None:
        """Overwrite everything, so that a value left unchanged is noticed."""
        with torch.no_grad():
            for _, _, tensor in self.tensors():
                tensor.fill_(math.nan)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.5
        self.train_state.step = 0
        torch.manual_seed(0)


def folder_of(root: Path, layout: Layout) -> Path:
    return root / str(layout).replace(", ", "-").replace(" ", "_")


def _save_all(root: Path, layouts: list[Layout]) -> list[Saved]:
    """On every rank: train a little under each layout and save."""
    saved = []
    for layout in layouts:
        run = Run.of(layout)
        run.train()
        manager = run.manager(folder_of(root, layout), CheckpointConfig(enable=True, interval=STEPS))
        assert manager.save(STEPS)
        manager.close()
        state = {key: whole(tensor).numpy() for _, key, tensor in run.tensors()}
        saved.append(Saved(state, run.train_state, random_digest()))
    return saved


def _load_all(root: Path, layouts: list[Layout], states: dict[Layout, State]) -> dict[tuple[Layout, Layout], Loaded]:
    """On every rank: build each layout once and load into it what was saved under each layout of its model."""
    results = {}
    for layout in layouts:
        run = Run.of(layout)
        places = {name: places_of(parameter) for name, key, parameter in run.tensors() if name == key}
        for source in [source for source in states if source.model == layout.model]:
            run.forget()
            manager = run.manager(folder_of(root, source), CheckpointConfig(enable=True, load_only=True))
            report = manager.load()
            manager.close()
            assert report is not None
            results[source, layout] = Loaded(
                held={key for _, key, _ in run.tensors()},
                wrong=[
                    key for name, key, tensor in run.tensors() if differs(tensor, places[name], states[source][key])
                ],
                train_state=TrainState(**run.train_state.state_dict()),
                learning_rates={group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups},
                random=random_digest(),
                notes=report.notes,
            )
    return results


def places_of(parameter: Tensor) -> Tensor:
    """The place, in the whole parameter, of each element that this rank holds; as torch gathers them (collective)."""
    numbered = torch.arange(parameter.numel()).view(parameter.shape)
    held = torch.empty_like(parameter, dtype=torch.int64, requires_grad=False)
    copy_local_part(held, numbered)
    assert torch.equal(whole(held), numbered)
    return held.to_local() if isinstance(held, DTensor) else held


def differs(tensor: Tensor, places: Tensor, saved: np.ndarray) -> bool:
    """Return whether this rank's part of a tensor differs in any bit from the saved one."""
    local, expected = tensor.detach(), torch.from_numpy(saved)
    if isinstance(local, DTensor):
        local, expected = local.to_local(), expected.flatten()[places]
    return local.shape != expected.shape or not torch.equal(local.view(torch.int32), expected.view(torch.int32))


def random_digest() -> int:
    return zlib.crc32(torch.get_rng_state().numpy().tobytes())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def saved(root: Path) -> dict[Layout, list[Saved]]:
    """By rank, of every layout, trained and saved; each world is started once."""
    runs = {}
    for world_size, layouts in by_world_size().items():
        ranks = run_world(_save_all, world_size, root, layouts, timeout_s=200)
        runs |= {layout: [rank[number] for rank in ranks] for number, layout in enumerate(layouts)}
    return runs


@pytest.fixture(scope="module")
def loaded(root: Path, saved: dict[Layout, list[Saved]]) -> Callable[[Layout, Layout], list[Loaded]]:
    """By rank, of a layout that was loaded from another; each world is started once, when it is first asked for."""
    states = {layout: merged([rank.state for rank in ranks]) for layout, ranks in saved.items()}

    @functools.cache
    def world(world_size: int) -> list[dict[tuple[Layout, Layout], Loaded]]:
        return run_world(_load_all, world_size, root, by_world_size()[world_size], states, timeout_s=200)

    return lambda source, target: [rank[source, target] for rank in world(target.world_size)]


def by_world_size() -> dict[int, list[Layout]]:
    sizes = sorted({layout.world_size for layout in DENSE + EXPERTS})
    return {size: [layout for layout in DENSE + EXPERTS if layout.world_size == size] for size in sizes}


def merged(states: list[State]) -> State:
    """One state out of the ranks' (pipeline stages'). What several of them hold must be equal."""
    result: State = {}
    for state in states:
        for key, value in state.items():
            assert result.setdefault(key, value).tobytes() == value.tobytes(), key
    return result


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda layout: str(layout).partition(", ")[2])
def test_state_saved_under_one_layout_comes_back_under_another(
    source: Layout,
    target: Layout,
    saved: dict[Layout, list[Saved]],
    loaded: Callable[[Layout, Layout], list[Loaded]],
) -> None:
    ranks = loaded(source, target)
    state = merged([rank.state for rank in saved[source]])
    assert [rank.wrong for rank in ranks] == [[]] * len(ranks)
    assert set().union(*(rank.held for rank in ranks)) == set(state)
    for rank in ranks:
        assert rank.train_state == saved[source][0].train_state
        assert rank.learning_rates == {LEARNING_RATE}
    randoms = [rank.random for rank in ranks]
    anew = [note for rank in ranks for note in rank.notes if "random generators were reseeded" in note]
    if source == target:
        assert randoms == [rank.random for rank in saved[source]]
        assert not anew
    else:
        assert len(set(randoms)) == len(ranks), "two ranks draw the same random numbers"
        assert len(anew) == len(ranks)


@pytest.mark.parametrize("family", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_saved_states_are_those_of_one_training_run(family: list[Layout], saved: dict[Layout, list[Saved]]) -> None:
    """The compared states have every key, and are equal on all degrees up to rounding."""
    one, *others = [merged([rank.state for rank in saved[layout]]) for layout in family]
    for other in others:
        assert other.keys() == one.keys()
        for key, value in one.items():
            np.testing.assert_allclose(other[key], value, atol=1e-3)
    names = {key for key in one if "/" not in key}
    assert {key.partition("/")[2] for key in one} == {"", "step", "exp_avg", "exp_avg_sq"}
    assert len(one) == 4 * len(names)
