"""What is found at a path, and that damage in it is noticed."""

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

from milepost.errors import CheckpointNotFoundError, ConversionError, DigestMismatchError, FormatError
from milepost.format.box import Box
from milepost.format.huggingface import INDEX_NAME
from milepost.interop.weights.open import open_weights
from milepost.saving.save import save

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
    with pytest.raises(CheckpointNotFoundError, match="snapshots"):
        open_weights(tmp_path / "models--x")


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
    assert "(model.absent.weight): in the index, but not in any file" in caught.value.message
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
    torch.save({"w": torch.ones(3, 4).t()}, tmp_path / "model.pt")
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
