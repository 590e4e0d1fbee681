"""Damaged checkpoints in other formats: a stock DCP folder, and a save as Hugging Face files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from damages import damages, same_state

import milepost
from milepost.errors import CheckpointDamagedError, MilepostError, StorageError
from milepost.format.box import Box
from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME
from milepost.interop.hf.save import commit_record
from milepost.interop.weights.open import open_weights
from milepost.run import commit
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import begin_attempt, new_save_id
from milepost.storage import LocalStorage
from milepost.testing.sample import file_digests
from milepost.verification.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")

Tally = Callable[..., None]

SEED = 1_915


def external_state(shift: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    tensors = {f"w{n}": torch.rand(30 + n, 9, generator=generator) + shift for n in range(4)}
    values = {"text": f"ünï {shift}", "list": [1, shift, None], "raw": bytes(range(90)), "set": {1, 2}, "step": 7}
    return {**tensors, "half": (torch.rand(50, generator=generator) + shift).bfloat16(), **values}


def test_damage_in_an_external_checkpoint_is_found_or_does_not_matter(
    memory_path: Path, tally: Callable[..., None]
) -> None:
    """All that its CRC-32s cover is checked; a load gives what was saved, or an error."""
    for name, shift in (("older", 1.0), ("intact", 2.0)):
        dcp.save(external_state(shift), checkpoint_id=memory_path / name)
    intact, step = memory_path / "intact", memory_path / "step-7"
    tried = errors = 0
    for damage in damages(intact, memory_path / "older", SEED, 300):
        if damage.what.startswith("everything"):
            continue
        shutil.copytree(intact, step)
        damage.apply(step)
        into = {
            key: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for key, v in external_state(0).items()
        }
        try:
            milepost.load(step, into)
        except MilepostError:
            errors += 1
            with_report = (step / METADATA_NAME).is_file()
            assert not with_report or not verify(step).is_sound or METADATA_NAME in damage.files, damage.what
        else:
            # Whole records of another save have CRC-32s of their own, and nothing else distinguishes them.
            either = external_state(2.0), external_state(1.0) if "save before" in damage.what else external_state(2.0)
            for key, value in into.items():
                assert any(same_state({key: value}, {key: state[key]}) for state in either), (damage.what, key)
        shutil.rmtree(step)
        tried += 1
    assert tried / 3 < errors < tried
    tally("a file of a stock DCP checkpoint damaged: verify and load", tried=tried, lost=0, seed=SEED)


# ---- a save in Hugging Face's form ----


def save_hf(folder: Path, shift: float) -> None:
    """As the last save of a run in that form is committed: weights, index and config beside a manifest."""
    storage = LocalStorage(folder.parent)
    save_id = new_save_id()
    attempt = begin_attempt(storage, folder.name, save_id)
    data = folder.parent / attempt / "data"
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in names:
        tensors = {f"{name[:11]}.{n}": torch.full((40, 9), n + shift) for n in range(3)}
        safetensors.torch.save_file(tensors, data / name, metadata={"format": "pt"})
    (data / "config.json").write_text(f'{{"model_type": "llama", "rms_norm_eps": {shift}}}')
    record = commit_record(SaveInfo(step=7, kind="model"), save_id=save_id, world_size=1, now=1.0)
    commit.publish_files(storage, attempt, folder.name, file_digests(data), record)


def test_damage_in_a_save_in_hugging_faces_form_is_found_in_every_file_of_it(
    memory_path: Path, tally: Callable[..., None]
) -> None:
    for name, shift in (("older", 0.25), ("intact", 0.5)):
        (memory_path / name).mkdir()
        save_hf(memory_path / name / "step-7", shift)
    intact, step = memory_path / "intact" / "step-7", memory_path / "step-7"
    report = verify(intact)
    assert (report.problems, report.verdict, report.unchecked_nbytes) == ((), "ok", 0)
    tried = 0
    for damage in damages(intact, memory_path / "older" / "step-7", SEED + 1, 100):
        shutil.copytree(intact, step)
        damage.apply(step)
        # Another save, whole, is undamaged; and a link to the very file is no damage, but is refused in a run.
        if not damage.what.startswith("everything"):
            named = {problem.file for problem in verify(step).problems}
            has_record = not {MANIFEST_NAME, DIGESTS_NAME} & {*damage.files}
            assert named & {*damage.files} if has_record else named, (damage.what, named)
            if not damage.what.startswith("a link"):
                with pytest.raises((CheckpointDamagedError, StorageError)):
                    read_all(step)
        shutil.rmtree(step)
        tried += 1
    tally("a file of a save in Hugging Face's form damaged: verify and read", tried=tried, lost=0, seed=SEED + 1)


def test_a_flipped_bit_in_any_file_of_a_save_in_hugging_faces_form_is_found(memory_path: Path) -> None:
    save_hf(memory_path / "step-7", 0.5)
    step, rng = memory_path / "step-7", random.Random(SEED)
    for path in sorted(step.iterdir()):
        data = path.read_bytes()
        for bit in {0, 8 * len(data) - 1, *(rng.randrange(8 * len(data)) for _ in range(12))}:
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            report = verify(step)
            assert report.verdict == "damaged", (path.name, bit)
            with pytest.raises(CheckpointDamagedError):
                read_all(step)
        path.write_bytes(data)
    assert verify(step).verdict == "ok"
    read_all(step)


def test_a_changed_tensor_of_a_save_in_hugging_faces_form_is_named(memory_path: Path) -> None:
    save_hf(memory_path / "step-7", 0.5)
    path = memory_path / "step-7" / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (problem,) = verify(path.parent).problems
    assert "model-00002.2" in str(problem)
    assert problem.file == path.name


def read_all(step: Path) -> None:
    """All that a load or a conversion reads of a step."""
    with open_weights(step).source as source:
        for key, info in source.tensors.items():
            source.read_into(key, Box.whole(info.shape), np.empty(info.shape, np.float32))
        source.check_digests()
