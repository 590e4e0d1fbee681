"""Statistics of stored tensors agree with numpy's, to the digits that are printed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from milepost.cli.main import main
from milepost.cli.show_cmd import MAX_NUMEL
from milepost.format.safetensors import plan_layout
from milepost.interop.weights.open import open_all
from milepost.report.statistics import TensorStatistics, tensor_statistics
from milepost.storage import LocalStorage
from milepost.testing.sample import Array, save_arrays

RNG = np.random.default_rng(7)


def measured(folder: Path, array: Array) -> TensorStatistics:
    save_arrays(LocalStorage(folder), "a", {"w": array}, num_ranks=2)
    with open_all(str(folder / "a")) as source:
        (found,) = tensor_statistics(source, ["w"])
        source.check_digests()
    return found


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "float64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, "int8",
     "int64", "uint8", "bool", "complex64", "complex128"],
)  # fmt: skip
def test_statistics_are_those_of_numpy(memory_path: Path, dtype: str) -> None:
    values = RNG.standard_normal((130, 70)) * 3
    array = (values + 1j * values[::-1]).astype(dtype) if np.dtype(dtype).kind == "c" else values.astype(dtype)
    found = measured(memory_path, array)
    wide = np.abs(array.astype("complex128")) if array.dtype.kind == "c" else array.astype("float64")
    expected = (wide.min(), wide.max(), wide.mean(), wide.std(), np.sqrt((wide * wide).sum()))
    shown = (found.minimum, found.maximum, found.mean, found.std, found.norm)
    assert [f"{v:.6g}" for v in shown] == [f"{v:.6g}" for v in expected]
    assert found.num_elements == array.size
    assert found.num_zeros == int((wide == 0).sum())


def test_what_is_not_finite_is_counted_and_left_out_of_the_rest(memory_path: Path) -> None:
    array = np.array([[1, math.nan, 3], [math.inf, -math.inf, -0.0]], "float32")
    found = measured(memory_path, array)
    assert (found.num_nan, found.num_inf, found.num_zeros, found.num_finite) == (1, 2, 1, 3)
    assert (found.minimum, found.maximum, found.norm) == (0.0, 3.0, pytest.approx(math.sqrt(10)))
    assert found.flags() == ("1 NaN", "2 Inf")


def test_rows_of_zeros_are_found_wherever_the_tensor_is_cut(memory_path: Path) -> None:
    array = np.ones((4, 3 << 20), "float32")  # a row is longer than what is read at a time
    array[1] = -0.0
    array[3, :-1] = 0
    assert measured(memory_path, array).num_dead_rows == 1


def test_saturated_values_are_counted(memory_path: Path) -> None:
    array = np.array([448, -448, 1, 0], "float32").astype(ml_dtypes.float8_e4m3fn)
    assert measured(memory_path, array).num_saturated == 2


@pytest.mark.slow
def test_a_sparse_tensor_of_4_gb_is_counted_to_its_end(tmp_path: Path) -> None:
    numel = 1 << 30
    layout = plan_layout({"w": ("float32", (1 << 10, 1 << 20))})
    file = tmp_path / "sparse.safetensors"
    file.write_bytes(layout.prefix)
    tail = np.array([3, -4, 0.5, np.nan], "float32")
    with file.open("r+b") as handle:
        handle.truncate(layout.nbytes)
        handle.seek(layout.nbytes - tail.nbytes)
        handle.write(tail.tobytes())
    with open_all(str(file)) as source:
        (found,) = tensor_statistics(source, ["w"])
    finite = tail[:3].astype("float64")
    mean, norm = finite.sum() / (numel - 1), math.sqrt((finite * finite).sum())
    std = math.sqrt(norm * norm / (numel - 1) - mean * mean)
    assert (found.num_elements, found.num_nan, found.num_zeros) == (numel, 1, numel - 4)
    assert (found.minimum, found.maximum) == (-4, 3)
    assert [f"{v:.6g}" for v in (found.mean, found.std, found.norm)] == [f"{v:.6g}" for v in (mean, std, norm)]
    assert found.num_dead_rows == (1 << 10) - 1


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,)])
def test_tensors_of_no_or_one_element(memory_path: Path, shape: tuple[int, ...]) -> None:
    found = measured(memory_path, np.full(shape, 2.0, "float32"))
    assert found.num_elements == math.prod(shape)
    assert math.isnan(found.mean) if not found.num_elements else found.mean == 2.0


def test_far_from_zero_the_deviation_keeps_its_digits(memory_path: Path) -> None:
    array = (1e6 + RNG.standard_normal(1 << 20)).astype("float64")
    assert f"{measured(memory_path, array).std:.6g}" == f"{array.std():.6g}"


def test_stats_prints_the_keys_that_match(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_arrays(LocalStorage(memory_path), "a", {f"layers.{i}.w": np.full(4, i, "float32") for i in (10, 2)})
    assert main(["stats", str(memory_path / "a"), "layers.*", "--json"]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert [(t["key"], t["mean"], t["std"]) for t in tensors] == [("layers.2.w", 2.0, 0.0), ("layers.10.w", 10.0, 0.0)]
    assert main(["stats", str(memory_path / "a"), "layers.3.w"]) == 3
    assert "near it: layers.2.w" in capsys.readouterr().err


def test_stats_finds_a_changed_byte(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_arrays(LocalStorage(memory_path), "a", {"w": np.arange(5000, dtype="float32")})
    path = memory_path / "a" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[9000] ^= 1
    path.write_bytes(data)
    assert main(["stats", str(memory_path / "a")]) == 5
    assert "w" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", np.arange(12).reshape(3, 4)), ("1", [4, 5, 6, 7]), ("0:2, -1", [3, 7]), (":, 1:3", [[1, 2], [5, 6], [9, 10]]),
     ("5:", np.zeros((0, 4))), ("-1,-1", 11)],
)  # fmt: skip
def test_show_prints_what_numpy_would(
    memory_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: Array
) -> None:
    save_arrays(LocalStorage(memory_path), "a", {"w": np.arange(12, dtype="int64").reshape(3, 4)}, num_ranks=2)
    options = [text] if text and not text.startswith("-") else ["--", text] if text else []
    assert main(["show", "--json", str(memory_path / "a"), "w", *options]) == 0
    assert np.array_equal(json.loads(capsys.readouterr().out)["w"], np.asarray(expected).tolist())


@pytest.mark.parametrize("text", ["3,0", "a", "0:1:2:3", "0:1:0", "1,2,3", "0:2;1"])
def test_a_slice_that_is_none_is_refused_by_name(
    memory_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    save_arrays(LocalStorage(memory_path), "a", {"w": np.zeros((3, 4), "float32")})
    assert main(["show", str(memory_path / "a"), "w", text]) == 2
    assert f"slice '{text}'" in capsys.readouterr().err


def test_the_ends_of_large_integers_are_exact(memory_path: Path) -> None:
    array = np.array([2**62 + 1, -(2**62) - 1, 0])
    save_arrays(LocalStorage(memory_path), "a", {"w": array})
    with open_all(memory_path / "a") as source:
        (found,) = tensor_statistics(source, ["w"])
    assert (found.minimum, found.maximum) == (int(array.min()), int(array.max()))


@pytest.mark.parametrize(
    "text", ["0", "-1", "1:3", "-2:", "::2", "::-1", "3:0:-2", "..., 1", "1, ...", "0:2,", "[0:1, -1:]", "1:1", "5:9"]
)
def test_show_takes_slices_as_numpy_does(memory_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    array = np.arange(24, dtype="int32").reshape(4, 6)
    save_arrays(LocalStorage(memory_path), "a", {"w": array})
    assert main(["show", str(memory_path / "a"), "w", text, "--json"]) == 0
    expected = eval(f"array[{text.strip('[]')}]")  # of the texts above
    assert json.loads(capsys.readouterr().out)["w"] == expected.tolist()


def test_show_names_keys_without_what_steers_a_terminal(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a\x1b[31m\nb", "a", "a[0]"]
    save_arrays(LocalStorage(memory_path), "a", {name: np.ones(1, "int8") for name in names})
    assert main(["show", str(memory_path / "a"), "a*"]) == 0
    assert "\x1b" not in (out := capsys.readouterr().out)
    assert "a\\x1b[31m\\nb:" in out
    assert main(["show", str(memory_path / "a"), "a[0]"]) == 0


def test_show_reads_no_more_than_can_be_shown(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All keys of a glob together: `show STEP '*'` read a whole step into memory."""
    size = MAX_NUMEL // 2 + 1
    save_arrays(LocalStorage(memory_path), "a", {name: np.zeros(size, "int8") for name in "ab"})
    assert main(["show", str(memory_path / "a"), "*"]) == 2
    assert "name a slice" in capsys.readouterr().err
    assert main(["show", str(memory_path / "a"), "*", "-1:"]) == 0
