"""A step copied to another place: complete there or absent, whatever happens, and not copied twice."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import obstore.store
import pytest

import milepost
from milepost.errors import CheckpointDamagedError, ConfigError, SaveError
from milepost.format.tags import tag_of
from milepost.interop.weights.open import open_weights
from milepost.run import catalog, checkpoint_record
from milepost.run.attempts import begin_attempt
from milepost.run.owner import OWNER_PREFIX, this_process
from milepost.saving.copy_step import Spot, attempt_of, copy_step
from milepost.storage import LocalStorage
from milepost.storage.base import Storage
from milepost.storage.objectstore import ObjectStorage
from milepost.storage.retry import Retry
from milepost.testing.sample import save_arrays
from milepost.train.models import build_model, model_args
from milepost.verification.verify import verify_in

Tally = Callable[..., None]
ARRAYS = {"a": np.arange(24, dtype=np.float32).reshape(6, 4), "b.c": np.full((4,), 7, np.float32)}
STEP = "run/step-5"


def memory(client: object | None = None) -> ObjectStorage:
    store = client if client is not None else obstore.store.MemoryStore()
    return ObjectStorage("memory://bucket", store=store, retry=Retry(num_tries=3, first_wait_s=0.0))


def saved(storage: Storage, path: str = STEP, scale: float = 1.0) -> Spot:
    arrays = {key: array * np.float32(scale) for key, array in ARRAYS.items()}
    save_arrays(storage, path, arrays, objects={"n": 3}, step=5, num_ranks=2, now=1.0)
    return Spot(storage, path)


def test_there_and_back_is_the_same_checkpoint(tmp_path: Path) -> None:
    src = saved(LocalStorage(tmp_path))
    there, back = Spot(memory(), "elsewhere/step-5"), Spot(LocalStorage(tmp_path / "back"), "step-5")
    assert not copy_step(src, there).was_there
    assert copy_step(src, there).was_there
    assert all(tag_of(name) for name in there.storage.list_files("elsewhere/step-5") if name.startswith("__"))
    copy_step(there, back)
    for spot in (there, back):
        assert verify_in(spot.storage, spot.path).is_sound
    names = sorted(entry.name for entry in src.storage.list(STEP))
    assert names == sorted(entry.name for entry in back.storage.list("step-5"))
    for name in names:
        assert src.storage.read(f"{STEP}/{name}") == back.storage.read(f"step-5/{name}")


@pytest.mark.parametrize("kind", ["store", "disk"])
def test_an_interrupted_copy_continues_where_it_stopped(tmp_path: Path, kind: str) -> None:
    src = saved(LocalStorage(tmp_path / "src"))
    dst = Spot(memory() if kind == "store" else LocalStorage(tmp_path / "dst"), STEP)

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt  # before the last file has its name

    with pytest.raises(KeyboardInterrupt):
        copy_step(src, dst, stop)
    assert catalog.scan(dst.storage, "run") == []
    whole = sum(entry.nbytes for entry in src.storage.list(STEP) if entry.name.startswith("__"))
    assert 0 < copy_step(src, dst).nbytes < whole
    assert verify_in(dst.storage, STEP).is_sound


def test_another_process_that_copies_the_same_is_left_to_it(tmp_path: Path) -> None:
    src, dst = saved(LocalStorage(tmp_path / "src")), LocalStorage(tmp_path / "dst")
    attempt = attempt_of(STEP, checkpoint_record.read_manifest(src.storage, STEP).save_id)
    dst.make_folder(attempt)
    says_who = (
        "from milepost.run.owner import this_process\n"
        "print(this_process(0.0).dump().decode().replace(chr(10), ' '), flush=True)\n"
        "input()"
    )
    with subprocess.Popen([sys.executable, "-c", says_who], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        dst.write(f"{attempt}/{OWNER_PREFIX}0000abcd.json", process.stdout.readline())
        with pytest.raises(SaveError, match="is already copying to"):
            copy_step(src, Spot(dst, STEP))
        process.communicate(b"\n", timeout=20)
    copy_step(src, Spot(dst, STEP))


@pytest.mark.parametrize("kind", ["store", "disk"])
def test_of_two_processes_that_begin_the_same_copy_at_once_this_one_leaves_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = saved(LocalStorage(tmp_path / "src"))
    dst: Storage = memory() if kind == "store" else LocalStorage(tmp_path / "dst")
    init = replace(this_process(time.time()), pid=1, started="")  # the other one: it lives as long as this test
    theirs = f"{OWNER_PREFIX}0000abcd.json"

    def begin_with_company(storage: Storage, target: str, save_id: str) -> str:
        attempt = begin_attempt(storage, target, save_id)
        storage.write(f"{attempt}/{theirs}", init.dump())
        return attempt

    monkeypatch.setattr("milepost.saving.copy_step.begin_attempt", begin_with_company)
    monkeypatch.setattr("milepost.saving.copy_step.is_alive", lambda owner, now: True)
    with pytest.raises(SaveError, match=r"process 1 on .* is already copying to"):
        copy_step(src, Spot(dst, STEP))
    attempt = attempt_of(STEP, checkpoint_record.read_manifest(src.storage, STEP).save_id)
    assert [name for name in dst.names(attempt) if name.startswith(OWNER_PREFIX)] == [theirs]


def test_what_is_not_whole_or_not_ours_is_not_copied(tmp_path: Path) -> None:
    src, dst = saved(LocalStorage(tmp_path)), Spot(memory(), STEP)
    src.storage.remove(f"{STEP}/__1_0.distcp")
    with pytest.raises(CheckpointDamagedError, match=r"__1_0\.distcp: missing"):
        copy_step(src, dst)
    src = saved(LocalStorage(tmp_path), "other/step-5")
    for name in ("milepost.json", "milepost.shards", "milepost.digests"):
        src.storage.remove(f"other/step-5/{name}")
    with pytest.raises(ConfigError, match="another program"):
        copy_step(src, dst)
    assert dst.storage.list_files("") == {}


def test_a_step_of_hugging_face_files_goes_there_and_back(memory_path: Path) -> None:
    args = model_args("llama3", "debugmodel", vocab_size=256)
    model = build_model("llama3", "debugmodel", vocab_size=256, seq_len=32)
    config = milepost.CheckpointConfig(enable=True, last_save_in_hf=True)
    with milepost.CheckpointManager(
        memory_path / "run", config, model=model, hf=milepost.HfModel(name="llama3", flavor="debugmodel", args=args)
    ) as manager:
        manager.save(5, last_step=True)
    src, there = Spot(LocalStorage(memory_path), STEP), Spot(memory(), STEP)
    back = Spot(LocalStorage(memory_path / "back"), STEP)
    copy_step(src, there)
    copy_step(there, back)
    for spot in (src, there, back):
        assert verify_in(spot.storage, spot.path).is_sound
    with open_weights(memory_path / "back" / STEP).source as source:
        assert sum(1 for _ in source.tensors) == len(list(model.parameters()))
        source.check_digests()
