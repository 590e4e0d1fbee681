"""When ``CheckpointManager`` saves, which step it loads, and which steps it keeps; on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sample_run import Run, assert_same, damage, states_in, steps_in
from torch import nn

from milepost.errors import CheckpointNotFoundError, ConfigError, MilepostError, SaveError, StateMismatchError
from milepost.run import catalog, checkpoint_record, marks
from milepost.storage import LocalStorage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")


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


def test_excluding_everything_is_refused_with_what_to_do_instead(folder: Path, tmp_path: Path) -> None:
    Run(folder).train(2)
    parts = ("model", "optimizer", "lr_scheduler", "data_loader", "train_state", "rng")
    with pytest.raises(ConfigError, match=r"leaves nothing to load from .*step-2: to start a new run, choose another"):
        Run(folder, exclude_from_loading=parts).manager.load()
    start = {"initial_load_path": str(folder / "step-2"), "exclude_from_loading": ("model",)}
    with pytest.raises(ConfigError, match=r"leaves nothing to load .* leave checkpoint.initial_load_path empty"):
        Run(tmp_path / "other", **start).manager.load()


def test_steps_that_are_counted_anew_are_not_called_model_only(folder: Path) -> None:
    run = Run(folder, interval=1)
    for step in (5, 6, 3):
        run.manager.save(step)
    report = Run(folder).load()
    assert report.step == 3
    assert not [note for note in report.notes if "newer" in note]


def test_a_model_that_is_changed_after_its_optimizer_was_made_is_named_as_the_cause(folder: Path) -> None:
    run = Run(folder, interval=1)
    run.manager.save(1)
    run.model[0] = nn.Linear(5, 8)  # as wrapping for FSDP does with the parameters
    for act in (lambda: run.manager.save(2), run.manager.load):
        with pytest.raises(ConfigError, match=r"AdamW steps 2 parameters that are not in the model .*\[8, 5\].* then"):
            act()


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


def test_the_cost_of_a_save_does_not_grow_with_the_steps_that_are_all_kept(folder: Path) -> None:
    run = Run(folder, keep_latest_k=0, interval=1).train(4)
    read: list[str] = []
    open_read = LocalStorage.open_read

    def noted(storage: LocalStorage, path: str) -> Any:
        read.append(path)
        return open_read(storage, path)

    with mock.patch.object(LocalStorage, "open_read", noted):
        run.manager.save(5)
    assert steps_in(folder) == [1, 2, 3, 4, 5]
    assert {path.split("/")[1] for path in read if "/step-" in path} <= {"step-4", "step-5"}


def test_a_run_that_does_not_progress_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(folder, interval=1)
    run.manager.save(1)
    for step in (2, 3, 4):
        run.manager.save(step)
    assert caplog.text.count("is the optimizer stepping?") == 1
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
    for step in (5, 6, 7):
        run.manager.save(step)
    told = [line for line in caplog.messages if "since the previous save" in line]
    assert [line.partition(":")[0] for line in told] == ["step 2", "step 6"]


def test_newest_full_step_outlives_a_model_only_last_save(folder: Path) -> None:
    Run(folder, keep_latest_k=1, last_save_model_only=True).train(7)
    assert steps_in(folder) == [6, 7]


def test_what_is_not_a_committed_step_is_neither_counted_nor_deleted(folder: Path) -> None:
    """Partial, damaged, external, pinned and linked steps, files and folders of the user's, the step resumed from."""
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
