"""A save over an existing folder: other files stay, permissions are kept, and other programs may save over ours."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import milepost
from milepost.errors import ConfigError, SaveError
from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays
from milepost.verification.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore:Detected an exist")


def state(value: float, nbytes: int = 40) -> dict[str, object]:
    return {"w": torch.full((nbytes // 4,), float(value)), "step": int(value)}


def value_in(path: Path) -> float:
    into = {"w": torch.zeros(10), "step": 0}
    milepost.load(path, into)
    return float(into["w"].mean())


# ---- what lies beside ----


def test_what_the_user_laid_beside_a_checkpoint_is_carried_over(memory_path: Path) -> None:
    step = memory_path / "step-1"
    milepost.save(step, state(1))
    (step / "tokenizer.json").write_text("{}")
    (step / "notes.txt").write_text("keep me")
    os.utime(step / "notes.txt", (5, 5))
    (step / "link").symlink_to("/nowhere")
    for value in (2, 3):
        milepost.save(step, state(value))
        assert value_in(step) == value
        assert (step / "tokenizer.json").read_text() == "{}"
        assert (step / "notes.txt").stat().st_mtime == 5
        assert (step / "link").readlink() == Path("/nowhere")
        assert verify(step).verdict == "ok"
    assert sorted(path.name for path in memory_path.iterdir()) == ["step-1"]


def test_files_of_older_checkpoints_are_not_carried_over(memory_path: Path) -> None:
    step = memory_path / "step-1"
    save_arrays(LocalStorage(memory_path), "step-1", {"w": torch.zeros(8).numpy()}, num_ranks=4, step=1)
    (step / "__9_0.distcp").write_bytes(b"stale")
    milepost.save(step, state(2))
    assert not (step / "__3_0.distcp").exists()
    assert not (step / "__9_0.distcp").exists()
    dcp.save(state(3), checkpoint_id=memory_path / "stock")
    (memory_path / "stock" / "README.md").write_text("mine")
    milepost.save(memory_path / "stock", state(4))
    assert (memory_path / "stock" / "README.md").read_text() == "mine"
    assert value_in(memory_path / "stock") == 4


def test_a_file_that_the_new_checkpoint_would_hide_is_an_error(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = memory_path / "step-1"
    milepost.save(step, state(1))
    (step / "mine").write_text("keep me")
    # No save of ours has a file of a user's name, but for Hugging Face files; so the same is made here.
    monkeypatch.setattr("milepost.run.commit.names_beside", lambda storage, target: ["__0_0.distcp"])
    with pytest.raises(SaveError, match=r"__0_0\.distcp in .* would be lost"):
        milepost.save(step, state(2))
    assert value_in(step) == 1
    assert (step / "mine").read_text() == "keep me"


def test_a_private_checkpoint_stays_private(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = memory_path / "step-1"
    milepost.save(step, state(1))
    step.chmod(0o2700)
    if os.geteuid() == 0:
        os.chown(step, 12, 34)
    modes: list[int] = []
    write = LocalStorage.open_write

    def watched(self: LocalStorage, path: str, nbytes: int, *, shared: bool = False) -> object:
        modes.append(stat.S_IMODE(os.stat(os.path.dirname(os.path.join(self.root, path))).st_mode))
        return write(self, path, nbytes, shared=shared)

    monkeypatch.setattr(LocalStorage, "open_write", watched)
    milepost.save(step, state(2))
    assert stat.S_IMODE(step.stat().st_mode) == 0o2700
    assert modes == [0o2700]  # the data is private while it is written, too
    if os.geteuid() == 0:
        assert (step.stat().st_uid, step.stat().st_gid) == (12, 34)


# ---- folders that can't be replaced ----


def test_the_working_directory_is_not_swapped_away(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (memory_path / "here").mkdir()
    monkeypatch.chdir(memory_path / "here")
    for path in (".", memory_path / "here", "../here"):
        with pytest.raises(ConfigError, match="here is the working directory"):
            milepost.save(path, state(1))
        with pytest.raises(dcp.api.CheckpointException, match="is the working directory"):
            dcp.save(state(1), storage_writer=milepost.StorageWriter(path))
    assert os.getcwd() == str(memory_path / "here")
    assert not list((memory_path / "here").iterdir())
    milepost.save("step-1", state(1))
    assert value_in(memory_path / "here" / "step-1") == 1


@pytest.mark.parametrize("mount", ["mount -t tmpfs none {}", "mount --bind {} {}"], ids=["tmpfs", "bind"])
def test_a_mount_point_is_refused_before_anything_is_written(memory_path: Path, mount: str) -> None:
    folder = memory_path / "a mount"
    folder.mkdir()
    program = f"""
import sys, numpy as np
from milepost.errors import ConfigError
from milepost.storage import LocalStorage
from milepost.run.attempts import begin_attempt
try:
    begin_attempt(LocalStorage({str(memory_path)!r}), "a mount", "0" * 32)
except ConfigError as error:
    print(error)
"""
    mounting = mount.replace("{}", f"'{folder}'")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mounting} && echo mounted && exec "$0" -c "$1"', sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "mounted" not in done.stdout:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert "a mount is a mount point" in done.stdout, done.stderr
    assert [path.name for path in memory_path.iterdir()] == ["a mount"]


# ---- other programs ----


def test_a_stock_save_over_ours_is_read_as_what_it_is(memory_path: Path) -> None:
    step = memory_path / "step-1"
    milepost.save(step, state(1))
    dcp.save(state(2), checkpoint_id=step)
    info = catalog.examine(LocalStorage(memory_path), "step-1")
    assert info is not None
    assert info.state == "external"
    assert "milepost.json is ignored: another program has saved over" in info.reason
    assert value_in(step) == 2
    report = verify(step)
    assert report.verdict == "not_verified"
    assert any("another program has saved over the older save" in note for note in report.notes)
    milepost.save(step, state(3))
    assert (value_in(step), verify(step).verdict) == (3, "ok")


def test_metadata_of_another_save_of_ours_is_damage(memory_path: Path) -> None:
    for name, nbytes in (("step-1", 40), ("other", 400)):
        milepost.save(memory_path / name, state(1, nbytes) | {name: 1})
    step = memory_path / "step-1"
    (step / ".metadata").write_bytes((memory_path / "other" / ".metadata").read_bytes())
    assert verify(step).verdict == "damaged"


def test_files_that_a_stock_save_left_behind_are_no_damage(memory_path: Path) -> None:
    dcp.save(state(1), checkpoint_id=memory_path / "stock")
    (memory_path / "stock" / "__3_0.distcp").write_bytes(b"of a save with more ranks")
    report = verify(memory_path / "stock")
    assert (report.verdict, report.problems) == ("not_verified", ())
    assert any("__3_0.distcp" in note for note in report.notes)
