"""Optimizers with unusual state, options or forms, containers and wrappers of them, and ones with state already."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same import assert_same, digest
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import CONFIG, build, load, new_model, save, train

from milepost import CheckpointConfig, CheckpointManager, SaveError, StateMismatchError
from milepost.run import checkpoint_record
from milepost.storage import LocalStorage


class Odd(torch.optim.SGD):
    """Keeps state for the whole run, text, and statistics in higher precision than its parameters."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        shared = self.state.setdefault("shared", {"calls": 0, "norms": []})
        shared["calls"] += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["precise"] = state.get("precise", 0) + parameter.detach().double() / 3
                state["label"] = f"step {shared['calls']}"
                state["seen"] = (shared["calls"], "twice")
                state["counts"] = torch.full(parameter.shape, shared["calls"])
                state["mask"] = parameter.detach() > 0
        shared["norms"].append(float(self.param_groups[0]["params"][0].detach().norm()))
        return loss


def test_state_that_belongs_to_no_parameter_and_state_that_stock_torch_would_change(memory_path: Path) -> None:
    model, resumed = (new_model("SGD", seed).bfloat16() for seed in (0, 1))
    optimizer, again = (Odd(m.parameters(), lr=0.1, momentum=0.9) for m in (model, resumed))
    train(model, optimizer, range(3))
    save(memory_path / "run", model, optimizer)
    load(memory_path / "run", resumed, again)
    assert_same(again.state_dict(), optimizer.state_dict())
    assert again.state_dict()["state"]["shared"]["calls"] == 3
    assert again.state_dict()["state"][0]["precise"].dtype == torch.float64


def test_a_model_in_another_dtype_takes_its_optimizer_along(memory_path: Path) -> None:
    """fp32 state of an fp32 model goes with the model into bf16, as torch does it."""
    model = new_model("AdamW", 0)
    optimizer = build("AdamW", model)
    train(model, optimizer, range(2))
    save(memory_path / "run", model, optimizer)
    resumed = new_model("AdamW", 1).bfloat16()
    again = build("AdamW", resumed)
    load(memory_path / "run", resumed, again)
    found, expected = again.state_dict()["state"][0], optimizer.state_dict()["state"][0]
    assert_same(found["exp_avg"], expected["exp_avg"].bfloat16())
    assert_same(found["step"], expected["step"])


def test_hooks_of_the_user_see_what_is_saved_and_loaded(memory_path: Path) -> None:
    model = new_model("Adam", 0)
    optimizer = build("Adam", model)
    train(model, optimizer, range(2))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "from a hook"})
    save(memory_path / "run", model, optimizer)
    resumed = new_model("Adam", 1)
    again = build("Adam", resumed)
    seen: list[Any] = []
    again.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["note"]))
    again.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    load(memory_path / "run", resumed, again)
    assert seen == ["from a hook", 5]


class PerParameter(Optimizer):
    """Calls ``update`` for each parameter, by its position."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            self.update(number, parameter)

    def update(self, number: int, parameter: Any) -> None:
        raise NotImplementedError


class Precise(PerParameter):
    """Keeps fp32 state and text of bf16 parameters, which stock ``load_state_dict()`` changes."""

    def update(self, number: int, parameter: Any) -> None:
        entry = self.state[parameter] or {"sum": torch.zeros(parameter.shape), "kind": "fp32", "step": 0}
        entry["sum"] += parameter.grad.float()
        entry["step"] += 1
        self.state[parameter] = entry
        parameter.sub_(entry["sum"].bfloat16(), alpha=0.01)


class Sums(PerParameter):
    """Keeps a tensor, a list or a number of each parameter, not a mapping."""

    def update(self, number: int, parameter: Any) -> None:
        kept: Any = self.state.get(parameter)
        new: Any
        if number % 3 == 0:
            new = parameter.grad if kept is None else kept + parameter.grad
        elif number % 3 == 1:
            new = [parameter.grad, 0] if kept is None else [kept[0] * 0.5, kept[1] + 1]
        else:
            new = (kept or 0) + 1
        self.state[parameter] = new
        parameter.sub_(parameter.grad, alpha=0.01)


def test_state_that_is_no_mapping(memory_path: Path) -> None:
    model, resumed = new_model("SGD", 0), new_model("SGD", 1)
    optimizer, again = Sums(model.parameters()), Sums(resumed.parameters())
    train(model, optimizer, range(2))
    save(memory_path / "run", model, optimizer)
    load(memory_path / "run", resumed, again)
    assert_same(again.state_dict(), optimizer.state_dict())


def test_options_of_any_kind(memory_path: Path) -> None:
    """Options that don't compare as numbers do: arrays, NaN, tensors in lists. Of a group that is then split, too."""
    options: Any = {
        "array": np.arange(2),
        "nan": math.nan,
        "nested": {"a": [torch.ones(2)], "b": math.nan},
        "rate": torch.tensor([0.5, math.nan]),
    }
    model, resumed = new_model("SGD", 0), new_model("SGD", 1)
    parameters = list(resumed.parameters())
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), **options}], lr=0.1)
    blank = dict.fromkeys(options)
    again = torch.optim.SGD([{"params": parameters[:2], **blank}, {"params": parameters[2:], **blank}], lr=0.1)
    save(memory_path / "run", model, optimizer)
    load(memory_path / "run", resumed, again)
    for group in again.param_groups:
        assert_same({name: group[name] for name in options}, options)


class AsIf:
    """A wrapper of an optimizer that is not an ``Optimizer`` itself."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("register"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)


class AsOne(Optimizer):
    """A wrapper of an optimizer that subclasses ``Optimizer`` without using it, like accelerate's."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


class Sharp(Optimizer):
    """Wraps an optimizer and shows its own state alone, as published implementations of SAM do."""

    def __init__(self, parameters: Any, base: Any, **options: Any):
        super().__init__(parameters, options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.detach().clone()
        self.base.step(closure)


def test_a_wrapper_that_leaves_out_what_it_wraps_is_refused(memory_path: Path) -> None:
    model = new_model("SGD", 0)
    optimizer = Sharp(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    save(memory_path / "untrained", model, optimizer)
    train(model, optimizer, range(2))
    with pytest.raises(SaveError, match=r"SGD that it wraps as `base`.*optimizer=optimizer.base, states="):
        save(memory_path / "run", model, optimizer)
    runs = []
    for door in ("save", "load"):
        resumed = model if door == "save" else new_model("SGD", 1)
        again = optimizer if door == "save" else Sharp(resumed.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        with CheckpointManager(
            memory_path / "both", CONFIG, model=resumed, optimizer=again.base, states={"sharp": again}
        ) as manager:
            manager.save(1) if door == "save" else manager.load()
        runs.append((again.state_dict(), again.base.state_dict(), resumed.state_dict()))
    assert_same(runs[1], runs[0])


def test_an_optimizer_as_the_state_of_a_loop(memory_path: Path) -> None:
    model, resumed = (new_model("SGD", seed).bfloat16() for seed in (0, 1))
    optimizer, again = Precise(model.parameters()), Precise(resumed.parameters())
    train(model, optimizer, range(2))
    for held, door in ((optimizer, "save"), (again, "load")):
        with CheckpointManager(memory_path, CONFIG, model=nn.Linear(1, 1), train_state=held) as manager:
            manager.save(1) if door == "save" else manager.load()
    assert_same(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, AsIf, AsOne], ids=["bare", "as if", "as one"])
def test_an_optimizer_behind_another_object(memory_path: Path, wrap: Any) -> None:
    model, resumed = (new_model("SGD", seed).bfloat16() for seed in (0, 1))
    optimizer, again = Precise(model.parameters()), Precise(resumed.parameters())
    train(model, optimizer, range(2))
    save(memory_path / "run", model, wrap(optimizer))
    load(memory_path / "run", resumed, wrap(again))
    assert_same(again.state_dict(), optimizer.state_dict())


def test_options_of_a_group_without_parameters(memory_path: Path) -> None:
    """To which parameters are added later, as layers are unfrozen."""
    groups: Any = [{"params": [], "lr": 0.5, "name": "head"}, {"params": []}]
    model, resumed = new_model("SGD", 0), new_model("SGD", 1)
    groups[1]["params"] = list(model.parameters())
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, range(1))
    schedule.step()
    save(memory_path / "run", model, optimizer)
    again = torch.optim.SGD([{**groups[0], "params": []}, {"params": list(resumed.parameters())}], lr=0.1)
    load(memory_path / "run", resumed, again)
    assert [group["lr"] for group in again.param_groups] == [0.25, 0.05]


# ---- containers ----


class Bare(Optimizer):
    """A container that adds nothing: its members hold the state."""

    def __init__(self, optimizers: list[Optimizer]):
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class Named(Bare):
    """A container whose state dict is flat and goes by the names of the parameters, as torchtitan's is."""

    def __init__(self, optimizers: list[Optimizer], model: nn.Module):
        self.model = model
        super().__init__(optimizers)

    def _entries(self) -> Iterator[tuple[Optimizer, dict[str, Any], nn.Parameter, str]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield optimizer, group, parameter, names[parameter]

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for optimizer, group, parameter, name in self._entries():
            flat.update({f"state.{name}.{key}": value for key, value in optimizer.state[parameter].items()})
            flat.update({f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"})
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, group, parameter, name in self._entries():
            start = f"state.{name}."
            optimizer.state[parameter] = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
            for key in group:
                if key != "params":
                    group[key] = state_dict[f"param_groups.{name}.{key}"]


def contained(kind: str, model: nn.Module) -> Any:
    embedding, *layers = list(model.children())
    members: list[Optimizer] = [
        torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW([p for layer in layers for p in layer.parameters()], lr=0.02),
    ]
    if kind == "several":
        return members
    return Bare(members) if kind == "bare" else Named(members, model)


def members_of(optimizer: Any) -> list[Optimizer]:
    return optimizer if isinstance(optimizer, list) else list(optimizer.optimizers)


@pytest.mark.parametrize("loaded_as", ["several", "bare", "named"])
@pytest.mark.parametrize("saved_as", ["several", "bare", "named"])
def test_containers_of_optimizers(memory_path: Path, saved_as: str, loaded_as: str) -> None:
    """None saves an empty optimizer, and each is loaded from what another saved."""
    model, resumed = new_model("AdamW", 0), new_model("AdamW", 1)
    optimizer, again = contained(saved_as, model), contained(loaded_as, resumed)
    for member in members_of(optimizer):
        train(model, member, range(2))
    save(memory_path / "run", model, optimizer)
    manifest = checkpoint_record.read_manifest(LocalStorage(memory_path / "run"), "step-1")
    assert {"optimizer.state.embedding.weight.momentum_buffer", "optimizer.state.layers.0.weight.exp_avg"} <= set(
        manifest.tensors
    )
    load(memory_path / "run", resumed, again)
    for found, expected in zip(members_of(again), members_of(optimizer), strict=True):
        assert digest(found.state_dict()["param_groups"]) == digest(expected.state_dict()["param_groups"])
        for index, entry in expected.state_dict()["state"].items():
            for key, value in entry.items():
                assert_same(found.state_dict()["state"][index][key], value)


def test_names_of_parameters_are_stored_once(memory_path: Path) -> None:
    model, resumed = new_model("AdamW", 0), new_model("AdamW", 1)
    optimizer, again = (torch.optim.AdamW(m.named_parameters(), lr=0.1) for m in (model, resumed))
    train(model, optimizer, range(2))
    save(memory_path / "run", model, optimizer)
    load(memory_path / "run", resumed, again)
    assert_same(again.state_dict(), optimizer.state_dict())
    assert again.param_groups[0]["param_names"] == [name for name, _ in resumed.named_parameters()]
    manifest = checkpoint_record.read_manifest(LocalStorage(memory_path / "run"), "step-1")
    assert not [key for key in manifest.objects if "param_names" in key]


def test_loading_into_an_optimizer_that_has_state_already(memory_path: Path) -> None:
    """It keeps its memory, and loses what the checkpoint does not have."""
    model = new_model("AdamW", 0)
    optimizer = build("AdamW", model)
    train(model, optimizer, range(2))
    save(memory_path / "run", model, optimizer)
    expected = digest(optimizer.state_dict())
    memory = optimizer.state[model.embedding.weight]["exp_avg"].data_ptr()
    train(model, optimizer, range(2, 4))
    optimizer.state[model.embedding.weight]["made later"] = torch.ones(3)
    load(memory_path / "run", model, optimizer)
    assert digest(optimizer.state_dict()) == expected
    assert optimizer.state[model.embedding.weight]["exp_avg"].data_ptr() == memory


def test_a_refused_load_leaves_no_step_behind(memory_path: Path) -> None:
    model = new_model("AdamW", 0)
    optimizer = build("AdamW", model)
    train(model, optimizer, range(2))
    save(memory_path / "run", model, optimizer)
    other = nn.Sequential(nn.Linear(3, 3))
    fresh = torch.optim.AdamW(other.parameters())
    with pytest.raises(StateMismatchError):
        load(memory_path / "run", other, fresh)
    assert not fresh.state


class MadeWhenAsked(torch.optim.AdamW):
    """Creates its state by a step when it is requested, in its own form, like torchtitan's container."""

    def state_dict(self) -> dict[str, Any]:
        if not self.state:
            for parameter in self.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            rate, self.param_groups[0]["lr"] = self.param_groups[0]["lr"], 0.0
            self.step()
            self.param_groups[0]["lr"] = rate
            self.zero_grad()
        return {str(number): dict(entry) for number, entry in enumerate(self.state.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for entry, saved in zip(self.state.values(), state_dict.values(), strict=True):
            entry.update(saved)


@pytest.mark.parametrize("excluded", [(), ("optimizer",)])
def test_an_optimizer_is_not_asked_for_its_state_before_a_new_run(memory_path: Path, excluded: tuple[str, ...]) -> None:
    model = nn.Linear(2, 2)
    for _ in range(2 if excluded else 1):
        optimizer = MadeWhenAsked(model.parameters())
        config = CheckpointConfig(enable=True, interval=1, exclude_from_loading=excluded)
        with CheckpointManager(memory_path, config, model=model, optimizer=optimizer) as manager:
            manager.load()
            assert not optimizer.state, "it has taken a step"
            model(torch.ones(2)).sum().backward()
            optimizer.step()
            assert all(entry["step"] == 1 for entry in optimizer.state.values())
            manager.save(1)
