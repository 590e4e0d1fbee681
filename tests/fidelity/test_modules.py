"""Modules are restored through their own ``load_state_dict()``: hooks, overrides, extra state, projections that are
shown split and held fused, copies, plain values, modules on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager, SaveError, StateMismatchError

CONFIG = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)


class FusedQkv(nn.Module):
    """Holds one weight and shows three, as fused projections do to keep the names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(4, 12, bias=False)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._fuse)

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        q, k, v = state.pop(f"{prefix}wqkv.weight").chunk(3)
        state.update(
            {f"{prefix}wq.weight": q.clone(), f"{prefix}wk.weight": k.clone(), f"{prefix}wv.weight": v.clone()}
        )

    @staticmethod
    def _fuse(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        parts = [state.pop(f"{prefix}w{name}.weight") for name in "qkv"]
        state[f"{prefix}wqkv.weight"] = torch.cat(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.wqkv(x)
        return out


class SplitIntoViews(FusedQkv):
    """Shows views of what it holds, the other way round: filled in place they would be right only by luck."""

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        q, k, v = state.pop(f"{prefix}wqkv.weight").chunk(3)
        state.update({f"{prefix}wq.weight": q.t(), f"{prefix}wk.weight": k.t(), f"{prefix}wv.weight": v.t()})

    @staticmethod
    def _fuse(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        parts = [state.pop(f"{prefix}w{name}.weight").t() for name in "qkv"]
        state[f"{prefix}wqkv.weight"] = torch.cat(parts)


class Normalised(nn.Linear):
    """Keeps a cache that it rebuilds at every load."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.loads = 0
        self.norm = 0.0
        self.register_load_state_dict_post_hook(lambda module, keys: module.remember())

    def remember(self) -> None:
        self.loads += 1
        self.norm = self.weight.norm().item()


class Grown(nn.Module):
    """An extra state of any kind and size, another one at each save."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.memory: Any = None

    def get_extra_state(self) -> Any:
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        self.memory = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


class Overridden(nn.Linear):
    """Takes part in its own state with a plain value, under a name that no tensor has."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.calls = 0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        state[f"{kwargs.get('prefix', '')}calls"] = self.calls
        return state

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.calls = state.pop(f"{prefix}calls")
        super()._load_from_state_dict(state, prefix, *args)


class Scaled(nn.Linear):
    """Shows its weight in other units than it holds it."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"] * 1024

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] / 1024
        super()._load_from_state_dict(state, prefix, *args)


class Expanded(nn.Linear):
    """A buffer whose rows are one in memory."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.rand(1, 4).expand(3, 4))


MAKES: dict[str, Callable[[], nn.Module]] = {
    "fused, shown split": FusedQkv,
    "fused, shown as transposed views": SplitIntoViews,
    "inside others": lambda: nn.Sequential(FusedQkv(), nn.Linear(12, 4), nn.Sequential(Normalised(), Grown())),
    "a hook after loading": Normalised,
    "overridden": Overridden,
    "shown in other units": lambda: nn.Sequential(Scaled(4, 4), nn.BatchNorm1d(4)),
    "without a state": nn.ReLU,
    "quantized": lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
}


def manager(folder: Path, model: nn.Module, **parts: Any) -> CheckpointManager:
    return CheckpointManager(folder, CONFIG, model=model, **parts)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_what_a_module_holds_comes_back(memory_path: Path, make: Callable[[], nn.Module]) -> None:
    """Through the manager and through ``milepost.load``, as ``load_state_dict()`` itself does it."""
    saved, loaded, plain, expected = make(), make(), make(), make()
    saved(torch.randn(3, 4))
    if isinstance(saved, Overridden):
        saved.calls = 7
    expected.load_state_dict(copy.deepcopy(saved.state_dict()))
    first = manager(memory_path / "run", saved)
    first.save(1)
    first.close()
    second = manager(memory_path / "run", loaded)
    second.load()
    second.close()
    milepost.save(memory_path / "plain", {"model": saved})
    milepost.load(memory_path / "plain", {"model": plain})
    for module in (loaded, plain):
        assert_same(list(module.parameters()), list(expected.parameters()))
        assert_same(list(module.buffers()), list(expected.buffers()))
        for part, other in zip(module.modules(), expected.modules(), strict=True):
            for name in ("calls", "norm", "loads"):
                assert getattr(part, name, None) == getattr(other, name, None)


@pytest.mark.parametrize(
    "memory",
    [None, 3, {}, {"scale": torch.ones(2), "steps": 1}, torch.arange(5), [], b"\x00\xff", [torch.ones(1), {"a": 2}]],
    ids=repr,
)
def test_extra_state_of_any_kind_and_size(memory_path: Path, memory: Any) -> None:
    """Loaded into modules whose own extra state is of another kind at that moment."""
    saved = Grown()
    saved.memory = memory
    first = manager(memory_path / "run", saved)
    first.save(1)
    first.close()
    for before in (None, {"calls": 0, "scale": torch.zeros(7)}, torch.zeros(2)):
        loaded = Grown()
        loaded.memory = before
        second = manager(memory_path / "run", loaded)
        second.load()
        second.close()
        assert_same(loaded.memory, memory)
        assert_same(loaded.linear.weight, saved.linear.weight)


def test_modules_on_the_meta_device_are_given_memory(memory_path: Path) -> None:
    """The optimizer that was created over them steps the loaded parameters."""
    torch.manual_seed(0)
    saved = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(saved.parameters(), lr=0.1)
    saved(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    first = manager(memory_path / "run", saved, optimizer=optimizer)
    first.save(1)
    first.close()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    again = torch.optim.AdamW(model.parameters(), lr=0.1)
    second = manager(memory_path / "run", model, optimizer=again)
    second.load()
    second.close()
    milepost.save(memory_path / "plain", {"model": saved})
    milepost.load(memory_path / "plain", {"model": plain})
    batch = torch.randn(8, 4)
    for module, stepper in ((saved, optimizer), (model, again)):
        stepper.zero_grad()
        module(batch).square().sum().backward()
        stepper.step()
    assert_same(model.state_dict(), saved.state_dict())
    assert {parameter.device.type for parameter in plain.parameters()} == {"cpu"}


def test_elements_that_are_one_in_memory_are_filled_once(memory_path: Path) -> None:
    """Stock ``load_state_dict()`` fails on them."""
    saved, loaded = Expanded(), Expanded()
    first = manager(memory_path / "run", saved)
    first.save(1)
    first.close()
    second = manager(memory_path / "run", loaded)
    second.load()
    second.close()
    assert_same(loaded.state_dict()["mask"], saved.mask)
    assert loaded.mask.stride() == (0, 1)
    milepost.save(memory_path / "step-1", {"mask": torch.arange(12.0).view(3, 4)})
    into = {"mask": torch.zeros(1, 4).expand(3, 4)}
    with pytest.raises(milepost.StateMismatchError, match="mask: different values in the checkpoint for elements"):
        milepost.load(memory_path / "step-1", into)
    assert not into["mask"].any()


def test_tensors_are_filled_where_they_are(memory_path: Path) -> None:
    """A plain module keeps its memory: nothing is copied twice."""
    saved, loaded = nn.Linear(4, 4), nn.Linear(4, 4)
    first = manager(memory_path / "run", saved)
    first.save(1)
    first.close()
    pointers = [parameter.data_ptr() for parameter in loaded.parameters()]
    second = manager(memory_path / "run", loaded)
    second.load()
    second.close()
    assert [parameter.data_ptr() for parameter in loaded.parameters()] == pointers
    assert_same(loaded.weight, saved.weight)


class Observer(nn.Module):
    """A module that takes another shape than it has, as those of quantization-aware training do."""

    scale: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("scale", torch.arange(float(channels)))
        self.weight = nn.Parameter(torch.full((2,), float(channels)))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if state[f"{prefix}scale"].numel() > 3:
            rest[-1].append("no more than 3 channels")
        self.scale = torch.empty_like(state[f"{prefix}scale"])
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_module_that_takes_another_shape(memory_path: Path) -> None:
    for channels in (3, 4):
        saved, loaded = (nn.Sequential(nn.Linear(1, 1), Observer(n)) for n in (channels, 1))
        before = [parameter.detach().clone() for parameter in loaded.parameters()]
        milepost.save(memory_path / str(channels), {"model": saved})
        if channels == 3:
            milepost.load(memory_path / str(channels), {"model": loaded})
            assert_same(dict(loaded.state_dict()), dict(saved.state_dict()))
            continue
        with pytest.raises(StateMismatchError, match="1: no more than 3 channels"):
            milepost.load(memory_path / str(channels), {"model": loaded})
        assert_same([parameter.detach() for parameter in loaded.parameters()], before)
        assert loaded[1].scale.tolist() == [0]


def test_lazy_modules_and_what_stays_on_the_meta_device(memory_path: Path) -> None:
    saved = nn.Sequential(nn.Linear(3, 2))
    milepost.save(memory_path / "one", {"model": saved})
    lazy = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(SaveError, match=r"model\.0\.weight is of a lazy module"):
        milepost.save(memory_path / "lazy", {"model": lazy})
    milepost.load(memory_path / "one", {"model": lazy})
    assert_same(dict(lazy.state_dict()), dict(saved.state_dict()))
    with torch.device("meta"):
        larger = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    report = milepost.load(memory_path / "one", {"model": larger}, allow_missing=["model.1"])
    assert "on the meta device and not loaded, so still without values: 1.weight" in report.notes
