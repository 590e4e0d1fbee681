"""Opening weights of every format, and detection of damage in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import CheckpointNotFoundError, ConversionError, DigestMismatchError, FormatError, MilepostError
from milepost.format.box import Box
from milepost.format.huggingface import INDEX_NAME
from milepost.interop.convert import convert
from milepost.interop.options import ConvertOptions
from milepost.interop.weights.open import open_weights
from milepost.saving.save import save
from milepost.verification.verify import verify

STATE = {
    "a.weight": torch.arange(3_000_000.0).reshape(1000, 3000),
    "b": torch.arange(7).bfloat16(),
    "optimizer": {"exp_avg": torch.ones(3)},
    "train_state": {"step": 3},
}


def read(path: Path) -> dict[str, np.ndarray]:
    with open_weights(path).source as source:
        found = {}
        for key, info in source.tensors.items():
            found[key] = np.empty(info.shape, np.float32)
            source.read_into(key, Box.whole(info.shape), found[key])
        source.check_digests()
        return found


@pytest.mark.parametrize("writer", ["milepost", "stock DCP"])
def test_the_model_part_of_a_training_checkpoint_is_read(memory_path: Path, writer: str):
    path = memory_path / "step-1"
    if writer == "milepost":
        save(path, STATE)
    else:
        dcp.save(STATE, checkpoint_id=str(path))
    found = read(path)
    assert found.keys() == {"a.weight", "b"}
    np.testing.assert_array_equal(found["a.weight"], STATE["a.weight"].numpy())
    np.testing.assert_array_equal(found["b"], np.arange(7))


@pytest.mark.parametrize("writer", ["milepost", "stock DCP", "torch.save"])
def test_a_flipped_bit_is_found_while_reading(memory_path: Path, writer: str):
    path = memory_path / "step-1"
    if writer == "milepost":
        save(path, STATE)
        file = path / "__0_0.distcp"
    elif writer == "stock DCP":
        dcp.save(STATE, checkpoint_id=str(path))
        file = path / "__0_0.distcp"
    else:
        path = file = memory_path / "model.pt"
        torch.save({"a.weight": STATE["a.weight"]}, file)
    data = bytearray(file.read_bytes())
    place = data.find(np.float32(1_500_000.0).tobytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(DigestMismatchError) as caught:
        read(path)
    assert caught.value.path == str(file)
    low, high = caught.value.byte_range
    assert low <= place < high
    if writer == "milepost":
        assert high - low <= 4 << 20, "block digests name the block"


def test_the_hub_caches_links_are_followed(tmp_path: Path, hf_folders: Callable[[str], Path]):
    plain = hf_folders("llama")
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, blobs / str(index))
        os.symlink(f"../../blobs/{index}", snapshot / file.name)
    linked, direct = read(snapshot), read(plain)
    assert linked.keys() == direct.keys()
    assert all(np.array_equal(linked[key], direct[key]) for key in direct)
    for act in (open_weights, verify):
        with pytest.raises(CheckpointNotFoundError, match=r"in the Hugging Face cache: give .*models--x/snapshots/abc"):
            act(tmp_path / "models--x")


@pytest.fixture
def broken(tmp_path: Path, hf_folders: Callable[[str], Path]) -> Path:
    """A copy of a Hugging Face folder, to be broken."""
    return Path(shutil.copytree(hf_folders("llama"), tmp_path / "broken"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_a_missing_file_is_named(broken: Path):
    gone = shards(broken)[1]
    gone.unlink()
    with pytest.raises(FormatError, match=gone.name):
        open_weights(broken)
    (broken / INDEX_NAME).unlink()
    with pytest.raises(FormatError, match=gone.name):
        open_weights(broken)


def test_a_truncated_file_is_named(broken: Path):
    file = shards(broken)[2]
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(FormatError, match="truncated") as caught:
        open_weights(broken)
    assert caught.value.path == str(file)


def test_an_index_that_does_not_fit_the_files_is_refused_with_all_faults(broken: Path):
    index = json.loads((broken / INDEX_NAME).read_text())
    names = [file.name for file in shards(broken)]
    index["weight_map"]["model.absent.weight"] = names[0]
    moved = "model.norm.weight"
    index["weight_map"][moved] = next(name for name in names if name != index["weight_map"][moved])
    (broken / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(FormatError) as caught:
        open_weights(broken)
    assert "(model.absent.weight): in the index, but in none of its files" in caught.value.message
    assert f"({moved}): the index says {index['weight_map'][moved]}" in caught.value.message


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "..", ""])
def test_an_index_may_not_lead_out_of_its_folder(broken: Path, name: str):
    (broken / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(FormatError, match="expected a safetensors file beside it"):
        open_weights(broken)


def test_a_folder_without_weights_says_what_to_give_instead(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        open_weights(tmp_path / "absent")
    with pytest.raises(CheckpointNotFoundError, match="holds no weights"):
        open_weights(tmp_path)
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"consolidated\.00\.pth"):
        open_weights(tmp_path)
    (tmp_path / "step-20").mkdir()
    (tmp_path / "step-100").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="step-100"):
        open_weights(tmp_path)


def test_a_strided_tensor_in_a_pt_file_is_refused_with_advice(tmp_path: Path):
    torch.save({"w": torch.ones(3, 4)[:, :2]}, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match="contiguous"):
        open_weights(tmp_path / "model.pt")


def test_a_part_of_a_larger_storage_in_a_pt_file_is_read(tmp_path: Path):
    base = torch.arange(12.0)
    torch.save({"w": base[4:10].view(2, 3), "all": base}, tmp_path / "model.pt")
    found = read(tmp_path / "model.pt")
    np.testing.assert_array_equal(found["w"], np.arange(4.0, 10.0).reshape(2, 3))


def test_handles_are_closed_when_opening_fails(broken: Path):
    file = shards(broken)[-1]
    os.truncate(file, 20)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(FormatError):
            open_weights(broken)
    assert len(os.listdir("/proc/self/fd")) == before


def a_folder(path: Path, files: dict[str, dict[str, torch.Tensor]], config: dict[str, object] | None = None) -> Path:
    path.mkdir()
    for name, tensors in files.items():
        save_file(tensors, path / name)
    (path / "config.json").write_text(json.dumps({"model_type": "made up"} | (config or {})))
    return path


AS_IT_IS = ConvertOptions(to="hf", model="hf")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_of_one_file_and_an_index_of_others_that_is_read_which_transformers_reads(memory_path: Path) -> None:
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    model.save_pretrained(memory_path / "both")
    held = load_file(memory_path / "both" / "model.safetensors")
    save_file({key: value + 1 for key, value in held.items()}, memory_path / "both" / SHARDS[0])
    (memory_path / "both" / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(held, SHARDS[0])}))
    report = convert(memory_path / "both", memory_path / "out", AS_IT_IS)
    assert any("the former was read, as transformers does" in note for note in report.notes)
    theirs = transformers.BertModel.from_pretrained(memory_path / "both").state_dict()
    assert all(
        torch.equal(value, theirs[key]) for key, value in load_file(memory_path / "out/model.safetensors").items()
    )


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_one_of_several_files_does_not_pass_for_a_model(memory_path: Path, ending: str) -> None:
    tensors = {"weight": torch.ones(2, 2)}
    path = memory_path / f"model-00001-of-00002.{ending}"
    if ending == "bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    with pytest.raises(ConversionError, match="is one of a model's 2 files"):
        convert(path, memory_path / "out", ConvertOptions(to="dcp", model="hf"))
    model = torch.nn.Linear(2, 2)
    config = CheckpointConfig(initial_load_path=str(path))
    with (
        CheckpointManager(memory_path / "run", config, model=model) as manager,
        pytest.raises(MilepostError, match="is one of a model's 2 files"),
    ):
        manager.load()
    with open_weights(path).source as source:
        assert [*source.tensors] == ["weight"], "it may be looked at"


def test_a_model_split_into_torch_files_is_not_read_in_part(memory_path: Path) -> None:
    for number in (1, 2):
        torch.save({"weight": torch.ones(2)}, memory_path / f"part-0000{number}-of-00002.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"split into torch files of unknown names: load it and save"):
        open_weights(memory_path)


def test_what_an_index_says_wrongly_of_good_files_is_noted(broken: Path) -> None:
    index = json.loads((broken / INDEX_NAME).read_text())
    total = sum(array.nbytes for file in shards(broken) for array in load_file(file).values())
    assert index["metadata"]["total_size"] == total
    assert not any("total_size" in note for note in verify(broken).notes)
    index["metadata"]["total_size"] = total + 7.0
    (broken / INDEX_NAME).write_text(json.dumps(index))
    shutil.copy(shards(broken)[0], broken / "model-00077-of-00077.safetensors")
    opened = open_weights(broken)
    opened.source.close()
    for notes in (opened.notes, verify(broken).notes):
        assert f"{INDEX_NAME} gives a total_size of {total + 7:,} bytes, its tensors have {total:,}: ignored" in notes
        assert f"{INDEX_NAME} does not name model-00077-of-00077.safetensors: not read" in notes


def test_factors_of_8_bit_floats_are_not_left_out(memory_path: Path) -> None:
    tensors = {"l.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "l.weight_scale": torch.full((1,), 3.0)}
    folder = a_folder(memory_path / "fp8", {"model.safetensors": tensors})
    with pytest.raises(ConversionError, match="fp8 with a factor"):
        convert(folder, memory_path / "out", ConvertOptions(to="hf", model="hf", dtype="bfloat16"))
    convert(folder, memory_path / "same", AS_IT_IS)
    assert load_file(memory_path / "same" / "model.safetensors")["l.weight"].dtype == torch.float8_e4m3fn


def test_a_note_says_that_code_is_not_copied(memory_path: Path) -> None:
    code = {"auto_map": {"AutoModel": "modeling_x.X"}}
    folder = a_folder(memory_path / "code", {"model.safetensors": {"a": torch.ones(2)}}, code)
    (folder / "modeling_x.py").write_text("raise SystemExit")
    report = convert(folder, memory_path / "out", AS_IT_IS)
    assert any("auto_map" in note for note in report.notes)
    assert not (memory_path / "out" / "modeling_x.py").exists()
