"""``milepost.data.ResumableSampler``: each sample exactly once, at every degree, with every loader, after a resume."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from milepost import CheckpointConfig, CheckpointManager, ConfigError, StateMismatchError
from milepost.data import ResumableSampler
from milepost.testing.world import run_world

SAMPLES = 24


@settings(deadline=None)  # other processes may take the CPU
@given(
    num_samples=st.integers(1, 50),
    degrees=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_every_sample_comes_once_an_epoch_whatever_ranks_and_batches_the_run_resumes_on(num_samples, degrees):
    """Each of ``degrees`` is (ranks, batch size, steps) of one stretch of the run."""
    state, seen = None, []
    for world_size, batch_size, steps in degrees:
        samplers = [
            ResumableSampler(num_samples, batch_size=batch_size, seed=5, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
        for batches in islice(zip(*(sampler.batches(sampler) for sampler in samplers), strict=True), steps):
            seen += [index for batch in batches for index in batch]
        states = [sampler.state_dict() for sampler in samplers]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert state is not None
    assert state["samples_consumed"] == len(seen)
    for start in range(0, len(seen), num_samples):
        epoch = Counter(seen[start : start + num_samples])
        assert max(epoch.values()) == 1


def dataset() -> TensorDataset:
    return TensorDataset(torch.arange(SAMPLES))


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_workers_have_fetched_ahead_is_not_counted(kind: Any, num_workers: int) -> None:
    seen: list[int] = []
    state = None
    for ranks in (1, 2, 4, 1):
        samplers = [ResumableSampler(SAMPLES, batch_size=1, rank=rank, world_size=ranks) for rank in range(ranks)]
        loaders = [kind(dataset(), batch_sampler=sampler, num_workers=num_workers) for sampler in samplers]
        if state is not None:
            for sampler in samplers:
                sampler.load_state_dict(state)
        streams = [sampler.batches(loader) for sampler, loader in zip(samplers, loaders, strict=True)]
        for batches in islice(zip(*streams, strict=True), 12 // ranks):
            seen += [int(batch[0]) for batch in batches]
        state = samplers[0].state_dict()
        assert state["samples_consumed"] == len(seen)
    assert sorted(seen) == sorted(2 * list(range(SAMPLES)))


class Run:
    """A model with dropout on this rank, as a user would train it under DDP with a loader of its own."""

    def __init__(self, folder: Path, kind: Any, num_workers: int):
        torch.manual_seed(1 + (dist.get_rank() if dist.is_initialized() else 0))
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        for parameter in self.model.parameters():
            nn.init.constant_(parameter, 0.5)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.sampler = ResumableSampler(SAMPLES, batch_size=2)
        self.loader = kind(dataset(), batch_sampler=self.sampler, num_workers=num_workers)
        config = CheckpointConfig(enable=True, interval=3)
        degrees = {"data_parallel_replicate_degree": self.sampler.world_size}
        self.manager = CheckpointManager(
            folder, config, model=self.model, optimizer=self.optimizer, dataloader=self.sampler, layout=degrees
        )

    def train(self, steps: range) -> list[float]:
        losses = []
        self.manager.load()
        for step, (batch,) in zip(steps, self.sampler.batches(self.loader), strict=False):
            loss = self.model(batch[:, None].float()).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            for parameter in self.model.parameters():
                if dist.is_initialized():
                    dist.all_reduce(parameter.grad)
            self.optimizer.step()
            self.manager.save(step)
            losses.append(loss.item())
        self.manager.close()
        return losses


def _undisturbed_and_resumed(folder: Path, kind: Any, num_workers: int) -> tuple[list[float], list[float]]:
    whole = Run(folder / "whole", kind, num_workers).train(range(1, 7))
    first = Run(folder / "stopped", kind, num_workers).train(range(1, 4))
    return whole, first + Run(folder / "stopped", kind, num_workers).train(range(4, 7))


@pytest.mark.parametrize(("kind", "num_workers"), [(DataLoader, 0), (DataLoader, 2), (StatefulDataLoader, 2)])
def test_a_run_resumed_in_mid_epoch_draws_the_same_dropout(memory_path: Path, kind: Any, num_workers: int) -> None:
    whole, resumed = _undisturbed_and_resumed(memory_path, kind, num_workers)
    assert whole == resumed
    assert len(set(whole)) == 6


def test_on_two_ranks_as_well(memory_path: Path) -> None:
    ranks = run_world(_undisturbed_and_resumed, 2, memory_path, StatefulDataLoader, 0)
    for whole, resumed in ranks:
        assert whole == resumed
    assert ranks[0][0] != ranks[1][0], "the ranks see other samples"


def test_another_data_set_or_seed_is_refused() -> None:
    state = ResumableSampler(SAMPLES, batch_size=1, seed=3).state_dict()
    with pytest.raises(StateMismatchError, match="num_samples was 24 and is 25; seed was 3 and is 4"):
        ResumableSampler(SAMPLES + 1, batch_size=1, seed=4).load_state_dict(state)


def test_another_seed_is_refused_before_the_weights_are_loaded(memory_path: Path) -> None:
    def manager(seed: int) -> CheckpointManager:
        sampler = ResumableSampler(SAMPLES, batch_size=1, seed=seed)
        torch.manual_seed(seed)
        return CheckpointManager(memory_path, CheckpointConfig(interval=1), model=model(seed), dataloader=sampler)

    def model(seed: int) -> torch.nn.Module:
        return models.setdefault(seed, torch.nn.Linear(2, 2))

    models: dict[int, torch.nn.Module] = {}
    with manager(3) as saving:
        saving.save(1)
    with manager(4) as loading, pytest.raises(StateMismatchError, match="seed was 3 and is 4"):
        loading.load()
    assert not torch.equal(models[4].weight, models[3].weight)


def test_numbers_out_of_range_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        ResumableSampler(0, batch_size=0, rank=3, world_size=2)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("given", [{"num_samples": "24"}, {"batch_size": 2.5}, {"seed": None}, {"rank": True}], ids=str)
def test_anything_but_an_integer_is_refused(given: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"num_samples": SAMPLES, "batch_size": 2, **given}
    with pytest.raises(ConfigError, match=f"{next(iter(given))} must be a whole number"):
        ResumableSampler(arguments.pop("num_samples"), **arguments)


@pytest.mark.parametrize("state", [None, {}, {"samples_consumed": -2}, {"samples_consumed": 1.5}], ids=str)
def test_anything_but_a_state_is_refused(state: Any) -> None:
    sampler = ResumableSampler(SAMPLES, batch_size=2)
    state = {**sampler.state_dict(), **state} if state else state
    with pytest.raises(StateMismatchError, match="samples_consumed"):
        sampler.load_state_dict(state)
    assert sampler.samples_consumed == 0


def test_a_loop_that_counts_nothing_is_refused_at_the_save(memory_path: Path) -> None:
    """Over the loader itself: every resume would begin with the first sample again."""
    sampler = ResumableSampler(SAMPLES, batch_size=2)
    next(iter(DataLoader(dataset(), batch_sampler=sampler)))
    with (
        CheckpointManager(memory_path, CheckpointConfig(interval=1), model=nn.Linear(1, 1), dataloader=sampler) as m,
        pytest.raises(ConfigError, match=r"loop over sampler.batches\(loader\)"),
    ):
        m.save(1)


def test_a_loader_of_another_sampler_and_an_iterator_of_before_a_load_are_refused() -> None:
    sampler = ResumableSampler(SAMPLES, batch_size=2)
    with pytest.raises(ConfigError, match="batch_sampler=sampler"):
        sampler.batches(DataLoader(dataset(), batch_size=2))
    state = sampler.state_dict()
    old = sampler.batches(sampler)
    first = next(old)
    sampler.load_state_dict(state)
    with pytest.raises(ConfigError, match="after the load"):
        next(old)
    assert next(sampler.batches(sampler)) == first
