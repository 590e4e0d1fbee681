"""``verify`` of weights outside a run: everything that can be checked is, and the rest is never reported OK."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from milepost import verify
from milepost.format.dtype import DTYPES, itemsize, numpy_dtype
from milepost.format.huggingface import INDEX_NAME
from milepost.format.nan import count_nan, has_nan

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(memory_path: Path) -> Path:
    """A Hugging Face folder of two files with an index."""
    made = memory_path / "model"
    made.mkdir()
    weight_map = {}
    for number, name in enumerate(NAMES):
        tensors = {f"{number}.a": np.arange(60, dtype="float32").reshape(6, 10), f"{number}.b": np.ones(7, "float16")}
        safetensors.numpy.save_file(tensors, made / name)
        weight_map |= dict.fromkeys(tensors, name)
    (made / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (made / "config.json").write_text('{"model_type": "llama"}')
    return made


def data_nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("level", ["metadata", "sizes", "sample", "full"])
def test_a_good_folder_is_not_called_ok_as_nothing_is_recorded_of_its_values(folder: Path, level: str) -> None:
    report = verify(folder, level)  # type: ignore[arg-type]
    assert (report.problems, report.verdict, report.is_sound) == ((), "not_verified", False)
    assert (report.state, report.num_items) == ("external", 4)
    assert report.unchecked_nbytes == report.nbytes == data_nbytes(folder)
    assert "no digests" in report.notes[0]
    assert report.read_nbytes == (report.nbytes if level == "full" else 0)


def overlap(folder: Path) -> None:
    path = folder / NAMES[0]
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header["0.b"]["data_offsets"] = header["0.a"]["data_offsets"][:1] * 2
    text = json.dumps(header | {"0.b": header["0.b"] | {"data_offsets": [0, 14]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :])


def move_key(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["0.a"] = NAMES[1]
    (folder / INDEX_NAME).write_text(json.dumps(index))


HARMS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a file is missing": (lambda folder: (folder / NAMES[1]).unlink(), NAMES[1], "missing"),
    "a file is cut": (lambda folder: os.truncate(folder / NAMES[1], 200), NAMES[1], "truncated"),
    "a file is longer": (lambda folder: (folder / NAMES[0]).open("ab").write(b"x"), NAMES[0], "outside all tensors"),
    "a header is no JSON": (
        lambda folder: (folder / NAMES[0]).open("r+b").write(b"\x40" + bytes(7) + b"x" * 64),
        NAMES[0],
        "",
    ),
    "tensors overlap": (overlap, NAMES[0], "overlap"),
    "the index is no JSON": (lambda folder: (folder / INDEX_NAME).write_text("{"), INDEX_NAME, "invalid JSON"),
    "the index misplaces a key": (move_key, NAMES[0], f"the index says {NAMES[1]}"),
    "the config is no JSON": (lambda folder: (folder / "config.json").write_text("[]"), "config.json", "JSON object"),
}


@pytest.mark.parametrize("name", HARMS)
def test_what_is_wrong_with_a_folder_is_named(folder: Path, name: str) -> None:
    act, file, message = HARMS[name]
    act(folder)
    report = verify(folder)
    assert report.verdict == "damaged"
    assert [file for problem in report.problems if problem.file == file and message in problem.message]


@pytest.mark.parametrize("large", [False, True])
def test_nan_is_found(folder: Path, large: bool) -> None:
    values = np.ones(6 << 20 if large else 600, ml_dtypes.bfloat16)
    values[[5, len(values) - 1]] = np.nan
    tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    safetensors.torch.save_file({"w": tensor, "ok": torch.ones(3)}, folder / "model.safetensors")
    (problem,) = verify(folder / "model.safetensors").problems
    assert (problem.key, problem.message) == ("w", f"NaN in 2 of {len(values)} values")
    assert problem.byte_range is not None
    assert problem.byte_range[1] - problem.byte_range[0] == 2 * len(values)


@pytest.mark.parametrize("name", [name for name in DTYPES if has_nan(name)])
def test_nan_is_counted_as_numpy_counts_it(name: str) -> None:
    bits = np.random.default_rng(0).integers(0, 256, 4096 * itemsize(name), dtype=np.uint8)
    values = bits.view(numpy_dtype(name))
    expected = np.isnan(values.view("float32") if name == "complex64" else values).sum()
    assert expected > 0
    assert count_nan(memoryview(bits), name) == expected  # type: ignore[arg-type]


def test_one_file_of_several_is_verified_alone(folder: Path) -> None:
    report = verify(folder / NAMES[0])
    assert (report.problems, report.num_items) == ((), 2)


def test_the_hubs_cache_is_verified_through_its_links(folder: Path) -> None:
    snapshot = folder.parent / "models--x" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text("{}")
    (snapshot / INDEX_NAME).unlink()
    assert verify(snapshot).problems == ()


def test_an_adapter_is_called_one(memory_path: Path) -> None:
    safetensors.numpy.save_file({"lora_A": np.ones(3, "float32")}, memory_path / "adapter_model.safetensors")
    (memory_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    report = verify(memory_path)
    assert (report.problems, report.notes[0]) == ((), "an adapter, not a full model")


def test_a_torch_file_is_checked_by_its_crcs(memory_path: Path) -> None:
    path = memory_path / "model.pt"
    torch.save({"w": torch.randn(100, 10), "b": torch.ones(3)}, path)
    report = verify(path)
    assert (report.problems, report.verdict, report.num_items) == ((), "not_verified", 2)
    assert 0 < report.unchecked_nbytes < report.nbytes  # zip headers and padding
    assert report.read_nbytes == report.nbytes
    at = path.read_bytes().index(b"model/data/0")
    with path.open("r+b") as file:
        file.seek(at + 2000)
        byte = file.read(1)[0]
        file.seek(at + 2000)
        file.write(bytes([byte ^ 1]))
    (problem,) = verify(path).problems
    assert "zip entry model/data/0 changed" in problem.message


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /tmp/pwned",)


def test_a_malicious_torch_file_is_damaged(memory_path: Path) -> None:
    torch.save({"w": torch.ones(3), "x": Bomb()}, memory_path / "model.pt")
    (problem,) = verify(memory_path / "model.pt").problems
    assert "system" in problem.message
