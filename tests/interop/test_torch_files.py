"""Folders of the hub from before safetensors: ``pytorch_model.bin``, one or several with an index, as a source."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_models import KINDS, logits
from safetensors.torch import load_file
from tiny_models import assert_equal, hf_tensors

import milepost
from milepost import CheckpointConfig, CheckpointManager, HfModel
from milepost.cli.main import main
from milepost.errors import ConversionError, DigestMismatchError, FormatError
from milepost.interop.convert import convert
from milepost.interop.options import ConvertOptions
from milepost.interop.weights.open import open_weights
from milepost.verification.verify import verify

TO_HF = ConvertOptions(to="hf", model="hf", verify=True)
INDEX = "pytorch_model.bin.index.json"


def torch_files(folder: Path, parts: Sequence[dict[str, torch.Tensor]], config: Any = None) -> Path:
    """A folder as transformers wrote it until version 4: one file, or several with an index."""
    folder.mkdir()
    names = [f"pytorch_model-{n + 1:05d}-of-{len(parts):05d}.bin" for n in range(len(parts))]
    names = names if len(parts) > 1 else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    if len(parts) > 1:
        total = sum(tensor.nbytes for part in parts for tensor in part.values())
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "made up", "architectures": ["X"]}))
    return folder


def cut(tensors: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    keys = list(tensors)
    return [{key: tensors[key] for key in keys[n::count]} for n in range(count)]


@pytest.mark.parametrize("count", [1, 3])
def test_a_folder_of_torch_files_is_a_source_of_everything(memory_path: Path, count: int) -> None:
    model: Any = KINDS["qwen2, tied"].model()
    model.save_pretrained(memory_path / "new")
    state = dict(model.state_dict())  # the tied output too, on the same storage
    config = json.loads((memory_path / "new" / "config.json").read_text())
    old = torch_files(memory_path / "old", cut(state, count), config)
    expected = hf_tensors(memory_path / "new")

    convert(old, memory_path / "out", TO_HF)
    assert_equal(hf_tensors(memory_path / "out"), expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "out")
    assert torch.equal(logits(loaded.eval()), logits(model))

    convert(old, memory_path / "step-0", ConvertOptions(to="dcp", model="hf", verify=True))
    with milepost.open(memory_path / "step-0") as step, milepost.open(old) as opened:
        assert set(step) == set(opened) == set(state)
        for key, tensor in state.items():
            assert np.array_equal(opened[key][...], tensor.numpy())
            assert np.array_equal(step[key][...], tensor.numpy())

    assert main(["merge", str(memory_path / "new"), str(old), "--to", str(memory_path / "merged")]) == 0
    assert_equal(hf_tensors(memory_path / "merged"), expected)
    assert main(["diff", str(old), str(memory_path / "new"), "--model", "hf"]) == 0

    fresh = type(model)(model.config)
    start = CheckpointConfig(initial_load_in_hf=True, initial_load_path=str(old))
    with CheckpointManager(memory_path / "run", start, model=fresh, hf=HfModel.of(fresh)) as manager:
        report = manager.load()
    assert report is not None
    assert (report.missing, report.unexpected, report.cast) == ((), (), ())
    assert_equal(dict(fresh.state_dict()), state)


def test_the_trainers_own_families_start_from_torch_files(
    memory_path: Path, hf_folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = hf_folders("llama")
    tensors = hf_tensors(plain)
    old = torch_files(memory_path / "old", cut(tensors, 2), json.loads((plain / "config.json").read_text()))
    assert main(["convert", str(old), str(memory_path / "a"), "--to", "dcp", "--model", "hf"]) == 0
    assert main(["inspect", str(old)]) == 0
    assert f"{len(tensors)}" in capsys.readouterr().out
    assert main(["stats", str(old), "model.norm.weight"]) == 0


def test_safetensors_are_preferred_as_in_transformers(memory_path: Path) -> None:
    tensors = {"a": torch.ones(3)}
    folder = torch_files(memory_path / "m", [{"a": torch.zeros(3)}])
    shutil.copy(folder / "pytorch_model.bin", folder / "training_args.bin")
    with milepost.open(folder) as opened:
        assert opened["a"][0] == 0
    milepost_folder = memory_path / "s"
    from safetensors.torch import save_file

    milepost_folder.mkdir()
    save_file(tensors, folder / "model.fp16.safetensors")  # a variant is not taken by default
    with milepost.open(folder) as opened:
        assert opened["a"][0] == 0
    save_file(tensors, folder / "model.safetensors")
    with milepost.open(folder) as opened:
        assert opened["a"][0] == 1


def test_damage_is_found_by_verify_and_while_reading(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = cut({f"t{n}": torch.arange(1000.0) + n for n in range(4)}, 2)
    folder = torch_files(memory_path / "m", parts)
    assert main(["verify", str(folder)]) == 11  # what is between the tensors has no digests
    file = folder / "pytorch_model-00002-of-00002.bin"
    data = bytearray(file.read_bytes())
    data[data.find(torch.arange(1000.0).add(1).numpy().tobytes()) + 400] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(folder)]) == 5
    assert file.name in capsys.readouterr().out
    with pytest.raises(DigestMismatchError, match=file.name):
        convert(folder, memory_path / "out", TO_HF)
    assert not (memory_path / "out").exists()


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


SECOND = "pytorch_model-00002-of-00003.bin"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda f: (f / SECOND).unlink(), "missing: one of 3 files"),
    "a file is missing, no index": (
        lambda f: ((f / SECOND).unlink(), (f / INDEX).unlink()),
        "missing: one of 3 files",
    ),
    "a file is cut off": (lambda f: os.truncate(f / SECOND, 700), "00002-of-00003"),
    "a key is elsewhere": (
        lambda f: edited(f, lambda i: i["weight_map"].update(t0=SECOND, t1="pytorch_model-00001-of-00003.bin")),
        "the index says pytorch_model-00002",
    ),
    "a key is nowhere": (
        lambda f: edited(f, lambda i: i["weight_map"].update(x="pytorch_model-00003-of-00003.bin")),
        "in the index, but in none of its files",
    ),
    "a key is not in the index": (
        lambda f: edited(f, lambda i: i["weight_map"].pop("t0")),
        "not named by pytorch_model.bin.index.json, although it is one of its 3 files",
    ),
    "a key is there twice": (
        lambda f: torch.save({"t0": torch.ones(1), "t2": torch.ones(1)}, f / "pytorch_model-00003-of-00003.bin"),
        "stored in another file too",
    ),
    "the index leads out": (
        lambda f: edited(f, lambda i: i["weight_map"].update(t0="../x.bin")),
        "expected a bin file beside it",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_index_that_does_not_fit_the_files_is_refused(memory_path: Path, name: str) -> None:
    folder = torch_files(memory_path / "m", cut({f"t{n}": torch.ones(100) for n in range(3)}, 3))
    spoil, match = FAULTS[name]
    spoil(folder)
    for act in (open_weights, milepost.open, lambda path: convert(path, memory_path / "out", TO_HF)):
        with pytest.raises(FormatError, match=match):
            act(folder)
    assert verify(folder).problems


def test_a_wrong_total_size_and_left_out_files_are_noted(memory_path: Path) -> None:
    folder = torch_files(memory_path / "m", cut({f"t{n}": torch.ones(100) for n in range(3)}, 3))
    assert not any("total_size" in note for note in verify(folder).notes)
    edited(folder, lambda index: index["metadata"].update(total_size=5))
    shutil.copy(folder / "pytorch_model-00003-of-00003.bin", folder / "pytorch_model-00004-of-00004.bin")
    report = convert(folder, memory_path / "out", TO_HF)
    for notes in (report.notes, verify(folder).notes):
        assert any("total_size of 5 bytes, its tensors have 1,200" in note for note in notes)
        assert any("does not name pytorch_model-00004-of-00004.bin: not read" in note for note in notes)


def test_files_from_before_torch_1_6_are_refused_with_what_to_do(memory_path: Path) -> None:
    folder = torch_files(memory_path / "m", [{"a": torch.ones(3)}])
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for act in (open_weights, verify):
        with pytest.raises(ConversionError, match=r"before version 1\.6: load it"):
            act(folder)


def test_code_in_a_torch_file_is_not_run(memory_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(memory_path / "ran"),)

    folder = torch_files(memory_path / "m", [{"a": torch.ones(3)}])
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError):
        open_weights(folder)
    assert verify(folder).problems
    assert not (memory_path / "ran").exists()


def test_transposed_tensors_are_read_in_their_own_order(memory_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {"t": torch.arange(6.0).reshape(2, 3).t(), "p": base.permute(2, 0, 1), "one": torch.ones(1, 5).t()}
    state |= {"inner": base[1].t(), "half": torch.arange(6).bfloat16().reshape(3, 2).t()}
    folder = torch_files(memory_path / "m", [state])
    convert(folder, memory_path / "out", TO_HF)
    found = load_file(memory_path / "out" / "model.safetensors")
    assert_equal(found, {key: tensor.contiguous() for key, tensor in state.items()})
    with milepost.open(folder) as opened:
        assert np.array_equal(opened["p"][1:3, ::-1, 2], state["p"].numpy()[1:3, ::-1, 2])
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    data[data.find(torch.arange(6.0).numpy().tobytes()) + 4] ^= 1
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(DigestMismatchError):
        convert(folder, memory_path / "again", TO_HF)


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    plain = torch_files(tmp_path / "plain", cut({"a": torch.ones(3), "b": torch.zeros(2)}, 2))
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, blobs / str(index))
        os.symlink(f"../../blobs/{index}", snapshot / file.name)
    convert(snapshot, tmp_path / "out", TO_HF)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"a", "b"}
    assert not verify(snapshot).problems


def test_one_of_several_files_names_its_folder(memory_path: Path) -> None:
    folder = torch_files(memory_path / "m", cut({"a": torch.ones(3), "b": torch.zeros(2)}, 2))
    with pytest.raises(ConversionError, match="2 files: give the folder that holds them all"):
        convert(folder / "pytorch_model-00001-of-00002.bin", memory_path / "out", TO_HF)


def test_an_old_adapter_is_known_as_one(memory_path: Path) -> None:
    (memory_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, memory_path / "adapter_model.bin")
    with pytest.raises(ConversionError, match="PEFT adapter"):
        convert(memory_path, memory_path / "out", TO_HF)
