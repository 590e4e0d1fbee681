"""``diff``: what differs between two sets of tensors, whatever format each is in."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from zoo import save_model

from milepost.cli.main import main
from milepost.errors import ConfigError, DigestMismatchError
from milepost.interop.convert import convert
from milepost.interop.options import ConvertOptions
from milepost.report.diff import DiffReport, ObjectChange, diff
from milepost.report.differences import ValueChange
from milepost.storage import LocalStorage
from milepost.testing.sample import Array, save_arrays


def compared(folder: Path, a: dict[str, Array], b: dict[str, Array], **options: bool) -> DiffReport:
    storage = LocalStorage(folder)
    save_arrays(storage, "a", a)
    save_arrays(storage, "b", b, num_ranks=2)
    return diff(folder / "a", folder / "b", **options)  # type: ignore[arg-type]


def change(folder: Path, a: Array, b: Array) -> ValueChange | None:
    report = compared(folder, {"w": a}, {"w": b}, values=True)
    assert (report.only_a, report.only_b) == ((), ())
    return report.values[0] if report.values else None


def test_elements_that_differ_are_counted_and_the_largest_is_placed(memory_path: Path) -> None:
    a = np.arange(24, dtype="float32").reshape(4, 6)
    b = a.copy()
    b[1, 2] += 0.5
    b[3, 5] -= 2
    found = change(memory_path, a, b)
    assert found == ValueChange(
        "w", 24, 2, 2.0, pytest.approx(2 / 23), (3, 5),  # type: ignore[arg-type]
        mean_abs=pytest.approx(2.5 / 24),  # type: ignore[arg-type]
        relative_norm=pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a)),  # type: ignore[arg-type]
        cosine=pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)),  # type: ignore[arg-type]
    )  # fmt: skip
    assert found.share_different == 2 / 24


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", ml_dtypes.bfloat16, "complex64", "float64"])
def test_every_dtype_is_compared(memory_path: Path, dtype: str) -> None:
    a = np.zeros(9, dtype)
    b = a.copy()
    b[4] = 1
    found = change(memory_path, a, b)
    assert found is not None
    assert (found.num_different, found.max_abs, found.at) == (1, 1.0, (4,))


def test_equal_tensors_do_not_differ_whatever_is_in_them(memory_path: Path) -> None:
    odd = np.array([math.nan, math.inf, -0.0, 1e-45], "float32")
    assert change(memory_path, odd, odd.copy()) is None


def test_a_nan_on_one_side_is_the_largest_difference(memory_path: Path) -> None:
    a = np.array([1.0, 2.0, 3.0], "float32")
    found = change(memory_path, a, np.array([9.0, math.nan, 3.0], "float32"))
    assert found is not None
    assert found.num_different == 2
    assert math.isnan(found.max_abs)
    assert found.at == (1,)


def test_other_bytes_of_equal_value_count_as_different(memory_path: Path) -> None:
    found = change(memory_path, np.array([0.0, 1.0], "float32"), np.array([-0.0, 1.0], "float32"))
    assert found is not None
    assert (found.num_different, found.max_abs) == (1, 0.0)


def test_infinities_of_the_same_sign_do_not_hide_a_difference(memory_path: Path) -> None:
    a = np.array([math.inf, 1.0], "float32")
    found = change(memory_path, a, np.array([math.inf, 1.25], "float32"))
    assert found is not None
    assert (found.num_different, found.max_abs, found.at) == (1, 0.25, (1,))


def test_a_tensor_larger_than_a_slab_is_compared_to_its_end(memory_path: Path) -> None:
    a = np.zeros((5, 1 << 20), "float32")
    b = a.copy()
    b[4, -1] = 1
    found = change(memory_path, a, b)
    assert found is not None
    assert found.at == (4, (1 << 20) - 1)


def test_scalars_and_empty_tensors(memory_path: Path) -> None:
    a: dict[str, Array] = {"s": np.array(1.0, "float32"), "e": np.zeros((0, 3), "float32")}
    b: dict[str, Array] = {"s": np.array(2.0, "float32"), "e": np.zeros((0, 3), "float32")}
    report = compared(memory_path, a, b, values=True)
    assert [(found.key, found.at) for found in report.values] == [("s", ())]


def test_without_values_the_digests_tell_where_shards_are_the_same(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    a: dict[str, Array] = {"same": np.ones(4, "int32"), "other": np.ones(4, "int32")}
    save_arrays(storage, "a", a, num_ranks=2)
    save_arrays(storage, "b", {**a, "other": np.zeros(4, "int32")}, num_ranks=2)
    report = diff(memory_path / "a", memory_path / "b")
    assert (report.other_bytes, report.num_same, report.num_unknown) == (("other",), 1, 0)
    save_arrays(storage, "c", a, num_ranks=4)  # cut otherwise: the digests are of other boxes
    report = diff(memory_path / "a", memory_path / "c")
    assert (report.is_same, report.num_same, report.num_unknown) == (True, 0, 2)


def test_damage_is_an_error_and_no_difference(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    for name in "ab":
        manifest = save_arrays(storage, name, {"w": np.ones(1000, "float32")})
    offset = manifest.tensors["w"].shards[0].data_offset
    assert offset is not None
    with (memory_path / "b/__0_0.distcp").open("r+b") as file:
        file.seek(offset + 17)
        file.write(b"\xff")
    with pytest.raises(DigestMismatchError, match="'w'"):
        diff(memory_path / "a", memory_path / "b", values=True)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_a_model_is_the_same_in_every_format(memory_path: Path, name: str) -> None:
    """Other names, other order of rows for rotary embeddings, other files: the same model."""
    save_model(LocalStorage(memory_path), "own", name)
    own = memory_path / "own"
    for to in ("hf", "pt"):
        convert(own, memory_path / to, ConvertOptions(to=to, model=name, flavor="debugmodel"))  # type: ignore[arg-type]
        by_meaning = diff(own, memory_path / to, values=True, model=name, flavor="debugmodel")
        assert by_meaning.is_same
        assert by_meaning.num_same > 20
    by_name = diff(own, memory_path / "hf", values=True)
    assert not by_name.is_same
    assert by_name.num_same == 0


def test_model_and_flavor_go_together_where_neither_side_says_what_it_is(memory_path: Path) -> None:
    save_arrays(LocalStorage(memory_path), "a", {"w": np.ones(3, "float32")})
    for given in ({"model": "llama3"}, {"flavor": "8B"}):
        with pytest.raises(ConfigError, match="need each other"):
            diff(memory_path / "a", memory_path / "a", **given)  # type: ignore[arg-type]


def test_figures_of_a_change_are_over_what_is_finite_on_both_sides(memory_path: Path) -> None:
    a = np.array([3.0, math.nan, 4.0, 1.0], "float32")
    b = np.array([3.0, 1.0, 2.0, math.inf], "float32")
    found = change(memory_path, a, b)
    assert found is not None
    assert (found.mean_abs, found.relative_norm) == (1.0, pytest.approx(2 / 5))
    assert found.num_different == 3


def test_only_keys_of_a_glob_are_compared_and_equal_digests_may_be_trusted(memory_path: Path) -> None:
    a = {"x.w": np.zeros(4, "float32"), "y.w": np.zeros(4, "float32"), "y.b": np.zeros(4, "float32")}
    b = {**a, "x.w": np.ones(4, "float32"), "y.b": np.full(4, 2, "float32")}
    storage = LocalStorage(memory_path)
    save_arrays(storage, "a", a)
    save_arrays(storage, "b", b)
    done: list[tuple[int, int]] = []
    report = diff(
        memory_path / "a", memory_path / "b", values=True, trust_digests=True, keys=["y.*"],
        progress=lambda now, total: done.append((now, total)),
    )  # fmt: skip
    assert [change.key for change in report.values] == ["y.b"]
    assert (report.num_same, report.num_unknown) == (1, 0)
    assert done[-1] == (16, 16)  # the bytes of y.b alone


def saved(folder: Path, **tensors: Array) -> None:
    save_arrays(LocalStorage(folder.parent), folder.name, tensors)


def test_nothing_in_common_is_no_success(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(memory_path / "a", x=np.zeros(4, "float32"))
    saved(memory_path / "b", y=np.zeros(4, "float32"))
    assert main(["diff", str(memory_path / "a"), str(memory_path / "b")]) == 3
    assert "nothing was compared" in capsys.readouterr().err


def test_a_tolerance_decides_the_exit_status(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(memory_path / "a", x=np.zeros(4, "float32"), y=np.zeros(4, "float32"))
    saved(memory_path / "b", x=np.full(4, 1e-3, "float32"), y=np.full(4, 1.0, "float32"))
    paths = [str(memory_path / "a"), str(memory_path / "b")]
    assert main(["diff", *paths, "--tolerance", "0.01"]) == 9
    assert "1 of 2 common keys, 1 of them within the tolerance" in capsys.readouterr().out
    assert main(["diff", *paths, "--tolerance", "0.01", "--keys", "x"]) == 0


def test_what_changed_most_comes_first_and_the_rest_is_summed_up(
    memory_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f"layers.{i}.w": np.ones(4, "float32") for i in range(30)}
    saved(memory_path / "a", **before)
    saved(memory_path / "b", **{key: array * (2 + i) for i, (key, array) in enumerate(before.items())})
    paths = [str(memory_path / "a"), str(memory_path / "b")]
    assert main(["diff", *paths]) == 9
    out = capsys.readouterr().out
    assert out.index("layers.29.w") < out.index("layers.28.w") < out.index("layers.10.w")
    assert "... and 10 more that changed by 100.000% to 1000.000%; --all shows them" in out
    assert "layers.3.w" not in out
    assert main(["diff", *paths, "--all"]) == 9
    assert "layers.3.w" in capsys.readouterr().out


def test_large_integers_that_differ_by_one_are_not_within_a_smaller_tolerance(memory_path: Path) -> None:
    """Beyond 2^53 float64 takes them for the same."""
    for dtype in ("int64", "uint64"):
        a = np.array([2**62, 7, 2**61], dtype)
        report = compared(memory_path / dtype, {"w": a}, {"w": a + np.array([1, 0, 0], dtype)}, values=True)
        (found,) = report.values
        assert (found.max_abs, found.mean_abs, found.at) == (1.0, 1 / 3, (0,))
        assert not report.within(0.5).is_same
        assert report.within(1).is_same
    ends = np.array([-(2**63), 2**63 - 1])
    found = change(memory_path, ends, ends[::-1].copy())
    assert found is not None
    assert found.max_abs == float(2**64 - 1)


def test_a_change_of_what_was_zero_is_infinite_and_one_without_finite_elements_has_no_norm(memory_path: Path) -> None:
    found = change(memory_path, np.array([0.0, 1.0], "float32"), np.array([1.0, 1.0], "float32"))
    assert found is not None
    assert found.max_rel == math.inf
    found = change(memory_path, np.array(1.0, "float32"), np.array(math.nan, "float32"))
    assert found is not None
    assert math.isnan(found.relative_norm)  # it was 0: "nothing has changed"


def test_what_became_infinite_comes_before_what_is_finite(memory_path: Path) -> None:
    a: dict[str, Array] = {name: np.ones(3, "float32") for name in ("a", "b", "c")}
    b = {"a": a["a"] * 9, "b": np.array([1, 1, math.inf], "float32"), "c": np.array([1, math.nan, 1], "float32")}
    report = compared(memory_path, a, b, values=True)
    assert [found.key for found in report.by_change()] == ["c", "b", "a"]


@pytest.mark.parametrize("kind", ["dcp", "pt"])
def test_values_that_are_not_tensors_are_compared_in_every_form(
    memory_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Stock DCP's metadata has no digests of them: they are read. They were passed over, with status 0."""
    paths = []
    for step in (5, 6):
        state = {"model": {"w": torch.ones(4)}, "step": step, "nan": math.nan, "names": ["a", "b"]}
        paths.append(memory_path / f"{step}.{kind}")
        if kind == "pt":
            torch.save(state, paths[-1])
        else:
            dcp.save(state, checkpoint_id=paths[-1], no_dist=True)
    report = diff(*paths, values=True)
    assert report.objects == (ObjectChange("step", "5", "6"),)
    assert (report.is_same, report.num_unknown) == (False, 0)
    assert report.num_same == report.num_common - 1
    assert main(["diff", *map(str, paths)]) == 9
    assert "step: 5 in A, 6 in B" in capsys.readouterr().out
    assert diff(paths[0], paths[0], values=True).is_same


def test_values_that_can_not_be_compared_are_no_success(memory_path: Path) -> None:
    paths = [memory_path / "a.pt", memory_path / "b.pt"]
    for path, size in zip(paths, (1, 2), strict=True):
        torch.save({"w": torch.ones(2), "seen": set(range(size))}, path)
    assert main(["diff", *map(str, paths)]) == 11


def test_two_long_texts_are_shown_where_they_differ(memory_path: Path) -> None:
    for name, text in (("a.pt", "x" * 500 + "old"), ("b.pt", "x" * 500 + "new")):
        torch.save({"w": torch.ones(2), "log": text}, memory_path / name)
    (found,) = diff(memory_path / "a.pt", memory_path / "b.pt", values=True).objects
    assert (found.a[-4:], found.b[-4:]) == ("old'", "new'")
    assert len(found.a) < 120


def test_mistakes_of_keys_and_tolerance_are_named(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_arrays(LocalStorage(memory_path), "a", {"w[0]": np.ones(2, "float32"), "w0": np.ones(2, "float32")})
    path = str(memory_path / "a")
    assert main(["diff", path, path, "--keys", "v*"]) == 3
    assert "has no key that matches 'v*'" in capsys.readouterr().err
    assert diff(path, path, keys=["w[0]"]).num_common == 1  # a key that looks like a pattern
    for number in ("nan", "-1", "x"):
        with pytest.raises(SystemExit, match="2"):
            main(["diff", path, path, "--tolerance", number])
