"""``milepost.load``: fresh objects and empty containers are filled, all of a checkpoint can be had without a template,
and nothing is left out or left unfilled silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same
from torch import nn

import milepost
from milepost import CheckpointDamagedError, CheckpointNotFoundError, ConfigError, StateMismatchError


class Part:
    """State of a loop."""

    def __init__(self, **state: Any):
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(memory_path: Path) -> tuple[str, dict[str, Any]]:
    """A checkpoint with a bit of everything, and its state dict."""
    model, optimizer = trained()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "history": [1, 2, {"seen": torch.ones(2)}],
        "options": {"rate": 0.1, 5: (1, 2)},
        "nothing": None,
        "empty": {},
    }
    milepost.save(memory_path / "step-1", state)
    return str(memory_path / "step-1"), state


def test_the_whole_state_dict_without_a_template(saved: tuple[str, dict[str, Any]]) -> None:
    path, state = saved
    assert_same(milepost.load(path), state)


def test_the_whole_state_dict_mapped(memory_path: Path) -> None:
    """Tensors are views of the files; they may be changed, which changes no file; what is damaged is refused."""
    state = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "none": torch.zeros(0, 2), "values": [1, "a"]}
    milepost.save(memory_path / "step-1", state)
    found = milepost.load(memory_path / "step-1", mmap=True)
    assert_same(found, state)
    assert found["w"].untyped_storage().data_ptr() == found["n"].untyped_storage().data_ptr()  # the file's
    found["w"].add_(1)
    assert_same(milepost.load(memory_path / "step-1"), state)
    with pytest.raises(ConfigError, match="can't be combined with a state dict"):
        milepost.load(memory_path / "step-1", {"w": torch.zeros(2, 3)}, mmap=True)  # type: ignore[call-overload]
    (file,) = (memory_path / "step-1").glob("*.distcp")
    data = file.read_bytes()
    place = data.index(state["w"].numpy().tobytes())
    file.write_bytes(data[:place] + b"x" + data[place + 1 :])
    with pytest.raises(CheckpointDamagedError, match="step-1 is damaged"):
        milepost.load(memory_path / "step-1", mmap=True)


def test_the_whole_of_a_run_of_many_small_values(memory_path: Path) -> None:
    state = {"seen": {n: [n, str(n)] for n in range(3000)}, "w": torch.arange(5)}
    milepost.save(memory_path / "small", state)
    assert_same(milepost.load(memory_path / "small"), state)


def test_a_step_of_a_manager_as_a_whole(memory_path: Path) -> None:
    model, optimizer = trained()
    with milepost.CheckpointManager(memory_path / "run", model=model, optimizer=optimizer) as manager:
        manager.save(500)
    found = milepost.load(memory_path / "run" / "step-500")
    assert_same({key: found[key] for key in model.state_dict()}, dict(model.state_dict()))
    assert found["optimizer"]["state.0.weight.exp_avg"].shape == (4, 3)


def test_empty_places_are_filled(saved: tuple[str, dict[str, Any]]) -> None:
    path, state = saved
    for empty in ({}, None):
        into = {key: empty if isinstance(value, dict) else None for key, value in state.items()}
        milepost.load(path, into)
        assert_same(into, state)
    into = {**state, "history": [], "options": {}}
    milepost.load(path, into)
    assert_same(into["history"], state["history"])


def test_fresh_objects_are_filled(memory_path: Path) -> None:
    model, optimizer = trained()
    state = {"model": model, "optimizer": optimizer, "part": Part(n=1, seen=[torch.ones(2)])}
    milepost.save(memory_path / "step-1", state)
    fresh = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    again, part = torch.optim.AdamW(fresh.parameters()), Part()
    milepost.load(memory_path / "step-1", {"model": fresh, "optimizer": again, "part": part})
    assert_same(fresh.state_dict(), model.state_dict())
    assert_same(again.state_dict(), optimizer.state_dict())
    assert_same(part.state, state["part"].state)


def test_modules_and_state_dicts_on_the_meta_device(memory_path: Path) -> None:
    model, optimizer = trained()
    milepost.save(memory_path / "step-1", {"model": model.state_dict(keep_vars=True)})
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    milepost.load(memory_path / "step-1", {"model": bare})
    assert_same(bare.state_dict(), model.state_dict())
    into = {"model": other.state_dict()}
    milepost.load(memory_path / "step-1", into)
    other.load_state_dict(into["model"], assign=True)
    assert_same(other.state_dict(), model.state_dict())
    del optimizer


# ---- what does not fit ----


def test_strict_means_both_directions(saved: tuple[str, dict[str, Any]]) -> None:
    path, state = saved
    into = {"model": {key: torch.zeros_like(value) for key, value in state["model"].items()}}
    del into["model"]["1.bias"]
    with pytest.raises(StateMismatchError, match="nothing was changed") as caught:
        milepost.load(path, into)
    assert 'allow_unexpected=["empty"' not in caught.value.message
    assert {"model.1.bias", "epoch", "options.rate"} <= set(caught.value.unexpected)
    assert not any(value.any() for value in into["model"].values())
    report = milepost.load(
        path, into, allow_unexpected=["optimizer", "hist*", "options.*", "epoch", "no*", "model.1.*"]
    )
    assert torch.equal(into["model"]["0.weight"], state["model"]["0.weight"])
    passed = {found.pattern: found.keys for found in report.let_pass}
    assert passed["model.1.*"] == ("model.1.bias",)
    assert set(passed["options.*"]) == {"options.rate", "options.5"}


def test_what_the_checkpoint_lacks(memory_path: Path) -> None:
    milepost.save(memory_path / "step-1", {"body": torch.ones(2)})
    into = {"body": torch.zeros(2), "head": {"w": torch.zeros(2), "b": torch.zeros(2)}}
    with pytest.raises(StateMismatchError, match=r'give allow_missing=\["head.\*"\]'):
        milepost.load(memory_path / "step-1", into)
    assert not into["body"].any()
    report = milepost.load(memory_path / "step-1", into, allow_missing=["head"])
    assert into["body"].tolist() == [1, 1]
    assert [str(passed) for passed in report.let_pass] == [
        "allow_missing head: 2 keys left as they were: head.b, head.w"
    ]


@pytest.mark.parametrize("into", [{}, {"other": torch.zeros(2)}, {"a": {}}], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_loading_nothing_is_no_success(memory_path: Path, into: dict[str, Any], strict: bool) -> None:
    milepost.save(memory_path / "step-1", {"w": torch.ones(2)})
    with pytest.raises(StateMismatchError):
        milepost.load(memory_path / "step-1", into, strict=strict)


def test_a_list_cut_short_is_refused(memory_path: Path) -> None:
    milepost.save(memory_path / "step-1", {"averages": [torch.ones(2), torch.ones(2)]})
    for short in ([torch.zeros(2)], [torch.zeros(2)] * 3):
        with pytest.raises(StateMismatchError):
            milepost.load(memory_path / "step-1", {"averages": list(short)})


def test_integers_that_their_place_cannot_hold(memory_path: Path) -> None:
    milepost.save(memory_path / "step-1", {"n": torch.tensor([3, 3_000_000_000]), "m": torch.tensor([3])})
    small = {"n": torch.zeros(2, dtype=torch.int32), "m": torch.zeros(1, dtype=torch.int8)}
    with pytest.raises(StateMismatchError, match=r"n: 3 to 3000000000 in the checkpoint, torch.int32 here"):
        milepost.load(memory_path / "step-1", small)
    assert not small["m"].any()
    milepost.load(memory_path / "step-1", {"m": small["m"]}, allow_unexpected=["n"])
    assert small["m"].tolist() == [3]


# ---- first mistakes ----


def test_a_run_where_a_checkpoint_is_wanted_and_the_other_way(memory_path: Path) -> None:
    model, _ = trained()
    with milepost.CheckpointManager(memory_path / "run", model=model) as manager:
        manager.save(500)
    with pytest.raises(CheckpointNotFoundError, match=r"is the folder of a run.*run/step-500"):
        milepost.load(memory_path / "run")
    with pytest.raises(ConfigError, match=r"is a checkpoint, not the folder of a run.*load_step=500"):
        milepost.CheckpointManager(memory_path / "run" / "step-500", model=model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step-1", nn.Linear(1, 1)), r'such as {"model": model}'),
        (({"w": torch.ones(1)}, "step-1"), "the path comes first"),
        (("step-1", [torch.ones(1)]), "expected a dict to fill"),
        (("step-1", {"w": torch.ones(1)}, "w"), None),
    ],
    ids=["a module", "swapped", "a list", "too many"],
)
def test_wrong_arguments(arguments: Any, message: str | None) -> None:
    with pytest.raises(ConfigError if message else TypeError, match=message):
        milepost.load(*arguments)
    if message:
        with pytest.raises(ConfigError, match='write allow_missing=\\["a"\\]'):
            milepost.load("step-1", {"w": torch.ones(1)}, allow_missing="a")
