"""Steps that are damaged, hostile, or of another version: marked and skipped, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from format_1 import to_json_1
from manifests import record_files
from sample_run import Run, assert_same, damage, states_in

from milepost.errors import CheckpointDamagedError, NewerFormatError
from milepost.format.digest import crc32
from milepost.format.manifest import MANIFEST_NAME, SHARDS_NAME, Manifest
from milepost.run import catalog, checkpoint_record
from milepost.storage import LocalStorage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")


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
    """If an older Milepost treated it as damaged, it would fall back, and prune steps that it can't read."""
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
    # As in checkpoints older than recorded structures: containers are then rebuilt from the paths.
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
