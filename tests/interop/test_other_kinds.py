"""Harmless files that are something else: each gets its name, and is not called damaged."""

from __future__ import annotations

import argparse
import collections
import gzip
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from milepost.cli.main import main
from milepost.errors import ConversionError, FormatError
from milepost.interop.weights.open import open_weights
from milepost.verification.verify import verify

ARRAYS = {"w": np.arange(12, dtype=np.float32)}


def torch_bytes(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def scripted() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), stream)
    return stream.getvalue()


def arrays(save: Callable[..., None]) -> bytes:
    stream = io.BytesIO()
    save(stream, ARRAYS["w"])
    return stream.getvalue()


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.5, 1, torch.qint8)


def narrow(dtype: str, nbytes: int) -> bytes:
    header = json.dumps({"w": {"dtype": dtype, "shape": [4, 3], "data_offsets": [0, nbytes]}}).encode()
    return struct.pack("<Q", len(header)) + header


KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "legacy.pt": (
        lambda: torch_bytes({"w": torch.ones(2)}, _use_new_zipfile_serialization=False),
        "before version 1.6",
    ),
    "pointer.safetensors": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs"),
    "pointer.bin": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs"),
    "page.safetensors": (lambda: b"\n<!DOCTYPE html><html>login</html>", "web page"),
    "error.pt": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "model.pt": (lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "GGUF"),
    "keras.pt": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "array.pt": (lambda: arrays(np.save), "numpy array"),
    "arrays.pt": (lambda: arrays(np.savez), "numpy arrays"),
    "exported.pt": (lambda: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(100), "ONNX"),
    "packed.pt": (lambda: gzip.compress(b"x" * 100), "gzip"),
    "script.pt": (scripted, "TorchScript"),
    "module.pt": (lambda: torch_bytes(torch.nn.Linear(2, 2)), r"a module, not its weights.*state_dict\(\)"),
    "quantised.pt": (lambda: torch_bytes({"w": quantised()}), "quantised"),
    "sparse.pt": (lambda: torch_bytes({"w": torch.eye(3).to_sparse()}), "sparse"),
    "narrow.safetensors": (
        lambda: narrow("F4", 6) + bytes(6),
        r"'w' as F4: floats of 4 and 6 bits are not supported",
    ),
    "named.pt": (lambda: safetensors.numpy.save(ARRAYS), "safetensors file"),
    "named.safetensors": (lambda: torch_bytes({"w": torch.ones(2)}), "torch.save or zip"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_something_else_gets_its_name(
    memory_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, match = KINDS[name]
    (memory_path / name).write_bytes(make())
    with pytest.raises(ConversionError, match=match):
        open_weights(memory_path / name)
    for command in ("verify", "inspect"):
        assert main([command, str(memory_path / name)]) == 8
        assert "damaged" not in capsys.readouterr().err


def test_a_pointer_in_a_folder_of_hugging_face_gets_its_name(memory_path: Path) -> None:
    (memory_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for act in (open_weights, verify):
        with pytest.raises(ConversionError, match="git lfs pull"):
            act(memory_path)


def test_a_link_into_the_cache_is_known_by_the_name_of_the_link(memory_path: Path) -> None:
    (memory_path / "0123abcd").write_bytes(safetensors.numpy.save(ARRAYS))
    (memory_path / "model.safetensors").symlink_to("0123abcd")
    with open_weights(memory_path / "model.safetensors").source as source:
        assert source.tensors.keys() == {"w"}
    assert verify(memory_path / "model.safetensors").problems == ()


def test_values_beside_good_tensors_are_left_out_with_a_note(memory_path: Path) -> None:
    state = {
        "w": torch.ones(2),
        "steps": 3,
        "names": {"a", "b"},
        "lr": np.float64(0.5),
        "counts": np.arange(3),
        "args": argparse.Namespace(lr=1, sizes=[1, 2]),
        "more": collections.defaultdict(list, b=torch.zeros(3)),
        "history": collections.deque([1, 2]),
    }
    torch.save(state, memory_path / "m.pt")
    opened = open_weights(memory_path / "m.pt")
    with opened.source as source:
        assert source.tensors.keys() == {"w", "more.b"}
    (note,) = opened.notes
    assert note == (
        "values that are not tensors were skipped: names (set), lr (scalar), counts (_reconstruct), args (Namespace), "
        "history (deque)"
    )
    report = verify(memory_path / "m.pt")
    assert report.problems == ()
    assert any("names (set)" in line for line in report.notes)


@pytest.mark.parametrize(
    "hides", [lambda t: argparse.Namespace(w=t), lambda t: collections.deque([{"a": [t]}]), lambda t: {1: {(1, 2): t}}]
)
def test_a_tensor_is_never_left_out(memory_path: Path, hides: Callable[[torch.Tensor], Any]) -> None:
    torch.save({"x": hides(torch.ones(2)), "y": torch.ones(1)}, memory_path / "m.pt")
    with pytest.raises(FormatError):
        open_weights(memory_path / "m.pt")


def test_views_that_come_to_far_more_than_the_file_are_refused(memory_path: Path) -> None:
    storage = torch.zeros(1 << 16)
    torch.save({str(number): storage[: 1 << 15] for number in range(1000)}, memory_path / "m.pt")
    with pytest.raises(FormatError, match="64 times the file"):
        open_weights(memory_path / "m.pt")
    torch.save({str(number): storage[: 1 << 15] for number in range(20)}, memory_path / "tied.pt")
    with open_weights(memory_path / "tied.pt").source as source:
        assert len(source.tensors) == 20
