"""Branches: a resume continues the branch that was written last, and its steps are never deleted too early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelled_run import NOW, Folder

from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, StateMismatchError
from milepost.format import manifest_json
from milepost.format.manifest import BranchStart, Lineage
from milepost.run import branches, catalog, marks, retention
from milepost.run.branches import Descent, History
from milepost.run.catalog import StepEntry
from milepost.run.retention import Rules
from milepost.saving.job import Keep, prune
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays
from milepost.training.choice import launch_id


@pytest.fixture
def folder() -> Folder:
    return Folder()


def steps(entries: tuple[StepEntry, ...] | list[StepEntry]) -> list[int]:
    return [entry.step for entry in entries]


# ---- going back ----


def test_a_run_that_is_resumed_stays_one_branch(folder: Folder) -> None:
    folder.save(10, 20)
    folder.start()
    folder.save(30)
    lineages = [entry.lineage for entry in folder.entries]
    assert len({(lineage.run, lineage.branch) for lineage in lineages if lineage}) == 1
    assert [lineage.order for lineage in lineages if lineage] == [1, 2, 3]
    assert [(lineage.parent, lineage.parent_step) for lineage in lineages if lineage] == [
        ("", None),
        ("save-1", 10),
        ("save-2", 20),
    ]
    assert folder.history == History(tuple(folder.entries), ())


def test_after_going_back_the_end_of_the_new_branch_is_the_latest(folder: Folder) -> None:
    folder.save(10, 20, 30, 40)
    assert folder.start(20).step == 20
    folder.save(25)
    assert steps(folder.history.current) == [10, 20, 25]
    assert steps(folder.history.abandoned) == [30, 40]
    assert folder.history.ends() == {30: 40, 40: 40}
    choice = folder.start()
    assert (choice.step, choice.notes) == (
        25,
        ("steps 30, 40 are of an abandoned branch: resumed only if checkpoint.load_step names one",),
    )


def test_the_same_command_continues_from_what_descends_from_the_named_step(folder: Folder) -> None:
    folder.save(10, 20, 30)
    assert folder.start(10).step == 10
    assert folder.start(10).step == 10  # it died before it had saved anything
    folder.save(15)
    choice = folder.start(10)
    assert choice.step == 15
    assert "load_step = 10: resuming from a later step that descends from it" in choice.notes[0]
    folder.save(20)
    assert folder.start().step == 20
    folder.save(25)
    assert folder.start(10).step == 25
    assert steps(folder.history.abandoned) == [30]


def test_the_same_command_continues_when_the_named_step_was_the_newest_or_is_gone(folder: Folder) -> None:
    folder.save(10, 20)
    folder.start(20)
    folder.save(30)
    assert folder.start(20).step == 30
    del folder.steps[20]
    assert folder.start(20).step == 30


def test_restart_branch_begins_another_one(folder: Folder) -> None:
    folder.save(10, 20)
    folder.start(10)
    folder.save(15)
    assert folder.start(10, restart_branch=True).step == 10
    folder.save(12)
    assert steps(folder.history.current) == [10, 12]
    assert folder.history.ends() == {15: 15, 20: 20}


def test_restart_branch_takes_effect_once_in_a_job(folder: Folder) -> None:
    """torchrun starts the ranks again, Slurm puts the job back into its queue: both keep their id."""
    folder.save(10, 20)
    again = {"launch": "slurm-7", "restart_branch": True}
    assert folder.start(10, **again).step == 10  # type: ignore[arg-type]
    folder.save(15)
    assert folder.start(10, **again).step == 15  # type: ignore[arg-type]
    assert folder.start(10, launch="slurm-8", restart_branch=True).step == 10


def test_another_save_under_the_named_number_is_another_beginning(folder: Folder) -> None:
    folder.save(10, 20)
    folder.start(20)
    folder.save(30)
    folder.start(10)
    folder.save(20, 30)
    assert folder.start(20).step == 20
    folder.save(30)
    assert folder.start(20).step == 30


def test_an_abandoned_branch_is_resumed_when_it_is_named(folder: Folder) -> None:
    folder.save(10, 20, 30)
    folder.start(10)
    folder.save(15)
    assert folder.start(30).step == 30
    folder.save(40)
    assert steps(folder.history.current) == [10, 20, 30, 40]
    assert steps(folder.history.abandoned) == [15]


def test_launch_ids() -> None:
    assert launch_id({}) == ""
    one_launch = launch_id({"TORCHELASTIC_RUN_ID": "none"})
    assert one_launch.startswith("torchrun-")
    assert one_launch == launch_id({"TORCHELASTIC_RUN_ID": "none"})
    assert launch_id({"TORCHELASTIC_RUN_ID": "x1"}) == "torchrun-x1"
    assert launch_id({"TORCHELASTIC_RUN_ID": "7-1", "SLURM_JOB_ID": "7"}) == "slurm-7"


# ---- damage ----


def test_steps_of_another_run_are_called_so(folder: Folder) -> None:
    """A step copied here from another run, and committed later there, is resumed, with a warning."""
    folder.save(2, 4)
    folder.put(9, lineage=Lineage(run="other", order=30, branch="theirs"))
    assert steps(folder.history.other_runs()) == [2, 4]
    choice = folder.start()
    assert choice.step == 9
    (note,) = choice.notes
    assert note.startswith("steps 2, 4 are of another run than step 9")


def test_a_branch_of_the_same_run_is_not_of_another(folder: Folder) -> None:
    folder.save(1, 2, 3)
    folder.start(1)
    folder.save(5)
    assert (steps(folder.history.abandoned), folder.history.other_runs()) == ([2, 3], [])


def test_a_damaged_end_falls_back_to_what_it_descends_from_not_to_another_branch(folder: Folder) -> None:
    folder.save(10, 20, 30)
    folder.start(10)
    folder.save(15, 17)
    folder.damage(17)
    choice = folder.start()
    assert choice.step == 15
    assert choice.notes[0] == "step 17 is newer but damaged: bits flipped"
    folder.damage(15)
    assert folder.start().step == 10
    folder.damage(10)
    with pytest.raises(
        CheckpointDamagedError, match=r"or resume steps 20, 30, of an abandoned branch, with checkpoint"
    ):
        folder.start()


def test_falling_back_begins_a_branch_so_that_a_repaired_step_is_not_resumed(folder: Folder) -> None:
    folder.save(10, 20, 30)
    repaired = folder.steps[30]
    folder.damage(30)
    folder.start()
    folder.save(25)
    folder.steps[30] = repaired
    assert steps(folder.history.current) == [10, 20, 25]
    assert folder.start().step == 25


def test_the_named_command_falls_back_no_further_than_the_named_step(folder: Folder) -> None:
    folder.save(10, 20, 30)
    folder.start(20)
    folder.save(25)
    folder.damage(25)
    assert folder.start(20).step == 20
    folder.damage(20)
    with pytest.raises(CheckpointDamagedError, match="step-20 is damaged"):
        folder.start(20)


def test_a_torn_record_does_not_hide_that_its_step_was_written_last(tmp_path: Path) -> None:
    """The first step of a new branch is unreadable: still no other branch is resumed."""
    storage = LocalStorage(tmp_path)

    def save(step: int, descent: Descent) -> Descent:
        path = f"run/step-{step}"
        manifest = save_arrays(storage, path, {"w": np.ones(4, "float32")}, step=step, lineage=descent.lineage())
        return descent.tried().committed(step, manifest.save_id)

    def scan() -> list[StepEntry]:
        return catalog.scan(storage, "run")

    descent = branches.begin([], 10)
    for step in (10, 20, 30):
        descent = save(step, descent)
    (named,) = [entry for entry in scan() if entry.step == 10]
    save(15, branches.descend(scan(), named, start=BranchStart(10, named.save_id)))
    record = tmp_path / "run" / "step-15" / "milepost.json"
    whole = record.read_bytes()
    at = whole.index(b'"kind"')
    for torn in (whole[:-1], whole[: whole.index(b'"files"')], whole[:at] + b"!" + whole[at + 1 :]):
        record.write_bytes(torn)
        history = History.of(scan())
        assert steps(history.current) == [10, 15]
        assert history.newest_resumable == named
    assert manifest_json.lineage_of_torn(whole[:40]) is None


def test_a_torn_order_that_is_absurd_is_not_believed(folder: Folder) -> None:
    folder.save(10, 20)
    folder.start(10)
    folder.save(15)
    (lineage,) = [entry.lineage for entry in folder.entries if entry.step == 20]
    assert lineage is not None
    folder.tear(20)
    folder.steps[20] = replace(folder.steps[20], lineage=replace(lineage, order=99999))
    assert steps(folder.history.current) == [10, 15]


def test_orders_stay_above_those_that_cannot_be_read(folder: Folder) -> None:
    folder.save(10, 20, 30)
    hidden = folder.steps[30]
    folder.tear(30)
    folder.start()
    folder.save(25)
    folder.steps[30] = hidden
    assert folder.history.last == folder.steps[25]


# ---- what has no lineage ----


def test_older_steps_are_one_branch_by_number(folder: Folder) -> None:
    for step in (30, 10, 20):
        folder.put(step)
    assert steps(folder.history.current) == [10, 20, 30]
    folder.start()
    folder.save(40)
    assert steps(folder.history.current) == [10, 20, 30, 40]
    assert folder.steps[40].lineage is not None
    assert folder.steps[40].lineage.parent == "save-1"


@pytest.mark.parametrize("state", ["committed", "external"])
def test_going_back_over_older_or_external_steps_abandons_those_behind(folder: Folder, state: str) -> None:
    for step in (10, 20, 30):
        folder.put(step, state=state)
    folder.start(10)
    folder.save(15)
    assert steps(folder.history.current) == [10, 15]
    assert steps(folder.history.abandoned) == [20, 30]
    assert folder.start().step == 15
    assert folder.start(10).step == 15


def test_an_external_step_that_came_later_is_the_latest(folder: Folder) -> None:
    """torchtitan has continued in the folder of a run, and Milepost continues from there."""
    folder.save(10, 20)
    folder.put(30, state="external")
    assert folder.start().step == 30
    folder.save(40)
    assert steps(folder.history.current) == [10, 20, 30, 40]
    assert folder.history.abandoned == ()


def test_weights_alone_never_hide_a_step_to_resume_from(folder: Folder) -> None:
    folder.save(10, 20)
    folder.put(30, state="external", kind="model")
    folder.put(40, state="committed", kind="state")  # of ``milepost.save``, without an optimizer
    assert folder.start().step == 20
    assert not folder.steps[40].is_resumable
    assert replace(folder.steps[40], has_training_state=True).is_resumable


def test_a_state_dict_that_belongs_to_no_run_is_not_pruned(folder: Folder) -> None:
    folder.save(10, 20)
    folder.put(15, kind="state")
    folder.start()
    folder.save(30)
    assert folder.prune(1) == [10, 20]
    decisions = retention.plan(folder.entries, Rules(keep_latest_k=1), now=NOW)
    assert [decision.reason for decision in decisions if decision.step == 15] == ["it belongs to no run"]


# ---- beginnings and ends ----


def test_a_run_without_a_load_continues_above_and_starts_over_below(folder: Folder) -> None:
    folder.save(10, 20)
    run = folder.steps[20].lineage
    folder.start_fresh()
    folder.save(30)
    assert folder.steps[30].lineage is not None
    assert run is not None
    assert folder.steps[30].lineage.branch == run.branch
    folder.start_fresh()
    folder.save(5)
    assert folder.steps[5].lineage is not None
    assert folder.steps[5].lineage.run != run.run
    assert steps(folder.history.current) == [5]
    assert steps(folder.history.abandoned) == [10, 20, 30]


def test_going_on_behind_a_last_save_of_weights_abandons_nothing(folder: Folder) -> None:
    folder.save(10, 20)
    folder.save(25, kind="model")
    assert folder.start().step == 20
    folder.save(30)
    assert steps(folder.history.current) == [10, 20, 25, 30]
    folder.start(20)
    folder.save(22)
    assert steps(folder.history.abandoned) == [25, 30]


def test_a_finished_run_is_recognised_on_its_own_branch(folder: Folder) -> None:
    folder.save(10, 20, 30)
    folder.save(40, kind="model")
    choice = folder.start(num_steps=40)
    assert (choice.step, choice.is_finished, choice.model_only) == (40, True, True)
    assert folder.start(num_steps=50).step == 30
    folder.start(10, num_steps=40)
    folder.save(15)
    choice = folder.start(num_steps=40)
    assert (choice.step, choice.is_finished) == (15, False)
    folder.save(40)
    choice = folder.start(10, num_steps=40)
    assert (choice.step, choice.is_finished, choice.model_only) == (40, True, False)
    assert not folder.start(10, num_steps=40, restart_branch=True).is_finished


def test_a_damaged_step_behind_a_seed_is_no_start_from_scratch(folder: Folder) -> None:
    folder.save(0, kind="model")
    assert folder.start().notes == ("step 0 is a seed checkpoint: it holds the initial weights",)
    folder.save(10)
    folder.damage(10)
    with pytest.raises(StateMismatchError, match="holds no step to resume from"):
        folder.start()


def test_a_long_trail_keeps_the_branches_of_which_there_are_steps(folder: Folder) -> None:
    folder.save(*range(1000, 1100))
    for step in range(1099, 1000, -1):
        folder.start(step)
        folder.save(2000 + step)
        if step % 10:
            del folder.steps[2000 + step]
    folder.start(1000)
    folder.save(1)
    assert steps(folder.history.current) == [1000, 1]


def test_ids_that_met_by_hand_are_distinguished_by_time(folder: Folder) -> None:
    folder.save(10, 20)
    lineage = folder.steps[20].lineage
    assert lineage is not None
    folder.put(25, lineage=replace(lineage, parent="x"))
    folder.steps[20] = replace(folder.steps[20], created_s=NOW + 1)
    assert folder.start().step == 20


# ---- retention ----


def test_what_a_run_writes_after_going_back_stays(folder: Folder) -> None:
    """Ten steps, a return to the fourth, and the first save after it is kept."""
    folder.save(*range(1000, 11000, 1000))
    folder.start(4000)
    folder.save(4500)
    assert folder.prune(10) == [5000]  # the room that is left goes to the newest of the abandoned
    assert folder.start(4000).step == 4500
    folder.save(5000, 5500)
    assert folder.prune(2) == [1000, 2000, 3000, 4000, 4500, 6000, 7000, 8000, 9000, 10000]


def test_abandoned_steps_go_first_and_only_for_a_newer_one_that_can_be_resumed(folder: Folder) -> None:
    folder.save(10, 20, 30)
    folder.start(10)
    folder.save(15, kind="model")
    assert folder.prune(1) == []
    folder.save(17)
    plan = retention.plan(folder.entries, Rules(keep_latest_k=1), now=NOW)
    assert {d.step: d.reason for d in plan} == {
        10: "no rule keeps it",
        15: "no rule keeps it",
        17: "it is the newest committed step",
        20: "abandoned branch (ended at step 30)",
        30: "abandoned branch (ended at step 30)",
    }
    assert [d.step for d in plan if d.is_abandoned] == [20, 30]
    assert {d.step: d.reason for d in retention.plan(folder.entries, Rules(keep_latest_k=4), now=NOW)}[30] == (
        "it is one of the 4 newest, abandoned branch (ended at step 30)"
    )


def test_rules_count_on_the_current_branch(folder: Folder) -> None:
    folder.save(10, 20, 30, 40)
    folder.start(10)
    folder.save(12, 14)
    for step, loss in {10: 3.0, 12: 1.0, 14: 2.0, 20: 0.5, 30: 0.1, 40: float("nan")}.items():
        folder.steps[step] = replace(folder.steps[step], metrics={"loss": loss})
    assert folder.prune(1, keep_every_n=20, keep_best_k=1, metric="loss") == [10, 20, 30, 40]
    assert steps(folder.entries) == [12, 14]


def test_best_latest_every_n_and_pinned_steps_add_up(folder: Folder) -> None:
    folder.save(*range(1, 11))
    for step, loss in zip(range(1, 11), (5, 1, 3, 1, 9, float("nan"), 7, 8, 6, float("inf")), strict=True):
        folder.steps[step] = replace(folder.steps[step], metrics={"loss": float(loss)})
    del folder.steps[3].metrics["loss"]  # type: ignore[attr-defined]
    folder.steps[7] = replace(folder.steps[7], pinned=True)
    best: dict[str, Any] = {"keep_latest_k": 2, "keep_every_n": 5, "keep_best_k": 3, "metric": "loss"}
    plan = retention.plan(folder.entries, Rules(**best), now=NOW)
    kept = {decision.step: decision.reason for decision in plan if decision.keep}
    assert kept == {
        1: "it is one of the 3 best by loss: 5",
        2: "it is one of the 3 best by loss: 1",
        4: "it is one of the 3 best by loss: 1",
        5: "it is a multiple of 5",
        7: "it is pinned",
        9: "it is one of the 2 newest",
        10: "it is the newest committed step",
    }
    best |= {"keep_latest_k": 1, "keep_every_n": 0, "keep_best_k": 1, "mode": "max"}
    highest = retention.plan(folder.entries, Rules(**best), now=NOW)
    assert [d.step for d in highest if d.keep] == [5, 7, 10]


def test_a_pinned_or_external_step_is_set_aside_when_another_branch_takes_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalStorage(tmp_path)

    def save(step: int, lineage: Lineage | None, value: float) -> None:
        save_arrays(storage, f"run/step-{step}", {"w": np.full(4, value, "float32")}, step=step, lineage=lineage)

    old, new = (Lineage(run="r", order=order, branch=branch) for order, branch in ((1, "b1"), (2, "b2")))
    for step in (1, 2, 3):
        save(step, old, 1.0)
    for record in ("json", "shards", "digests"):
        storage.remove(f"run/step-3/milepost.{record}")
    marks.pin(storage, "run", 2)
    retention.set_aside(storage, "run/step-2", old)  # a save of the same branch replaces it
    assert {entry.name for entry in storage.list("run")} == {"step-1", "step-2", "step-3", ".pinned-step-2"}
    for step in (1, 2, 3, 4):
        retention.set_aside(storage, f"run/step-{step}", new)
    names = sorted(entry.name for entry in storage.list("run"))
    assert names[0] == "step-1"
    assert names[1].startswith("step-2.aside-")
    assert names[2].startswith("step-3.aside-")
    assert len(names) == 3
    assert "pinned and about to be replaced; it is kept as step-2.aside-" in caplog.text
    assert steps(catalog.scan(storage, "run")) == [1]


def test_a_step_of_another_run_is_never_replaced_or_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A loop that saves without load() begins a new run in the folder of an earlier one."""
    storage = LocalStorage(tmp_path)
    for step, run in ((1, "before"), (2, "before"), (3, "before")):
        lineage = Lineage(run=run, order=step, branch=run)
        save_arrays(storage, f"run/step-{step}", {"w": np.zeros(4)}, step=step, lineage=lineage)
    for step in (1, 2):
        lineage = Lineage(run="now", order=3 + step, branch="now")
        retention.set_aside(storage, f"run/step-{step}", lineage)
        save_arrays(storage, f"run/step-{step}", {"w": np.ones(4)}, step=step, lineage=lineage)
    kept = Keep("run", Rules(keep_latest_k=1))
    assert prune(storage, kept) == ("step-1",)
    assert prune(storage, kept) == ()
    names = sorted(entry.name.partition(".aside-")[0] for entry in storage.list("run"))
    assert names == ["step-1", "step-2", "step-2", "step-3"]
    assert caplog.text.count("run holds steps of another run, which this one never deletes: step-3.") == 1


def test_an_unexpected_error_after_a_commit_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "scan", lambda *args: 1 / 0)
    assert prune(LocalStorage(tmp_path), Keep("run", Rules(keep_latest_k=1))) == ()
    assert "old steps were not deleted because of an unexpected error" in caplog.text


def test_a_named_step_that_was_never_there(folder: Folder) -> None:
    folder.save(10)
    with pytest.raises(CheckpointNotFoundError, match=r"step 5 does not exist in run; steps that do: 10"):
        folder.start(5)
