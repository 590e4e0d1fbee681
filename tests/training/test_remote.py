"""A run with a remote folder: the steps that are copied, kept, and resumed from."""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import threading
import time
import uuid
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from milepost import CheckpointConfig, CheckpointManager, Commit
from milepost.cli.main import main
from milepost.errors import ConfigError, SaveError, StorageError
from milepost.run import catalog, checkpoint_record
from milepost.saving import copy_process
from milepost.storage import open_storage
from milepost.testing.proxy import Fault, Proxy
from milepost.testing.seaweed import BUCKET, SECRET_KEY, Seaweed
from milepost.testing.world import run_world
from milepost.verification.verify import verify


@pytest.fixture(params=["folder", "store"])
def remote(request: pytest.FixtureRequest, memory_path: Path) -> str:
    if request.param == "folder":
        return str(memory_path / "remote")
    request.getfixturevalue("store_environment")
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def model(value: float) -> torch.nn.Module:
    made = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(made.weight, value)
    return made


def config(remote: str, **more: object) -> CheckpointConfig:
    return CheckpointConfig(enable=True, interval=1, remote_folder=remote, **more)  # type: ignore[arg-type]


def steps(url: str) -> list[int]:
    entries = catalog.scan(*open_storage(url))
    assert all(entry.state == "committed" for entry in entries), entries
    return [entry.step for entry in entries]


def wait_until(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_steps_are_copied_and_a_wiped_disk_is_no_loss(memory_path: Path, remote: str) -> None:
    seen: list[Commit] = []
    trained = model(0.0)
    kept = config(remote, keep_latest_k=1, remote_keep_latest_k=2, async_mode="async")
    with CheckpointManager(memory_path / "run", kept, model=trained, on_commit=seen.append) as manager:
        for step in (1, 2, 3):
            torch.nn.init.constant_(trained.weight, step)
            manager.save(step)
            manager.maybe_wait_for_saving()
            wait_until(lambda step=step: (step, "remote_folder") in {(one.step, one.tier) for one in seen})
    assert steps(str(memory_path / "run")) == [3]
    assert steps(remote) == [2, 3]
    assert all(verify(f"{remote}/step-{step}").is_sound for step in (2, 3))
    assert {one.path for one in seen if one.tier == "remote_folder"} == {f"{remote}/step-{n}" for n in (1, 2, 3)}

    shutil.rmtree(memory_path / "run")
    resumed = model(-1.0)
    with CheckpointManager(memory_path / "run", kept, model=resumed) as manager:
        report = manager.load()
        assert report is not None
        assert report.resumed_step == 3
        assert torch.equal(resumed.weight, trained.weight)  # type: ignore[arg-type]
        assert manager.save(4)
    assert steps(str(memory_path / "run")) == [4]
    assert steps(remote) == [3, 4]
    lineage = checkpoint_record.read_manifest(*open_storage(f"{remote}/step-4")).lineage
    assert lineage is not None
    assert lineage.parent_step == 3


def test_a_slow_copy_gets_the_newest_and_the_last(memory_path: Path) -> None:
    remote = str(memory_path / "remote")
    with CheckpointManager(
        memory_path / "run", config(remote, keep_latest_k=2, remote_keep_latest_k=0), model=model(0)
    ) as manager:
        for step in range(1, 41):
            assert manager.save(step)
    copied = steps(remote)
    assert copied[-1] == 40
    assert len(copied) < 20


def test_only_every_nth_step_is_copied_and_the_last(memory_path: Path) -> None:
    remote = str(memory_path / "remote")
    with CheckpointManager(memory_path / "run", config(remote, remote_every_n_steps=2), model=model(0)) as manager:
        for step in (1, 2, 3):
            manager.save(step)
            if step == 2:
                wait_until(lambda: Path(remote, "step-2").exists())
    assert steps(remote) == [2, 3]


def test_what_a_run_that_died_has_not_copied_is_copied_by_the_next(memory_path: Path) -> None:
    with CheckpointManager(memory_path / "run", config(""), model=model(1)) as manager:
        manager.save(1)
        manager.save(2)
    remote = str(memory_path / "remote")
    with CheckpointManager(memory_path / "run", config(remote), model=model(0)) as manager:
        manager.load()
    assert steps(remote) == [2]


def test_a_later_save_there_is_not_replaced_by_an_older_one_from_here(memory_path: Path) -> None:
    """A node returns with a step that it never copied, after another node has continued the run."""
    remote = str(memory_path / "remote")
    with CheckpointManager(memory_path / "a", config(remote), model=model(1)) as manager:
        manager.save(1)
    with CheckpointManager(memory_path / "a", config(""), model=model(1)) as manager:
        manager.load()
        manager.save(2)
    with CheckpointManager(memory_path / "b", config(remote), model=model(1)) as manager:
        manager.load()
        for step in (2, 3):
            manager.save(step)
            wait_until(lambda step=step: Path(remote, f"step-{step}").exists())
    continued = {entry.step: entry.save_id for entry in catalog.scan(*open_storage(remote))}
    assert continued.keys() == {1, 2, 3}
    with CheckpointManager(memory_path / "a", config(remote), model=model(0)) as manager:
        report = manager.load()
    assert report is not None
    assert report.resumed_step == 3
    assert {entry.step: entry.save_id for entry in catalog.scan(*open_storage(remote))} == continued


def test_the_folder_of_another_run_is_refused(memory_path: Path, remote: str) -> None:
    for run, step in (("a", 1), ("b", 5)):
        with CheckpointManager(memory_path / run, config(remote if run == "a" else ""), model=model(1)) as manager:
            manager.save(step)
    kept = config(remote, remote_keep_latest_k=1)
    with pytest.raises(ConfigError, match=r"remote_folder .* holds steps of another run .*step 1 there, step 5 here"):
        CheckpointManager(memory_path / "b", kept, model=model(1))
    with (
        pytest.raises(ConfigError, match="another run"),
        CheckpointManager(memory_path / "b", config(remote, load_only=True), model=model(1)) as manager,
    ):
        manager.load()
    assert steps(remote) == [1]


def test_a_step_that_is_damaged_here_is_read_there(memory_path: Path) -> None:
    remote, trained = str(memory_path / "remote"), model(7.0)
    with CheckpointManager(memory_path / "run", config(remote), model=trained) as manager:
        manager.save(1)
    path = memory_path / "run/step-1/__0_0.distcp"
    data = bytearray(path.read_bytes())
    place = data.index(torch.tensor([7.0] * 4).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    resumed = model(0.0)
    with CheckpointManager(memory_path / "run", config(remote), model=resumed) as manager:
        report = manager.load()
    assert report is not None
    assert report.path.startswith(remote)
    assert torch.equal(resumed.weight, trained.weight)  # type: ignore[arg-type]


def test_a_last_step_that_can_not_be_copied_fails_the_run_and_is_copied_by_the_command_it_gives(
    memory_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milepost.training.remote.RETRY_S", 0.05)
    remote = memory_path / "a remote"
    manager = CheckpointManager(memory_path / "run", config(str(remote)), model=model(0))
    manager.save(1)
    wait_until(lambda: Path(remote, "step-1").exists())
    (remote / "step-2").write_text("in the way")
    with caplog.at_level(logging.INFO, "milepost"):
        manager.save(2)
        with pytest.raises(SaveError) as caught:
            manager.close()
    assert "step 2 could not be copied" in caplog.text
    assert f"step 2 was not copied to checkpoint.remote_folder {remote}, whose newest step is 1: " in str(caught.value)
    assert f"committed only in {memory_path}/run: before that is deleted, run `milepost sync " in str(caught.value)
    assert steps(str(memory_path / "run")) == [1, 2]
    (remote / "step-2").unlink()
    command = str(caught.value).split("`")[1]
    assert main(shlex.split(command)[1:]) == 0
    assert steps(str(remote)) == [1, 2]
    CheckpointManager(memory_path / "run", config(str(remote)), model=model(0)).close()  # neither is locked


def test_a_store_that_went_away_fails_the_run_at_its_end_and_the_next_start_copies_the_step(
    memory_path: Path, store: Seaweed, store_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milepost.training.remote.RETRY_S", 0.05)
    remote = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with Proxy(store.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        manager = CheckpointManager(memory_path / "run", config(remote), model=model(0))
        assert manager.load() is None
        proxy.fault = lambda request: Fault("status", status=403)
        manager.save(1)
        with pytest.raises(
            SaveError, match=r"step 1 was not copied .*, which can't be read: access denied \(403\)"
        ) as caught:
            manager.close()
        assert SECRET_KEY not in str(caught.value)
        proxy.fault = lambda request: None
        with CheckpointManager(memory_path / "run", config(remote), model=model(0)):
            pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    assert steps(remote) == [1]


def close_with_a_copy_that_fails(folder: Path) -> str:
    manager = CheckpointManager(folder / "run", config(str(folder / "remote")), model=model(0))
    if dist.get_rank() == 0:
        (folder / "remote/step-1").write_text("in the way")
    dist.barrier()
    manager.save(1)
    try:
        manager.close()
    except SaveError as error:
        return error.message
    return ""


def test_every_rank_gets_the_error_of_the_last_copy(memory_path: Path) -> None:
    with patch("milepost.training.remote.RETRY_S", 0.05):
        said = run_world(close_with_a_copy_that_fails, 2, memory_path)
    assert said[0] == said[1]
    assert "step 1 was not copied" in said[0]


def test_a_step_that_is_pruned_by_hand_before_it_is_copied_is_no_failure(
    memory_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copying = threading.Event()
    begin = copy_process.start

    def start_late(request: copy_process.CopyRequest) -> subprocess.Popen[bytes]:
        copying.wait(30)
        return begin(request)

    with (
        caplog.at_level(logging.INFO, "milepost"),
        patch("milepost.saving.copy_process.start", start_late),
        CheckpointManager(memory_path / "run", config(str(memory_path / "remote")), model=model(0)) as manager,
    ):
        manager.save(1)
        manager.save(2)
        assert main(["prune", str(memory_path / "run"), "--keep-latest", "1"]) == 0
        copying.set()
    assert "could not be copied" not in caplog.text
    assert steps(str(memory_path / "remote")) == [2]


@pytest.mark.usefixtures("store_environment")
def test_a_remote_folder_that_can_not_be_read_is_reported_before_training(memory_path: Path) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        CheckpointManager(memory_path / "run", config("s3://no-such-bucket/run"), model=model(0))


@pytest.mark.parametrize("other", ["run/", "../{name}/run", "link", "run/step-3/copies"])
def test_a_remote_folder_that_is_the_folder_itself_is_refused(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.chdir(memory_path)
    Path("run").mkdir()
    Path("link").symlink_to("run")
    with pytest.raises(ConfigError, match=r"checkpoint\.remote_folder .* (the same folder|inside step-3)"):
        CheckpointManager("run", config(other.format(name=memory_path.name)), model=model(0))


def test_a_damaged_step_is_not_copied(memory_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(memory_path / "run", config(""), model=model(7.0)) as manager:
        manager.save(1)
    path = memory_path / "run/step-1/__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor([7.0] * 4).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with (
        caplog.at_level(logging.INFO, "milepost"),
        pytest.raises(SaveError, match=r"step 1 was not copied .*is damaged"),
        CheckpointManager(memory_path / "run", config(str(memory_path / "remote")), model=model(0)),
    ):
        wait_until(lambda: "step 1 could not be copied" in caplog.text)
    assert "is damaged" in caplog.text
    assert steps(str(memory_path / "remote")) == []
