"""``milepost sync`` copies all that can be copied, reports the rest, and mixes no runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from zoo import ARRAYS, make_external, save

from milepost.cli.main import main
from milepost.format.manifest import Lineage
from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays


@pytest.fixture
def storage(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    monkeypatch.chdir(memory_path)
    return LocalStorage(memory_path)


def save_steps(storage: LocalStorage, run: str, *steps: int) -> None:
    for step in steps:
        save(storage, f"{run}/step-{step}", step, float(step))


def sync(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["sync", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def damage(path: str) -> bytes:
    """Flip bits in the middle of a file; returns what it held."""
    whole = Path(path).read_bytes()
    middle = len(whole) // 2
    Path(path).write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    return whole


def states(folder: str) -> dict[int, str]:
    return {entry.step: entry.state for entry in catalog.scan(LocalStorage(folder), "")}


def test_a_damaged_step_is_copied_as_damaged_and_the_others_all_the_same(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(storage, "run", 1, 2, 3, 4)
    whole = damage("run/step-3/__0_0.distcp")
    Path("run/step-4/__1_0.distcp").unlink()
    status, out, err = sync(capsys, "run", "copy", "--json")
    assert status == 5
    assert [Path(report["path"]).name for report in json.loads(out)] == ["step-2", "step-1"]
    assert "copy/step-3 is damaged" in err
    assert "run/step-4 is damaged" in err
    assert states("copy") == {1: "committed", 2: "committed", 3: "damaged"}
    Path("run/step-3/__0_0.distcp").write_bytes(whole)  # restored: the next copy replaces the damaged one
    assert sync(capsys, "run/step-3", "copy")[0] == 0
    assert states("copy")[3] == "committed"


def test_a_damaged_copy_stays_marked_until_its_replacement_is_verified(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(storage, "run", 1)
    whole = damage("run/step-1/__0_0.distcp")
    assert sync(capsys, "run", "copy")[0] == 5
    Path("run/step-1/__0_0.distcp").write_bytes(whole)

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("milepost.cli.sync_cmd.verify_in", interrupted)
        assert sync(capsys, "run", "copy")[0] == 130
    assert states("copy") == {1: "damaged"}
    assert sync(capsys, "run", "copy")[0] == 0
    assert states("copy") == {1: "committed"}


def test_steps_of_other_programs_are_named(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(storage, "run", 1, 2)
    make_external(storage, "run/step-1")
    status, out, err = sync(capsys, "run", "copy", "--json")
    assert (status, len(json.loads(out))) == (0, 1)
    assert "not copied: " in err
    assert "run/step-1 is external" in err


@pytest.mark.parametrize("destination", ["run", "link", "./run/", "link/step-1"])
def test_a_run_is_not_copied_onto_itself(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str], destination: str
) -> None:
    save_steps(storage, "run", 1)
    Path("link").symlink_to("run")
    source = "run/step-1" if "step" in destination else "run"
    status, out, err = sync(capsys, source, destination)
    assert (status, out) == (2, "")
    assert "are the same folder" in err


def test_steps_of_two_runs_are_not_mixed(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    for run in ("a", "b"):
        save_arrays(storage, f"{run}/step-1", ARRAYS, step=1, lineage=Lineage(run=run, order=1, branch=run))
    assert sync(capsys, "a", "copy")[0] == 0
    for source in ("b", "b/step-1"):
        status, out, err = sync(capsys, source, "copy")
        assert (status, out) == (2, "")
        assert "copy holds steps of another run" in err
    assert sync(capsys, "a/step-1", "copy/step-1")[0] == 0


def test_a_later_save_of_a_step_is_not_replaced(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    """The local folder of a node that missed how the run continued is copied over its backup."""
    for folder, steps in (("run", {1: 1, 2: 2, 3: 3}), ("copy", {1: 1, 2: 4})):
        for step, order in steps.items():
            lineage = Lineage(run="r", order=order, branch=f"b{order // 4}")
            save_arrays(storage, f"{folder}/step-{step}", ARRAYS, step=step, lineage=lineage)
    before = Path("copy/step-2/milepost.json").read_bytes()
    status, out, err = sync(capsys, "run", "copy")
    assert status == 2
    assert "copy/step-3" in out
    for step in (1, 2):
        assert f"copy/step-{step} is another save of this step, and not an earlier one: it is not replaced" in err
    assert Path("copy/step-2/milepost.json").read_bytes() == before
    assert sync(capsys, "copy/step-2", "run")[0] == 0  # an earlier save is replaced
    assert Path("run/step-2/__0_0.distcp").read_bytes() == Path("copy/step-2/__0_0.distcp").read_bytes()


@pytest.mark.parametrize(
    ("destination", "reason"), [("file", "is a file"), ("run/step-1/sub", "inside the checkpoint")]
)
def test_a_destination_that_cannot_be_is_refused(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str], destination: str, reason: str
) -> None:
    save_steps(storage, "run", 1)
    Path("file").write_text("mine")
    status, out, err = sync(capsys, "run", destination)
    assert (status, out) == (2, "")
    assert reason in err
    assert Path("file").read_text() == "mine"
