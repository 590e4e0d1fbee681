"""``milepost.open``: stored tensors as numpy arrays, from every source, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import milepost

STATE = {
    "w": torch.arange(60, dtype=torch.float32).reshape(3, 4, 5),
    "half": torch.linspace(-2, 2, 24).reshape(4, 6).to(torch.bfloat16),
    "small": torch.linspace(-2, 2, 8).to(torch.float8_e4m3fn),
    "count": torch.tensor(7),
    "none": torch.empty(0, 3),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    milepost.save(folder / "step-1", STATE)
    dcp.save(dict(STATE), checkpoint_id=folder / "stock", no_dist=True)
    torch.save(STATE, folder / "file.pt")
    save_file(STATE, folder / "file.safetensors")
    return {path.name: path for path in folder.iterdir()}


def expected(key: str) -> np.ndarray:
    tensor = STATE[key]
    kinds = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
    if tensor.dtype in kinds:
        raw = tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16).numpy()
        return raw.view(kinds[tensor.dtype])
    return tensor.numpy()


@pytest.mark.parametrize("name", ["step-1", "stock", "file.pt", "file.safetensors"])
def test_every_source_gives_the_same_arrays(places: dict[str, Path], name: str) -> None:
    with milepost.open(places[name]) as opened:
        assert set(opened) == set(STATE)
        assert len(opened) == len(STATE)
        for key in STATE:
            stored, wanted = opened[key], expected(key)
            assert (stored.shape, stored.dtype, stored.nbytes) == (wanted.shape, wanted.dtype, wanted.nbytes)
            assert np.asarray(stored).tobytes() == wanted.tobytes()
        assert np.array_equal(opened["w"][1, :, -2:], expected("w")[1, :, -2:])
        assert opened["count"][()] == 7
        assert np.array_equal(np.asarray(opened["half"], np.float32), STATE["half"].float().numpy())


BOUND = st.none() | st.integers(-7, 7)
STEP = st.none() | st.sampled_from([1, 2, 3, -1, -2])
PART = st.none() | st.integers(-5, 5) | st.builds(slice, BOUND, BOUND, STEP) | st.just(...)


@settings(deadline=None, max_examples=150)
@given(index=st.lists(PART, max_size=4).map(tuple) | PART)
def test_an_index_selects_what_numpy_selects(places: dict[str, Path], index: object) -> None:
    with milepost.open(places["step-1"]) as opened:
        try:
            wanted = expected("w")[index]  # type: ignore[index]
        except IndexError:
            with pytest.raises(IndexError):
                opened["w"][index]
        else:
            found = opened["w"][index]
            assert np.shape(found) == np.shape(wanted)
            assert np.array_equal(found, wanted)


def test_mistakes_are_answered(places: dict[str, Path], tmp_path: Path) -> None:
    with milepost.open(places["step-1"]) as opened:
        with pytest.raises(KeyError, match="did you mean 'half'"):
            opened["hallf"]
        with pytest.raises(IndexError, match="only integers, slices"):
            opened["w"][[0, 2]]
        for mask in (np.array([True, False, True]), np.array(True), True, opened["w"][...] > 3):
            with pytest.raises(IndexError, match="only integers, slices"):
                opened["w"][mask]
        kept = opened["w"]
        with pytest.raises(TypeError, match="no dims"):
            len(opened["count"])
    with pytest.raises(ValueError, match="was closed"):
        kept[0]
    with pytest.raises(milepost.CheckpointNotFoundError):
        milepost.open(tmp_path / "nothing")


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    milepost.save(tmp_path / "step-1", STATE)
    (file,) = (tmp_path / "step-1").glob("*.distcp")
    data = bytearray(file.read_bytes())
    at = bytes(data).index(STATE["w"].numpy().tobytes())
    data[at + 100] ^= 1
    file.write_bytes(data)
    with milepost.open(tmp_path / "step-1") as opened:
        assert opened["count"][()] == 7
        with pytest.raises(milepost.DigestMismatchError, match="'w'"):
            opened["w"][0]


def test_torch_is_not_imported(places: dict[str, Path]) -> None:
    code = (
        "import sys, milepost\n"
        f"with milepost.open({str(places['step-1'])!r}) as opened:\n"
        "    print(opened['w'][2, 3, 4], 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == ["59.0", "False"]
