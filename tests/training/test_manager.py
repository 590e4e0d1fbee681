"""A training run through ``CheckpointManager``, on one process: when it saves, what it keeps, how it goes on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import lr_scheduler

from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConfigError,
    MilepostError,
    NewerFormatError,
    SaveError,
    StateMismatchError,
)
from milepost.format.digest import crc32
from milepost.format.manifest import MANIFEST_NAME, SHARDS_NAME, Manifest
from milepost.loading.load import LoadReport
from milepost.run import catalog, checkpoint_record, marks
from milepost.storage import LocalStorage
from milepost.testing.format_1 import to_json_1
from milepost.testing.manifests import record_files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Progress:
    """Train state of a loop: counters, and containers that happen to be empty."""

    def __init__(self) -> None:
        self.step = 0
        self.losses = torch.zeros(0)
        self.notes: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "losses": self.losses, "notes": self.notes, "history": [{}, {"n": self.step}]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.losses, self.notes = state["step"], state["losses"], state["notes"]
        assert state["history"] == [{}, {"n": self.step}]


class Loader:
    """A data loader: counts samples."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


opened: list[CheckpointManager] = []


@pytest.fixture(autouse=True)
def close_managers() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


class Run:
    """A small training run with every part."""

    def __init__(
        self,
        folder: Path,
        *,
        model: nn.Module | None = None,
        optimizer: MakeOptimizer = adamw,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        layout: Mapping[str, int] | None = None,
        seed: int = 0,
        **config: Any,
    ):
        while opened and not config.get("load_only"):  # as if its process had ended
            opened.pop().close()
        seed_all(seed)
        self.model = model if model is not None else nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.optimizer = optimizer(self.model)
        self.scheduler = scheduler(self.optimizer) if scheduler else lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.loader, self.progress = Loader(), Progress()
        self.config = CheckpointConfig(**{"enable": True, "interval": 2, "last_save_model_only": False, **config})
        self.manager = CheckpointManager(
            folder,
            self.config,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
            dataloader=self.loader,
            train_state=self.progress,
            layout=layout,
        )
        opened.append(self.manager)

    def step(self) -> float:
        """One step, whose batch and dropout come from the random generators."""
        batch = torch.randn(4, 5) * random.random() + float(np.random.rand())
        loss = self.model(batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.loader.seen += 4
        self.progress.step += 1
        self.progress.losses = torch.cat([self.progress.losses, loss.detach().reshape(1)])
        self.progress.notes["last"] = loss.item()
        return loss.item()

    def train(self, stop: int) -> Run:
        """To step ``stop``, saving when it is due; ``stop`` is the last step."""
        for step in range(self.progress.step + 1, stop + 1):
            self.step()
            self.manager.save(step, last_step=step == stop)
        return self

    def load(self) -> LoadReport:
        report = self.manager.load()
        assert report is not None
        return report

    def everything(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
                "loader": self.loader.state_dict(),
                "progress": self.progress.state_dict(),
                "draws": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
            }
        )


def assert_same(found: Any, expected: Any, what: str = "state") -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, what
        assert torch.equal(found, expected), what
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), what
        for key, value in expected.items():
            assert_same(found[key], value, f"{what}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), what
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{what}.{number}")
    else:
        assert type(found) is type(expected), what
        assert found == expected, what


def steps_in(folder: Path) -> list[int]:
    return [entry.step for entry in catalog.scan(LocalStorage(folder.parent), folder.name)]


def states_in(folder: Path) -> dict[int, str]:
    return {entry.step: entry.state for entry in catalog.scan(LocalStorage(folder.parent), folder.name)}


def damage(step: Path) -> None:
    """Flip a bit in the middle of a tensor's data."""
    manifest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    shard = next(shard for tensor in manifest.tensors.values() for shard in tensor.shards if shard.data_nbytes > 30)
    data = bytearray((step / shard.file).read_bytes())
    data[(shard.data_offset or 0) + shard.data_nbytes // 2] ^= 0x10
    (step / shard.file).write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


# ---- resuming ----


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Weights, optimizer, schedule, counters and every random draw, to the last bit."""
    straight = Run(tmp_path / "a").train(6).everything()
    Run(tmp_path / "b").train(4)
    resumed = Run(tmp_path / "b", seed=99)
    report = resumed.load()
    assert (report.step, report.kind, report.notes) == (4, "full", ())
    assert_same(resumed.train(6).everything(), straight)


GROUPS: MakeOptimizer = lambda m: torch.optim.AdamW(  # noqa: E731
    [{"params": list(m[0].parameters()), "lr": 0.02, "weight_decay": 0.0}, {"params": list(m[2].parameters())}], lr=0.01
)


@pytest.mark.parametrize(
    "optimizer",
    [
        adamw,
        GROUPS,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
        lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.02), foreach=False, capturable=False),
        lambda m: torch.optim.RMSprop(m.parameters(), centered=True, momentum=0.1),
        lambda m: torch.optim.Adagrad(m.parameters()),
        lambda m: torch.optim.NAdam(m.parameters()),
        lambda m: torch.optim.Adadelta(m.parameters()),
    ],
    ids=["adamw", "groups", "sgd", "momentum", "amsgrad", "tensor lr", "rmsprop", "adagrad", "nadam", "adadelta"],
)
def test_optimizers_come_back(folder: Path, optimizer: MakeOptimizer) -> None:
    trained = Run(folder, optimizer=optimizer).train(2)
    fresh = Run(folder, optimizer=optimizer, seed=5)
    fresh.load()
    assert_same(fresh.everything(), trained.everything())
    for run in (trained, fresh):
        seed_all(1)
        run.step()
    assert_same(fresh.everything(), trained.everything())


class NestedState(torch.optim.SGD):
    """Keeps values beside tensors in its state, some of them deeper."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("inner", {"count": 0, "sum": torch.zeros_like(parameter), "deep": {"names": []}})
                state["inner"]["count"] += 1
                state["inner"]["sum"] += parameter.detach()
                state["inner"]["deep"]["names"] = [f"step {state['inner']['count']}"]
                state["calls"] = state["inner"]["count"]


def test_nested_optimizer_state_comes_back(folder: Path) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return NestedState(model.parameters(), lr=0.1, momentum=0.5)

    trained = Run(folder, optimizer=make).train(2)
    fresh = Run(folder, optimizer=make)
    fresh.load()
    assert_same(fresh.optimizer.state_dict(), trained.optimizer.state_dict())


class PartlyUsed(nn.Module):
    """Half of it gets no gradients, as an expert that no token is sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x)
        return out


def test_parameters_without_gradients_have_no_state_before_and_after(folder: Path) -> None:
    trained = Run(folder, model=PartlyUsed()).train(2)
    fresh = Run(folder, model=PartlyUsed())
    fresh.load()
    assert_same(fresh.everything(), trained.everything())
    assert len(fresh.optimizer.state) == 2


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 9)], [2]
        ),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=50),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 1), lr_scheduler.ConstantLR(o)], optimizer=o),
    ],
    ids=["lambda", "sequential", "one cycle", "chained"],
)
def test_schedulers_come_back(folder: Path, scheduler: Callable[[torch.optim.Optimizer], Any]) -> None:
    trained = Run(folder, scheduler=scheduler).train(3)
    fresh = Run(folder, scheduler=scheduler)
    fresh.load()
    assert_same(fresh.everything(), trained.everything())
    trained.step()
    fresh.step()
    assert trained.scheduler.get_last_lr() == fresh.scheduler.get_last_lr()


def test_random_generators_under_another_layout(folder: Path) -> None:
    """Not those of the saved run (a rank's stream has no owner any more), but the same on every attempt."""
    Run(folder, layout={"data_parallel_shard_degree": 1}).train(2)
    draws = []
    for seed in (1, 2):
        run = Run(folder, layout={"data_parallel_shard_degree": 2}, seed=seed)
        report = run.load()
        assert any("saved under other degrees of parallelism" in note for note in report.notes)
        draws.append((torch.rand(1).item(), random.random(), float(np.random.rand())))
    assert draws[0] == draws[1]
    same = Run(folder, layout={"data_parallel_shard_degree": 1})
    same.load()
    assert torch.rand(1).item() != draws[0][0]


def test_extra_state_of_modules(folder: Path) -> None:
    class Counting(nn.Linear):
        calls = 0

        def get_extra_state(self) -> dict[str, Any]:
            return {"calls": self.calls, "scale": torch.full((2,), float(self.calls))}

        def set_extra_state(self, state: dict[str, Any]) -> None:
            self.calls = state["calls"]
            self.scale = state["scale"]

    saved, fresh = Counting(5, 3), Counting(5, 3)
    saved.calls = 7
    Run(folder, model=saved).train(2)
    Run(folder, model=fresh).load()
    assert (fresh.calls, fresh.scale.tolist()) == (7, [7, 7])


def test_tied_parameters(folder: Path) -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)})
        model["b"].weight = model["a"].weight
        model.forward = lambda x: model["b"](model["a"](x))  # type: ignore[method-assign]
        return model

    trained = Run(folder, model=tied()).train(2)
    fresh = Run(folder, model=tied())
    fresh.load()
    assert_same(fresh.everything(), trained.everything())
    assert fresh.model["a"].weight is fresh.model["b"].weight


@torch.compiler.set_stance("force_eager")
def test_wrappers_leave_no_trace_in_the_keys(folder: Path, tmp_path: Path) -> None:
    """``torch.compile`` and activation checkpointing, outside and inside: any loads into any."""

    def plain() -> nn.Sequential:
        return nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))

    def inside() -> nn.Module:
        model = plain()
        model[0] = checkpoint_wrapper(model[0])
        model[1] = torch.compile(model[1], backend="eager")
        return model

    makes = {
        "plain": plain,
        "compiled": lambda: torch.compile(plain(), backend="eager"),
        "inside": inside,
        "both": lambda: torch.compile(inside(), backend="eager"),
    }
    keys = set()
    for name, make in makes.items():
        trained = Run(tmp_path / name, model=make(), seed=3).train(2)
        manifest = checkpoint_record.read_manifest(LocalStorage(tmp_path / name), "step-2")
        keys.add(frozenset(manifest.tensors))
        for other in makes.values():
            run = Run(tmp_path / name, model=other())
            run.load()
            assert_same(list(run.model.parameters()), list(trained.model.parameters()))
    assert len(keys) == 1
    assert {"0.weight", "1.bias", "optimizer.state.0.weight.exp_avg"} <= next(iter(keys))


# ---- when ----


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"interval": 3}, [3, 6, 7]),
        ({"interval": 3, "enable_first_step_checkpoint": True}, [1, 3, 6, 7]),
        ({"interval": 7}, [7]),
        ({"interval": 100}, [7]),
        ({"load_only": True}, []),
        ({"enable": False}, []),
    ],
)
def test_when_it_saves(folder: Path, config: dict[str, Any], expected: list[int]) -> None:
    Run(folder, **config).train(7)
    assert steps_in(folder) == expected


def test_save_says_whether_it_did(folder: Path) -> None:
    run = Run(folder, interval=2)
    assert [run.manager.save(step) for step in (1, 2, 3)] == [False, True, False]
    assert run.manager.save(3, last_step=True)
    assert run.manager.blocked_s > 0


def test_disabled_manager_does_nothing(folder: Path) -> None:
    run = Run(folder, enable=False)
    assert (run.manager.load(), run.manager.latest_step, run.manager.save(2)) == (None, None, False)
    run.manager.close()
    assert not folder.exists()


def test_last_save_holds_the_model_alone_in_its_export_dtype(folder: Path) -> None:
    run = Run(folder, interval=2, last_save_model_only=True, export_dtype="bfloat16").train(4)
    manifest = checkpoint_record.read_manifest(LocalStorage(folder), "step-4")
    assert manifest.kind == "model"
    assert {key: tensor.dtype for key, tensor in manifest.tensors.items()} == dict.fromkeys(
        run.model.state_dict(), "bfloat16"
    )
    assert manifest.objects == {}
    assert run.manager.latest_step == 4
    again = Run(folder, interval=2)
    report = again.load()
    assert (report.step, again.progress.step) == (2, 2)
    assert report.notes == ("step 4 is newer but holds only the model: resuming from step 2",)


def test_seed_checkpoint(folder: Path) -> None:
    """Step 0, weights alone; a run that finds nothing newer starts from it."""
    seed = Run(folder, create_seed_checkpoint=True, seed=11)
    assert seed.manager.save(0, last_step=True)
    run = Run(folder, seed=12)
    report = run.load()
    assert (report.step, report.kind, run.progress.step) == (0, "model", 0)
    assert_same(run.model.state_dict(), seed.model.state_dict())
    assert "initial weights" in report.notes[0]


# ---- which ----


def test_nothing_to_load_is_a_fresh_start(folder: Path) -> None:
    run = Run(folder)
    assert run.manager.load() is None
    assert run.manager.latest_step is None


def test_load_step(folder: Path) -> None:
    Run(folder, interval=2).train(6)
    run = Run(folder, load_step=4)
    assert (run.load().step, run.progress.step, run.manager.latest_step) == (4, 4, 6)


def test_load_step_that_is_not_there_lists_those_that_are(folder: Path) -> None:
    Run(folder, interval=2).train(6)
    with pytest.raises(CheckpointNotFoundError, match=r"step 5 does not exist in .*; steps that do: 2, 4, 6") as caught:
        Run(folder, load_step=5).manager.load()
    assert caught.value.available == (2, 4, 6)
    (folder / "step-9").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="step 9 was never committed"):
        Run(folder, load_step=9).manager.load()


def test_load_step_that_holds_only_the_model(folder: Path) -> None:
    Run(folder, last_save_model_only=True).train(3)
    with pytest.raises(StateMismatchError, match=r"holds no optimizer, no lr_scheduler.*exclude_from_loading"):
        Run(folder, load_step=3).manager.load()
    report = Run(
        folder, load_step=3, exclude_from_loading=("optimizer", "lr_scheduler", "data_loader", "train_state", "rng")
    ).load()
    assert report.step == 3


def test_only_model_only_steps_are_no_start(folder: Path) -> None:
    Run(folder, interval=100, last_save_model_only=True).train(3)
    with pytest.raises(StateMismatchError, match=r"step 3 is model-only.*initial_load_path = .*step-3"):
        Run(folder).manager.load()


@pytest.mark.parametrize("part", ["model", "optimizer", "lr_scheduler", "dataloader", "train_state", "rng"])
def test_excluded_parts_stay_as_built(folder: Path, part: str) -> None:
    trained = Run(folder).train(2).everything()
    run = Run(folder, exclude_from_loading=(part,), seed=4)
    built = run.everything()
    report = run.load()
    found = run.everything()
    names = {"lr_scheduler": "scheduler", "dataloader": "loader", "train_state": "progress", "rng": "draws"}
    left = names.get(part, part)
    # Rates are the schedule's: a loaded one sets those of a fresh optimizer, a fresh one begins with this run's.
    (group,), (built_group,), (trained_group,) = (
        state["optimizer"]["param_groups"] for state in (found, built, trained)
    )
    rates = {"optimizer": trained_group["lr"], "lr_scheduler": built_group["lr"]}
    assert group["lr"] == rates.get(part, trained_group["lr"])
    for each in (group, built_group, trained_group):
        each["lr"] = 0.0
    assert_same(found[left], built[left])
    for name in found:
        if name != left:
            assert_same(found[name], trained[name], name)
    assert f"left as initialized: {part}" in report.notes


def test_initial_load(folder: Path, tmp_path: Path) -> None:
    """Used only while the run's own folder holds no step; weights alone, or everything."""
    source = tmp_path / "pretraining"
    trained = Run(source).train(4)
    path = str(source / "step-4")

    weights = Run(folder, initial_load_path=path, seed=8)
    report = weights.load()
    assert (report.kind, weights.progress.step, len(weights.optimizer.state)) == ("full", 0, 0)
    assert_same(weights.model.state_dict(), trained.model.state_dict())

    weights.train(2)
    everything = Run(tmp_path / "other", initial_load_path=path, initial_load_model_only=False, seed=8)
    everything.load()
    assert_same(everything.everything(), trained.everything())

    again = Run(folder, initial_load_path=path)
    assert (again.load().path, again.progress.step) == (str(folder / "step-2"), 2)


def test_initial_load_of_what_stock_dcp_saved(folder: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "stock")
    run = Run(folder, initial_load_path=str(tmp_path / "stock"))
    run.load()
    assert_same(run.model.state_dict(), model.state_dict())


def test_initial_load_of_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        Run(folder, initial_load_path=str(tmp_path / "nowhere")).manager.load()


# ---- what fits ----


def test_model_with_fewer_layers_is_refused(folder: Path) -> None:
    Run(folder, model=nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3))).train(2)
    with pytest.raises(StateMismatchError) as caught:
        Run(folder, model=nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8))).manager.load()
    assert set(caught.value.unexpected) >= {"2.weight", "2.bias", "optimizer.state.2.weight.exp_avg"}
    assert "have no place in this run" in caught.value.message


def test_model_with_more_layers_is_refused(folder: Path) -> None:
    Run(folder, model=nn.Sequential(nn.Linear(5, 8))).train(2)
    with pytest.raises(StateMismatchError) as caught:
        Run(folder, model=nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 8))).manager.load()
    assert {"1.weight", "1.bias"} <= set(caught.value.missing)


def test_cast_is_reported(folder: Path, tmp_path: Path) -> None:
    trained = Run(tmp_path / "source").train(2)
    run = Run(
        folder,
        model=nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 3)).bfloat16(),
        initial_load_path=str(tmp_path / "source" / "step-2"),
    )
    report = run.load()
    assert report.cast[0] == "0.bias: float32 -> bfloat16"
    assert_same(run.model.state_dict(), {k: v.bfloat16() for k, v in trained.model.state_dict().items()})


def test_parameters_grouped_otherwise_are_refused(folder: Path) -> None:
    """Two groups with their own options can't become one without losing them."""
    Run(folder, optimizer=GROUPS).train(2)
    with pytest.raises(StateMismatchError, match=r"the optimizer puts 2\.weight in one group with 0\.weight.*lr"):
        Run(folder).manager.load()


def test_model_may_not_take_the_name_of_a_part(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model has 'optimizer\.bias'.*rename the module"):
        Run(folder, model=nn.ModuleDict({"optimizer": nn.Linear(5, 3)}))


def test_optimizer_of_another_model_is_refused(folder: Path) -> None:
    other = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"SGD steps a parameter of shape \[2, 2\] that is in no model part"):
        Run(folder, optimizer=lambda model: torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1))


# ---- errors of the caller's objects ----


def test_error_of_a_state_dict_fails_the_save_and_the_next_one_works(folder: Path) -> None:
    run = Run(folder)
    run.manager.save(2)
    whole = run.progress.state_dict
    run.progress.state_dict = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(SaveError, match="ZeroDivisionError"):
        run.manager.save(4)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".attempt")] == []
    run.progress.state_dict = whole  # type: ignore[method-assign]
    run.manager.save(6)
    assert steps_in(folder) == [2, 6]


def test_error_of_a_load_state_dict_is_raised(folder: Path) -> None:
    Run(folder).train(2)
    run = Run(folder)
    run.loader.load_state_dict = lambda state: state["no such key"]  # type: ignore[method-assign]
    with pytest.raises(MilepostError, match="KeyError: 'no such key'"):
        run.manager.load()


# ---- keeping ----


@pytest.mark.parametrize(("k", "expected"), [(0, [2, 4, 6, 8]), (1, [8]), (2, [6, 8]), (10, [2, 4, 6, 8])])
def test_keep_latest_k(folder: Path, k: int, expected: list[int]) -> None:
    Run(folder, keep_latest_k=k).train(8)
    assert steps_in(folder) == expected


def test_newest_full_step_outlives_a_model_only_last_save(folder: Path) -> None:
    Run(folder, keep_latest_k=1, last_save_model_only=True).train(7)
    assert steps_in(folder) == [6, 7]


def test_what_is_not_a_committed_step_is_neither_counted_nor_deleted(folder: Path) -> None:
    """Partial, damaged, foreign, pinned and linked steps, files and folders of the user's, the step resumed from."""
    Run(folder, keep_latest_k=0, interval=1).train(6)
    damage(folder / "step-2")
    storage = LocalStorage(folder.parent)
    catalog.mark_damaged(storage, "checkpoint/step-2", "bytes changed", now=0.0)
    marks.pin(storage, "checkpoint", 3)
    dcp.save({"w": torch.ones(2)}, checkpoint_id=folder / "step-7")
    (folder / "step-8").mkdir()
    (folder / "step-8" / "__0_0.distcp").write_bytes(b"torn")
    (folder / "step-007").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder.parent / "elsewhere").mkdir()
    (folder / "step-5").rename(folder.parent / "elsewhere" / "step-5")
    (folder / "step-5").symlink_to(folder.parent / "elsewhere" / "step-5")

    run = Run(folder, keep_latest_k=1, load_step=4)
    run.load()
    run.manager.save(10)
    assert states_in(folder) == {
        2: "damaged",
        3: "committed",
        4: "committed",
        5: "committed",
        7: "external",
        8: "incomplete",
        10: "committed",
    }
    assert (folder / "notes.txt").exists()
    assert (folder / "step-007").exists()


# ---- damage ----


def test_damaged_newest_step_is_marked_and_the_older_one_taken(folder: Path) -> None:
    reference = Run(folder, interval=2).train(4).everything()
    Run(folder, load_step=4).train(6)
    damage(folder / "step-6")
    run = Run(folder)
    report = run.load()
    assert report.step == 4
    assert report.notes[0].startswith("step 6 is newer but damaged: ")
    assert "changed after they were written" in report.notes[0]
    assert_same(run.everything(), reference)
    assert states_in(folder) == {2: "committed", 4: "committed", 6: "damaged"}
    assert run.manager.latest_step == 4
    run = Run(folder)
    assert run.load().step == 4

    run.train(6)
    assert states_in(folder) == {2: "committed", 4: "committed", 6: "committed"}
    assert Run(folder).load().step == 6


def test_all_steps_damaged_is_an_error_never_a_fresh_start(folder: Path) -> None:
    Run(folder).train(4)
    for step in (2, 4):
        damage(folder / f"step-{step}")
    for _ in range(2):  # found by reading at first, then by the marks
        with pytest.raises(
            CheckpointDamagedError,
            match=r"every step in .* is damaged; refusing to start a new run over existing steps",
        ) as caught:
            Run(folder).manager.load()
        assert "step 2: " in caught.value.message
        assert "step 4: " in caught.value.message
    with pytest.raises(CheckpointDamagedError, match="every step"):
        Run(folder, initial_load_path="/somewhere").manager.load()


def test_named_step_does_not_fall_back(folder: Path) -> None:
    Run(folder).train(4)
    damage(folder / "step-4")
    with pytest.raises(CheckpointDamagedError, match=r"digest mismatch in '.*', .*changed after they were written"):
        Run(folder, load_step=4).manager.load()
    (folder / "step-2" / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(CheckpointDamagedError, match=r"step-2 is damaged: __0_0\.distcp: expected \d+ bytes, found 5"):
        Run(folder, load_step=2).manager.load()


def test_load_only_leaves_no_mark(folder: Path) -> None:
    Run(folder).train(4)
    damage(folder / "step-4")
    before = sorted(path.name for path in folder.iterdir())
    run = Run(folder, load_only=True)
    assert run.load().step == 2
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_step_of_a_newer_milepost_is_never_passed_over_for_an_older_one(folder: Path) -> None:
    """An older Milepost that took it for damaged would go back, and prune what it can't read."""
    Run(folder).train(4)
    path = folder / "step-4" / "milepost.json"
    body = path.read_bytes().replace(b'"format_version": 2', b'"format_version": 3').rpartition(b'"crc32": "')[0]
    path.write_bytes(body + b'"crc32": "%08x"\n}\n' % crc32(body))
    for load_step in (-1, 4):
        with pytest.raises(NewerFormatError, match=r"step-4 can't be read here: .*written by a newer Milepost"):
            Run(folder, load_step=load_step).manager.load()
    assert not list(folder.glob(".damaged*"))
    assert Run(folder, load_step=2).load().step == 2


def test_a_step_of_format_1_is_resumed_as_it_was_saved(folder: Path) -> None:
    run = Run(folder).train(2)
    manifest = checkpoint_record.read_manifest(LocalStorage(folder), "step-2")
    assert manifest.structure
    files = {name: entry for name, entry in manifest.files.items() if name != SHARDS_NAME}
    (folder / "step-2" / MANIFEST_NAME).write_bytes(to_json_1(replace(manifest, files=files)))
    (folder / "step-2" / SHARDS_NAME).unlink()
    (info,) = catalog.scan(LocalStorage(folder), "")
    assert (info.lineage, info.is_resumable) == (manifest.lineage, True)
    resumed = Run(folder, seed=1)
    assert resumed.load().step == 2
    assert_same(resumed.everything(), run.everything())


def test_the_commit_record_stays_small_whatever_the_train_state_holds(folder: Path) -> None:
    run = Run(folder)
    run.progress.notes = {f"worker {worker}": {"shards": {f"file {n}": n for n in range(60)}} for worker in range(60)}
    run.train(2)
    assert (folder / "step-2" / MANIFEST_NAME).stat().st_size < 4096
    resumed = Run(folder, seed=1)
    resumed.load()
    assert resumed.progress.notes == run.progress.notes


def change_record(step: Path, manifest: Manifest) -> None:
    """Give a committed step another record."""
    entries = {"tensors": dict(manifest.tensors), "objects": dict(manifest.objects)}
    for name, content in record_files(replace(manifest, **entries)).items():
        (step / name).write_bytes(content)


def test_hostile_paths_are_refused(folder: Path) -> None:
    """A manifest whose paths ask for a list of 10**15 elements costs an error, not the memory."""
    Run(folder).train(2)
    manifest = checkpoint_record.read_manifest(LocalStorage(folder), "step-2")
    assert manifest.paths["train_state.history.1.n"] == ("train_state", "history", 1, "n")
    paths = {**manifest.paths, "train_state.history.1.n": ("train_state", "history", 10**15, "n")}
    # As in a checkpoint of before structures were recorded: then the paths tell what the containers were.
    change_record(folder / "step-2", replace(manifest, paths=paths, structure=b""))
    with pytest.raises(CheckpointDamagedError, match="which belongs to another key"):
        Run(folder, load_step=2).manager.load()
    absurd = f"train_state.history.{10**15}.n"
    paths = {k: v for k, v in manifest.paths.items() if k != "train_state.history.1.n"}
    objects = {absurd if key == "train_state.history.1.n" else key: entry for key, entry in manifest.objects.items()}
    paths[absurd] = ("train_state", "history", 10**15, "n")
    change_record(folder / "step-2", replace(manifest, paths=paths, objects=objects, structure=b""))
    with pytest.raises(CheckpointDamagedError, match="contradicts its other paths or is invalid"):
        Run(folder, load_step=2).manager.load()
