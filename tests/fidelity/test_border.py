"""Arguments: every accepted form, and explanations of common mistakes."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same import assert_same
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager, ConfigError, RunLockedError, SaveError
from milepost.testing.world import run_world

MODES = ["disabled", "async", "async_with_pinned_mem"]


def net() -> nn.Module:
    return nn.Linear(4, 4)


# ---- steps ----


@pytest.mark.parametrize("step", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=repr)
def test_a_step_of_any_integral_type(memory_path: Path, step: Any) -> None:
    with CheckpointManager(memory_path / "run", CheckpointConfig(interval=1), model=net()) as manager:
        assert manager.save(step)
    assert (memory_path / "run" / "step-3" / "milepost.json").exists()


@pytest.mark.parametrize("step", [3.0, "3", None, True, -1, 10**18, torch.tensor([3]), torch.tensor(3.0)], ids=repr)
def test_anything_else_is_refused(memory_path: Path, step: Any) -> None:
    with (
        CheckpointManager(memory_path / "run", CheckpointConfig(interval=1), model=net()) as manager,
        pytest.raises(ConfigError, match=r"^step .*expected a"),
    ):
        manager.save(step)


# ---- options ----

BAD: list[tuple[str, Any]] = [
    ("enable", "yes"),
    ("folder", None),
    ("interval", 1.5),
    ("interval", "Auto"),
    ("interval", True),
    ("interval_seconds", float("nan")),
    ("mtbf_hours", "x"),
    ("initial_load_path", 3),
    ("export_dtype", "bf16"),
    ("export_dtype", torch.bfloat16),
    ("async_mode", "Async"),
    ("on_save_error", "ignore"),
    ("check_replicas", 1.5),
    ("num_io_threads", "2"),
    ("page_cache", True),
    ("keep_latest_k", None),
    ("mode", "Min"),
    ("load_step", 1.5),
    ("exclude_from_loading", "optimizer"),
    ("exclude_from_loading", (3,)),
    ("load_only", 1),
]


@pytest.mark.parametrize(("option", "value"), BAD, ids=[f"{option}={value!r}" for option, value in BAD])
def test_a_bad_value_of_an_option(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{option} must be") as caught:
        CheckpointConfig(**{option: value})
    assert repr(value) in caught.value.message


def test_all_bad_values_at_once_with_what_was_meant() -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(export_dtype="bf16", async_mode="Async", interval=0)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 3
    assert 'did you mean "bfloat16"?' in caught.value.message
    assert 'did you mean "async"?' in caught.value.message


def test_values_of_other_types_that_mean_the_same() -> None:
    config = CheckpointConfig(interval=np.int64(3), initial_load_path=Path("a"), exclude_from_loading=["optimizer"])  # type: ignore[arg-type]
    assert config == CheckpointConfig(interval=3, initial_load_path="a", exclude_from_loading=("optimizer",))
    assert type(config.interval) is int


def test_the_library_saves_by_default(memory_path: Path) -> None:
    for config in (None, CheckpointConfig(interval=500), CheckpointConfig(interval=500, enable=False)):
        folder = memory_path / str(config and config.enable)
        with CheckpointManager(folder, config, model=net()) as manager:
            assert manager.save(500) == (config is None or config.enable)


# ---- paths ----


def test_home_and_variables_in_paths(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(memory_path / "home"))
    monkeypatch.setenv("SCRATCH", str(memory_path / "scratch"))
    monkeypatch.chdir(memory_path)
    with CheckpointManager("$SCRATCH/run", model=net()) as manager:
        manager.save(500)
    milepost.save("~/one", {"n": 1})
    milepost.async_save("~/two", {"n": 2}).committed(60)
    assert milepost.load("~/one") == {"n": 1}
    assert milepost.verify("${SCRATCH}/run/step-500").is_sound
    assert sorted(os.listdir(memory_path)) == ["home", "scratch"]


@pytest.mark.parametrize(
    "path", ["$SCRATCH_OF_JOB/run", "runs/${SCRATCH_OF_JOB}", "s3://$SCRATCH_OF_JOB/run", "~nobody-here/run"]
)
def test_a_variable_that_is_not_set_is_refused_and_no_folder_gets_its_name(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.delenv("SCRATCH_OF_JOB", raising=False)
    monkeypatch.chdir(memory_path)
    what = "the variable SCRATCH_OF_JOB in .* is not set" if "$" in path else "there is no user nobody-here"
    for act in (
        lambda: CheckpointManager(path, model=net()),
        lambda: CheckpointManager("run", CheckpointConfig(remote_folder=path), model=net()),
        lambda: CheckpointManager("run", CheckpointConfig(initial_load_path=path), model=net()).load(),
        lambda: milepost.save(path, {"n": 1}),
        lambda: milepost.load(path),
    ):
        with pytest.raises(ConfigError, match=what):
            act()
    assert [name for name in os.listdir(memory_path) if name != "run"] == []


def test_a_folder_whose_name_has_a_dollar_is_found(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (memory_path / "a$b").mkdir()
    monkeypatch.delenv("b", raising=False)
    monkeypatch.chdir(memory_path / "a$b")
    milepost.save("here", {"n": 1})
    assert milepost.load(memory_path / "a$b/here") == {"n": 1}
    assert milepost.load("../a$b/here") == {"n": 1}


# ---- the default device ----


@pytest.mark.parametrize("mode", MODES)
def test_the_default_device_changes_nothing(memory_path: Path, mode: Any) -> None:
    model, fresh = net(), net()
    optimizer, again = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(fresh.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    config = CheckpointConfig(interval=1, async_mode=mode)
    torch.set_default_device("meta")
    try:
        for other, its in ((model, optimizer), (fresh, again)):
            with CheckpointManager(memory_path / "run", config, model=other, optimizer=its) as manager:
                manager.load()
                manager.save(1 if other is model else 2)
        found = milepost.load(memory_path / "run" / "step-1")
    finally:
        torch.set_default_device(None)
    assert_same(fresh.state_dict(), model.state_dict())
    assert_same(again.state_dict(), optimizer.state_dict())
    assert found["weight"].device.type == "cpu"


def test_a_load_in_inference_mode_makes_tensors_for_training(memory_path: Path) -> None:
    """A program that evaluates first may still be in it. Sparse values are made on the CPU whatever the default is."""
    model, fresh = net(), net()
    optimizer, again = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(fresh.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    sparse = torch.eye(2).to_sparse()
    with torch.inference_mode(), torch.device("meta"):
        milepost.async_save(memory_path / "two", {"model": model}).committed(60)
        milepost.save(memory_path / "one", {"model": model, "optimizer": optimizer, "sparse": sparse})
        milepost.load(memory_path / "one", {"model": fresh, "optimizer": again, "sparse": None})
        found = milepost.load(memory_path / "one")
    assert not found["sparse"].is_inference()
    assert_same(again.state_dict(), optimizer.state_dict())
    fresh(torch.ones(2, 4)).sum().backward()
    again.step()
    milepost.async_save(memory_path / "two", {"model": fresh}).committed(60)  # with the memory of the one before


# ---- first mistakes ----


def plain_loader() -> Any:
    return torch.utils.data.DataLoader([1, 2])  # type: ignore[arg-type]


def twice(folder: str, kind: Any) -> Any:
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    return CheckpointManager(folder, model=model, optimizer=[optimizer, optimizer])


MISTAKES: dict[str, tuple[Any, str]] = {
    "a module as folder": (lambda f: CheckpointManager(net(), f), "the folder comes first"),  # type: ignore[arg-type]
    "a dict of models": (lambda f: CheckpointManager(f, model={"a": net()}), "nn.ModuleDict"),  # type: ignore[arg-type]
    "a state dict": (lambda f: CheckpointManager(f, model=net().state_dict()), "not its state_dict"),  # type: ignore[arg-type]
    "a class": (lambda f: CheckpointManager(f, model=nn.Linear), "an instance, not the class"),  # type: ignore[arg-type]
    "no model": (lambda f: CheckpointManager(f), "give model="),
    "a lazy module": (lambda f: CheckpointManager(f, model=nn.Sequential(nn.LazyLinear(3))), "run a batch through"),
    "an optimizer class": (lambda f: CheckpointManager(f, model=net(), optimizer=torch.optim.Adam), "not the class"),  # type: ignore[arg-type]
    "a dict as config": (lambda f: CheckpointManager(f, {"interval": 1}, model=net()), r"CheckpointConfig\(\*\*config"),  # type: ignore[arg-type]
    "a plain loader": (lambda f: CheckpointManager(f, model=net(), dataloader=plain_loader()), "ResumableSampler"),
    "a dict as state": (lambda f: CheckpointManager(f, model=net(), train_state={"n": 1}), "these two methods"),  # type: ignore[arg-type]
    "degrees as list": (lambda f: CheckpointManager(f, model=net(), layout=[2]), "degrees by name"),  # type: ignore[arg-type]
    "degrees as text": (lambda f: milepost.save(f, {"n": 1}, layout={"fsdp": "2"}), "degrees by name"),  # type: ignore[dict-item]
    "states as list": (lambda f: CheckpointManager(f, model=net(), states=[net()]), "objects by name"),  # type: ignore[arg-type]
    "a command as on_commit": (lambda f: CheckpointManager(f, model=net(), on_commit="ls"), "config.on_commit"),  # type: ignore[arg-type]
    "hf as text": (lambda f: CheckpointManager(f, model=net(), hf="llama"), "milepost.HfModel"),  # type: ignore[arg-type]
    "parts of ranks": (lambda f: CheckpointManager(f, model=net(), per_rank=None), "expected a collection"),  # type: ignore[arg-type]
    "one twice": (lambda f: twice(f, torch.optim.SGD), "one optimizer is given twice"),
    "register an object": (lambda f: milepost.register_value(3), "expected a class"),  # type: ignore[type-var]
    "no path": (lambda f: milepost.verify(None), "expected the path of a checkpoint"),  # type: ignore[arg-type]
    "a file": (lambda f: milepost.load(__file__), "is a file, and a checkpoint is a folder"),
    "no patterns": (lambda f: milepost.load(f, {"n": 1}, allow_missing=None), "expected a list of patterns"),  # type: ignore[call-overload]
    "strict as text": (lambda f: milepost.load(f, {"n": 1}, strict="no"), "expected True or False"),  # type: ignore[call-overload]
    "save a module": (lambda f: milepost.save(f, net()), '{"model": model}'),  # type: ignore[arg-type]
    "save swapped": (lambda f: milepost.save({"n": 1}, f), "the path comes first"),  # type: ignore[arg-type]
    "a mode": (lambda f: milepost.async_save(f, {"n": 1}, mode="fast"), "expected async or"),  # type: ignore[arg-type]
    "another's parameter": (
        lambda f: CheckpointManager(f, model=net(), optimizer=torch.optim.SGD(net().parameters())),
        "in no model part",
    ),
}


@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_first_mistakes(memory_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(str(memory_path / "run"))
    assert not (memory_path / "run").exists()


def test_two_managers_on_one_folder(memory_path: Path) -> None:
    first = CheckpointManager(memory_path / "run", model=net())
    with pytest.raises(RunLockedError, match="of this process writes to"):
        CheckpointManager(memory_path / "run", model=net())
    CheckpointManager(memory_path / "run", CheckpointConfig(load_only=True), model=net()).close()
    first.close()
    CheckpointManager(memory_path / "run", model=net())  # nothing refers to this one any more
    CheckpointManager(memory_path / "run", model=net()).close()


def test_what_cannot_be_kept_in_one_line(memory_path: Path) -> None:
    class Own:
        pass

    with pytest.raises(SaveError) as caught:
        milepost.save(memory_path / "a", {"state": {"seen": [1, Own()]}})
    assert "\n" not in caught.value.message
    assert "state.seen[1]" in caught.value.message
    assert "Own" in caught.value.message


# ---- ranks that do different things ----


def other_folder(folder: Path) -> str:
    rank = torch.distributed.get_rank()
    with pytest.raises(ConfigError, match="every rank must be given the same folder") as caught:
        CheckpointManager(folder / str(rank), model=net())
    return caught.value.message


def other_step(folder: Path) -> str:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    with CheckpointManager(folder / "run", CheckpointConfig(interval=1), model=net()) as manager:
        with pytest.raises(SaveError, match="every rank must save the same step") as caught:
            manager.save(3 + rank)
        assert manager.save(7)
        assert manager.save(8)
        with pytest.raises(ConfigError, match="every rank must ask for the same step"):
            manager.load(step=7 + rank)
        with pytest.raises(SaveError, match=r"step-9 \(model\)"):
            manager.save(9, last_step=rank == 0)
    with pytest.raises(ConfigError, match=r"checkpoint.async_mode: every rank must be given the same"):
        CheckpointManager(folder / "x", CheckpointConfig(async_mode=("disabled", "async")[rank]), model=net())  # type: ignore[arg-type]
    return caught.value.message


def one_comes_late(folder: Path) -> list[str]:
    """Rank 1, or rank 0, comes seconds later: the one that waits logs for which rank."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("milepost").addHandler(handler)
    for late in (1, 0):
        if torch.distributed.get_rank() == late:
            time.sleep(1.5)
        milepost.save(folder / f"late-{late}", {"n": 1})
    if torch.distributed.get_rank() == 1:
        time.sleep(1)
    milepost.load(folder / "late-1")
    with CheckpointManager(folder / "run", CheckpointConfig(interval=1), model=torch.nn.Linear(1, 1)) as manager:
        if torch.distributed.get_rank() == 1:
            time.sleep(1)
        manager.save(1)  # the first, and nothing was loaded before
    return [line for line in said if "waiting for rank" in line]


def test_another_folder_or_step_by_rank(memory_path: Path) -> None:
    for act in (other_folder, other_step):
        for message in run_world(act, 2, memory_path, timeout_s=60):
            assert "rank 0: " in message
            assert "rank 1: " in message


def test_a_rank_that_does_not_call_save_is_named(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milepost.collective.meeting.LATE_S", 0.4)
    first, second = run_world(one_comes_late, 2, memory_path, timeout_s=60)
    assert "late-1: waiting for rank 1 " in first[0]
    assert "late-0: waiting for rank 0 " in second[0]
    for act in ("loading ", "saving step 1: "):
        assert any(line.startswith(act) and "waiting for rank 1" in line for line in first)
    assert "if rank == 0" in first[0]
