"""A resumed run has the state of the one that was saved, in every part; what does not fit is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_run import MakeOptimizer, Run, adamw, assert_same, seed_all
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import lr_scheduler

from milepost.errors import ConfigError, StateMismatchError
from milepost.run import checkpoint_record
from milepost.storage import LocalStorage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")


# ---- state ----


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
    """Half of it gets no gradients, like an expert without tokens."""

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
