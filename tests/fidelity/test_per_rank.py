"""State that differs by rank: each rank gets its own back, and nothing of one rank is given to another in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from same import assert_same
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import milepost
from milepost import CheckpointConfig, CheckpointManager, MilepostError
from milepost.testing.world import run_world

CONFIG: dict[str, Any] = {"enable": True, "interval": 1, "last_save_model_only": False}


class Loader:
    """A loader whose position is its rank's own, as torchdata's ``StatefulDataLoader`` over an iterable data set."""

    def __init__(self, position: int):
        self.position = position
        self.buffer = torch.full((3,), float(position))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "buffer": self.buffer, "names": [f"shard-{self.position}"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["names"] == [f"shard-{state['position']}"]  # all of it from one rank
        self.position, self.buffer = state["position"], state["buffer"]


class Resharding(Loader):
    def reshard(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        least = min(states, key=lambda state: state["position"])
        return {**least, "position": least["position"], "buffer": torch.tensor([float(len(states))])}


class Failing(Loader):
    def reshard(self, states: list[dict[str, Any]]) -> Any:
        return None if len(states) > 2 else states[5]


class Values:
    def __init__(self, **values: Any):
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(state)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def refused(act: Any) -> str:
    """The message of the error that ``act`` raises; the same on every rank."""
    with pytest.raises(MilepostError) as caught:
        act()
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, caught.value.message)
    assert len(set(messages)) == 1, messages
    return caught.value.message


def loaders(folder: str, mode: str) -> list[tuple[int, list[float]]]:
    """Positions are equal at first, differ from the second save on; a new manager resumes."""
    rank = dist.get_rank()
    loader = Loader(5)
    config = CheckpointConfig(**CONFIG, async_mode=mode)
    with CheckpointManager(folder, config, model=linear(), dataloader=loader) as manager:
        manager.save(1)
        loader.position, loader.buffer = 10 + rank, torch.full((3,), 10.0 + rank)
        manager.save(2)
        loader.position, loader.buffer = 20 + rank, torch.full((3,), 20.0 + rank)
        manager.save(3)
    found = []
    for step in (1, 2, 3):
        fresh = Loader(0)
        config = CheckpointConfig(**CONFIG, load_step=step, load_only=True)
        with CheckpointManager(folder, config, model=linear(), dataloader=fresh) as manager:
            manager.load()
        found.append((fresh.position, fresh.buffer.tolist()))
    return found


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_each_rank_gets_its_own_loader_state_back(memory_path: Path, mode: str) -> None:
    for rank, found in enumerate(run_world(loaders, 2, str(memory_path), mode)):
        assert found == [(5, [5.0] * 3), (10 + rank, [10.0 + rank] * 3), (20 + rank, [20.0 + rank] * 3)]


def unlike_loaders(folder: str) -> list[Any]:
    """Per-rank states that agree in what they share, while one rank has more or other values: a buffer, key, shape."""
    rank, found = dist.get_rank(), []
    kinds: list[dict[str, Any]] = [
        {"buffer": [torch.ones(1)] * rank},
        {f"shard{rank}": {"at": 1}},
        {"left": torch.ones(2 + rank)},
        {"left": torch.ones(2, dtype=(torch.int64, torch.float32)[rank])},
        {"left": torch.ones(2) if rank else None},
    ]
    for number, more in enumerate(kinds):
        loader, fresh = Values(epoch=1, **more), Values()
        with CheckpointManager(
            f"{folder}/{number}", CheckpointConfig(**CONFIG), model=linear(), dataloader=loader
        ) as m:
            m.save(1)
        with CheckpointManager(f"{folder}/{number}", CheckpointConfig(**CONFIG), model=linear(), dataloader=fresh) as m:
            m.load()
        found.append(str(fresh.values) == str(loader.values))
    return found


def test_loaders_that_hold_more_on_one_rank_are_kept_for_each(memory_path: Path) -> None:
    assert run_world(unlike_loaders, 2, str(memory_path)) == [[True] * 5] * 2


def unlike_train_states(folder: str) -> list[bool]:
    """Keys that one rank has, an order of its own, and a mapping that is empty elsewhere; of a part not declared."""
    rank, found = dist.get_rank(), []
    kinds: list[dict[str, Any]] = [
        {"both": 1, f"rank{rank}": torch.ones(1)},
        {"a": 1, "b": 2} if rank else {"b": 2, "a": 1},
        {"seen": {"at": {"n": 1}} if rank else {}},
        {"seen": 1} if rank else {},
    ]
    for number, kind in enumerate(kinds):
        for held in (Values(**kind), fresh := Values()):
            with CheckpointManager(
                f"{folder}/{number}", CheckpointConfig(**CONFIG), model=linear(), train_state=held
            ) as m:
                m.load() if held is fresh else m.save(1)
        found.append(str(fresh.values) == str(kind))
    return found


def test_keys_of_one_rank_are_not_given_to_another(memory_path: Path) -> None:
    assert run_world(unlike_train_states, 2, str(memory_path)) == [[True] * 4] * 2


def save_of_two(folder: str) -> None:
    with CheckpointManager(
        folder, CheckpointConfig(**CONFIG), model=linear(), dataloader=Loader(7 - dist.get_rank())
    ) as m:
        m.save(1)


def resume_on_three(folder: str) -> tuple[str, int, list[float]]:
    config = CheckpointConfig(**CONFIG, load_only=True)
    plain, resharding = Loader(1), Resharding(1)
    with CheckpointManager(folder, config, model=linear(), dataloader=plain) as manager:
        message = refused(manager.load)
    assert plain.position == 1
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with CheckpointManager(folder, config, model=model, dataloader=Failing(1)) as manager:
        assert "Failing.reshard(states) raised IndexError" in refused(manager.load)
    assert torch.equal(model.weight, before)
    with CheckpointManager(folder, config, model=linear(), dataloader=resharding) as manager:
        manager.load()
    return message, resharding.position, resharding.buffer.tolist()


def test_at_another_number_of_ranks_the_loader_reshards_or_the_load_is_refused(memory_path: Path) -> None:
    run_world(save_of_two, 2, str(memory_path))
    for message, position, buffer in run_world(resume_on_three, 3, str(memory_path)):
        assert "the state of dataloader for each of 2 ranks" in message
        assert "reshard(states)" in message
        assert "checkpoint.exclude_from_loading = dataloader" in message
        assert (position, buffer) == (6, [2.0])


def differing(folder: str) -> dict[str, str]:
    """State that must not differ by rank is refused with the same error on every rank, and nothing is saved."""
    rank = dist.get_rank()
    found = {}

    def save(state: dict[str, Any]) -> None:
        milepost.save(f"{folder}/x", state)

    found["value"] = refused(lambda: save({"a": {"same": 1, "seed": rank}}))
    found["tensor"] = refused(lambda: save({"same": torch.ones(4), "ema": torch.full((4,), float(rank))}))
    found["lists"] = refused(lambda: save({"same": [torch.ones(1)], "history": [torch.ones(1)] * (rank + 1)}))
    found["kinds"] = refused(lambda: save({"a": {"seed": {"b": 1} if rank == 2 else 5}}))
    stage = nn.ModuleDict({"layer0": nn.Linear(300, 300)})  # each stage numbers its layers from 0
    found["shapes"] = refused(lambda: save({"train_state": {"left": torch.ones(2 + rank)}}))
    found["stages"] = refused(lambda: save(dict(stage.state_dict())) if torch.manual_seed(rank) is None else save(
        {key: value + rank for key, value in stage.state_dict().items()}
    ))  # fmt: skip
    manager = CheckpointManager(
        f"{folder}/run", CheckpointConfig(**CONFIG), model=linear(), train_state=Values(seen=rank % 2)
    )
    found["train state"] = refused(lambda: manager.save(1))
    manager.close()
    with CheckpointManager(
        f"{folder}/run",
        CheckpointConfig(**CONFIG),
        model=linear(),
        train_state=Values(seen=rank),
        per_rank=["train_state"],
    ) as manager:
        manager.save(1)
    fresh = Values(seen=-1)
    with CheckpointManager(f"{folder}/run", CheckpointConfig(**CONFIG), model=linear(), train_state=fresh) as manager:
        manager.load()
    assert fresh.values == {"seen": rank}
    return found


def schedules(folder: str, number: int) -> list[float]:
    """Schedulers whose state is each rank's own, as by a loss that is not reduced."""
    found = []
    for step in (1, 2):
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plateaus = [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer) for _ in range(number)]
        with CheckpointManager(
            folder, CheckpointConfig(**CONFIG), model=model, lr_scheduler=plateaus, per_rank=["lr_scheduler"]
        ) as manager:
            if step == 1:
                for count, plateau in enumerate(plateaus):
                    plateau.best = 10.0 * dist.get_rank() + count
                manager.save(1)
            else:
                manager.load()
                found = [plateau.best for plateau in plateaus]
    return found


def test_schedulers_of_each_rank(memory_path: Path) -> None:
    for number in (1, 2):
        expected = [[10.0 * rank + count for count in range(number)] for rank in range(2)]
        assert run_world(schedules, 2, str(memory_path / str(number)), number) == expected


def test_what_differs_otherwise_is_refused_on_every_rank_with_key_and_ranks(memory_path: Path) -> None:
    found = run_world(differing, 4, str(memory_path))[0]
    assert "a.seed: rank 0 / rank 1 / rank 2 / rank 3" in found["value"]
    assert "per_rank" in found["value"]
    assert "ema: rank 0" in found["tensor"]
    assert "train_state.left: float32 [2] on rank 0, but float32 [3] on rank 1" in found["shapes"]
    assert "per_rank" in found["shapes"]
    assert "same" not in found["tensor"].split("Tensors that")[0].replace("the same key", "")
    assert "lists of different lengths (1 and 2) under the key 'history'" in found["lists"]
    assert "values of different kinds under the key 'a.seed'" in found["kinds"]
    assert "layer0.weight" in found["stages"]
    assert "two pipeline stages" in found["stages"]
    assert "train_state.seen: ranks 0, 2 / ranks 1, 3" in found["train state"]
    assert not (memory_path / "x").exists()


def batch_norm(folder: str) -> tuple[bool, int]:
    """Under DDP each rank has its own running mean: rank 0's is stored, and the variance that goes with it."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 1)), broadcast_buffers=False
    )
    torch.manual_seed(rank)
    model(torch.randn(8, 4)).sum().backward()
    norm = model.module[1]
    mine = [buffer.clone() for buffer in norm.buffers()]
    milepost.save(f"{folder}/model", {"model": model})
    with CheckpointManager(f"{folder}/run", CheckpointConfig(**CONFIG), model=model) as manager:
        manager.save(1)
        for buffer in norm.buffers():
            buffer.zero_()
        manager.load()
    dist.broadcast_object_list(box := [mine], src=0)
    return all(torch.equal(a, b) for a, b in zip(norm.buffers(), box[0], strict=True)), len(mine)


def test_buffers_under_data_parallelism_are_all_of_one_rank(memory_path: Path) -> None:
    assert run_world(batch_norm, 2, str(memory_path)) == [(True, 3), (True, 3)]


def drifting(folder: str) -> tuple[str, str]:
    """One element of a large replica is off: a sample may miss it, a comparison of all elements does not."""
    model = nn.Linear(512, 512)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    off = CheckpointConfig(**CONFIG, check_replicas=2)
    manager = CheckpointManager(folder, off, model=model)
    manager.save(1)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.weight[77, 3] += 1e-3
    manager.save(2)  # not one that looks
    message = refused(lambda: manager.save(3))
    with torch.no_grad():
        model.weight.fill_(1.0)
    manager.save(4)
    manager.close()
    return message, str(sorted(path.name for path in Path(folder).glob("step-*")))


def test_a_replica_that_has_drifted_is_found_when_it_is_looked_for(memory_path: Path) -> None:
    for message, steps in run_world(drifting, 2, str(memory_path)):
        assert "weight: rank 0 / rank 1" in message
        assert "all-reduce" in message
        assert steps == "['step-1', 'step-2', 'step-4']"


def equal_at_first(folder: str, mode: str) -> list[Any]:
    """Tensors of a loop that are equal at the first saves, and then differ in a few of many elements."""
    rank, found = dist.get_rank(), []
    config = CheckpointConfig(**CONFIG, async_mode=mode)
    for name in ("dataloader", "train_state", "states"):
        state = Values(seen=torch.zeros(200_000, dtype=torch.bool), total=torch.zeros(5))
        parts: dict[str, Any] = {name: state if name != "states" else {"more": state}}
        with CheckpointManager(f"{folder}/{name}", config, model=linear(), **parts) as manager:
            manager.save(1)
            manager.save(2)
            state.values["seen"][1001 + rank] = True
            if name == "dataloader":
                manager.save(3)
            else:
                found.append(refused(lambda manager=manager: manager.save(3)))
    fresh = Values()
    with CheckpointManager(f"{folder}/dataloader", config, model=linear(), dataloader=fresh) as manager:
        manager.load()
    return [*found, fresh.values["seen"].nonzero().tolist()]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_tensors_that_begin_to_differ_in_a_few_elements(memory_path: Path, mode: str) -> None:
    for rank, (one, other, seen) in enumerate(run_world(equal_at_first, 2, str(memory_path), mode)):
        assert seen == [[1001 + rank]]
        assert "train_state.seen: rank 0 / rank 1" in one
        assert 'CheckpointManager(per_rank=("dataloader", "train_state"))' in one
        assert "states.more.seen: rank 0 / rank 1" in other


def averages_of_sharded_weights(folder: Path, mode: str, saves: bool) -> None:
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(6, 5))
    rank = dist.get_rank()
    averages = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    state = Values(averages=averages, history=[rank], whole=torch.tensor(rank)) if saves else Values()
    config = CheckpointConfig(**CONFIG, async_mode=mode)  # type: ignore[arg-type]
    with CheckpointManager(folder, config, model=model, train_state=state, per_rank=("train_state",)) as manager:
        if saves:
            for step in (1, 2):
                manager.save(step)
                manager.maybe_wait_for_staging()
        else:
            manager.load()
    assert_same(state.values, {"averages": averages, "history": [rank], "whole": torch.tensor(rank)})


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_dtensors_beside_values_of_each_rank(memory_path: Path, mode: str) -> None:
    """Each rank has its shard, of which no rank has the rest: it comes back as the DTensor that it was."""
    run_world(averages_of_sharded_weights, 2, memory_path, mode, True, timeout_s=60)
    run_world(averages_of_sharded_weights, 2, memory_path, mode, False, timeout_s=60)
