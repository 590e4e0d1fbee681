"""Merging weights: every method against plain numpy on complete tensors, sources of all kinds, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
import transformers
from hub_models import KINDS as HUB_KINDS
from safetensors.numpy import load_file, save_file
from tiny_models import KINDS, assert_equal, hf_tensors

import milepost
from milepost.errors import ConfigError, ConversionError, DigestMismatchError
from milepost.format.box import Box
from milepost.interop.convert import convert
from milepost.interop.merging import merged as merged_parts
from milepost.interop.merging.merge import merge
from milepost.interop.merging.options import MergeOptions
from milepost.interop.options import ConvertOptions
from milepost.interop.weights.dequantized import plain_weights
from milepost.interop.weights.open import open_weights
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

Array = npt.NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {"w": (40, 30), "deep": (3, 5, 7), "bias": (17,), "scalar": (), "zero": (6,), "empty": (0, 4)}


def arrays(seed: int, dtype: Any = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made = {key: np.asarray(rng.standard_normal(shape)).astype(dtype) for key, shape in SHAPES.items()}
    made["zero"][...] = 0
    return made


@pytest.fixture
def sources(memory_path: Path) -> Callable[..., list[str]]:
    """Makes steps of a run: ``sources(3)``."""

    def make(count: int, dtype: Any = np.float32) -> list[str]:
        storage = LocalStorage(memory_path)
        for number in range(count):
            save_arrays(storage, f"run/step-{number + 1}", arrays(number, dtype), step=number + 1, now=1e9)
        return [str(memory_path / f"run/step-{number + 1}") for number in range(count)]

    return make


def read(path: Path) -> dict[str, Array]:
    with milepost.open(path) as step:
        return {key: step[key][...] for key in step}


def slerp(parts: Sequence[Array], share: float) -> Array:
    a, b = (part.astype(np.float64) for part in parts)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = (a * b).sum() / norms if norms else 1.0
    if abs(cosine) > 0.9995:
        return (1 - share) * a + share * b
    angle = np.arccos(cosine)
    return np.asarray((np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle))


def ties(base: Array, parts: Sequence[Array], weights: Sequence[float], density: float, scale: float) -> Array:
    if not base.size:
        return base
    kept = []
    for part, weight in zip(parts, weights, strict=True):
        difference = part.astype(np.float64) - base.astype(np.float64)
        size = np.abs(difference).astype(np.float32)
        count = max(1, int(density * size.size))
        least = np.sort(size, axis=None)[-count]
        kept.append(np.where(size >= least, difference, 0) * weight)
    sign = np.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [np.sign(one) == sign for one in kept]
    total = sum(one * yes for one, yes in zip(kept, agree, strict=True))
    share = sum(yes * weight for yes, weight in zip(agree, weights, strict=True))
    return np.asarray(base + scale * np.divide(total, share, out=np.zeros(base.shape), where=np.asarray(share) > 0))


METHODS: dict[str, tuple[MergeOptions, int, Callable[[Sequence[Array]], Any]]] = {
    "mean": (MergeOptions(), 3, lambda p: sum(p) / 3),
    "weighted mean": (MergeOptions(weights=(1, 2, 5)), 3, lambda p: (p[0] + 2 * p[1] + 5 * p[2]) / 8),
    "linear": (MergeOptions(method="linear", weights=(1.5, -0.5)), 2, lambda p: 1.5 * p[0] - 0.5 * p[1]),
    "ema": (MergeOptions(method="ema", decay=0.8), 3, lambda p: 0.8 * (0.8 * p[0] + 0.2 * p[1]) + 0.2 * p[2]),
    "slerp": (MergeOptions(method="slerp"), 2, lambda p: slerp(p, 0.5)),
    "slerp, nearer to one": (MergeOptions(method="slerp", weights=(1, 3)), 2, lambda p: slerp(p, 0.75)),
    "task-arithmetic": (
        MergeOptions(method="task-arithmetic", weights=(0.5, 2), scale=0.5),
        3,
        lambda p: p[0] + 0.25 * (p[1] - p[0]) + (p[2] - p[0]),
    ),
    "ties": (MergeOptions(method="ties"), 4, lambda p: ties(p[0], p[1:], (1, 1, 1), 0.2, 1)),
    "ties, weighted": (
        MergeOptions(method="ties", weights=(1, 3), density=0.55, scale=0.7),
        3,
        lambda p: ties(p[0], p[1:], (1, 3), 0.55, 0.7),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_what_numpy_gives_for_whole_tensors(
    memory_path: Path, sources: Callable[..., list[str]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, count, expected = METHODS[name]
    monkeypatch.setattr(merged_parts, "PART_NUMEL", 64)  # every tensor in several parts
    paths = sources(count)
    if options.method in ("task-arithmetic", "ties"):
        fields = {field: getattr(options, field) for field in ("method", "weights", "density", "scale")}
        options = MergeOptions(base=paths.pop(0), **fields)
    report = merge(paths, memory_path / "out", options)
    assert (report.kind, report.num_tensors, report.verified) == ("dcp", len(SHAPES), True)
    assert report.checked_nbytes == count * sum(array.nbytes for array in arrays(0).values())
    found = read(memory_path / "out")
    for key in SHAPES:
        whole = np.asarray(expected([arrays(number)[key].astype(np.float64) for number in range(count)]))
        assert found[key].dtype == np.float32
        np.testing.assert_array_almost_equal_nulp(found[key], whole.astype(np.float32), nulp=1)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64])
def test_a_mean_is_rounded_once_and_of_equal_models_is_the_model(
    memory_path: Path, sources: Callable[..., list[str]], dtype: Any
) -> None:
    paths = sources(3, dtype)
    merge(paths, memory_path / "out", MergeOptions())
    wide: Any = np.float64 if np.dtype(dtype).itemsize > 2 else np.float32
    total: Any = sum(arrays(number, dtype)["w"].astype(wide) for number in range(3))
    whole = total / wide(3)
    assert np.array_equal(read(memory_path / "out")["w"], np.asarray(whole).astype(dtype))
    report = merge([paths[0]] * 7, memory_path / "same", MergeOptions())  # nothing is wider than float64
    assert any("was given more than once" in note for note in report.notes)
    for key, array in arrays(0, dtype).items():
        found = read(memory_path / "same")[key].astype(np.float64)
        assert np.abs(found - array).max(initial=0) <= (1e-15 if dtype == np.float64 else 0)


def test_hugging_face_folders_make_one_that_transformers_loads(
    memory_path: Path, hf_folders: Callable[[str], Path]
) -> None:
    folder = hf_folders("llama-tied")
    other = memory_path / "other"
    shutil.copytree(folder, other)
    for file in other.glob("*.safetensors"):
        save_file({key: value * 3 for key, value in load_file(file).items()}, file)
    report = merge([folder, other], memory_path / "out", MergeOptions(dtype="bfloat16"))
    assert report.kind == "hf"
    assert sorted(path.name for path in (memory_path / "out").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    assert_equal(hf_tensors(memory_path / "out"), {k: (v * 2).bfloat16() for k, v in hf_tensors(folder).items()})
    model = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sources_of_every_kind_are_merged_under_the_names_of_the_first(
    memory_path: Path, hf_folders: Callable[[str], Path]
) -> None:
    """A checkpoint with our names, Hugging Face files, and a `.pt` file saved by a wrapped module."""
    kind, folder = KINDS["llama"], hf_folders("llama")
    convert(folder, memory_path / "ours", kind.options("dcp"))
    report = merge([memory_path / "ours", folder, memory_path / "ours"], memory_path / "out", MergeOptions())
    assert any("has other names than" in note for note in report.notes)
    assert all(
        np.array_equal(value, read(memory_path / "ours")[key]) for key, value in read(memory_path / "out").items()
    )
    convert(memory_path / "out", memory_path / "back", kind.options("hf"))  # it still records its model
    assert_equal(hf_tensors(memory_path / "back"), hf_tensors(folder))

    state = {f"module.{key}": torch.from_numpy(value.copy()) for key, value in arrays(1).items()}
    torch.save(state, memory_path / "wrapped.pt")
    save_file(arrays(0), memory_path / "plain.safetensors")
    merge([memory_path / "plain.safetensors", memory_path / "wrapped.pt"], memory_path / "out.pt", MergeOptions())
    found = torch.load(memory_path / "out.pt", weights_only=True)
    assert np.array_equal(found["w"].numpy(), (arrays(0)["w"] + arrays(1)["w"]) / 2)


def test_all_faults_of_all_sources_are_one_report(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    good = arrays(0) | {"steps": np.arange(3)}
    made: Mapping[str, dict[str, Array]] = {
        "a": good,
        "b": {key: value for key, value in good.items() if key != "bias"} | {"extra": np.ones(2)},
        "c": good | {"w": good["w"][:7], "steps": np.ones(3)},
    }
    for name, tensors in made.items():
        save_arrays(storage, name, tensors, step=1, now=1e9)
    paths = [memory_path / name for name in made]
    with pytest.raises(ConversionError) as caught:
        merge(paths, memory_path / "out", MergeOptions())
    assert sorted(problem.removeprefix(f"{memory_path}/") for problem in caught.value.problems) == [
        "b: missing: bias",
        "b: unexpected: extra",
        "c: steps: float64 instead of int64",
        "c: w: shape [7, 30] instead of [40, 30]",
    ]
    assert all(problem in caught.value.message for problem in caught.value.problems)
    assert not (memory_path / "out").exists()


def test_options_that_do_not_go_together_are_refused_at_once(memory_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        MergeOptions(method="slerp", weights=(1, 2, 3), decay=2, density=0, base="x").check(3)
    assert len(caught.value.problems) == 6
    for options, count, words in (
        (MergeOptions(), 1, "2 or more sources"),
        (MergeOptions(method="linear"), 2, "needs --weights"),
        (MergeOptions(method="ties"), 2, "needs --base"),
        (MergeOptions(weights=(1, -1)), 2, "must not be 0"),
        (MergeOptions(method="ema", weights=(1, 1)), 2, "follow from --decay"),
        (MergeOptions(weights=(1, float("nan"))), 2, "finite"),
    ):
        with pytest.raises(ConfigError, match=words):
            options.check(count)


def test_what_can_not_be_averaged_is_reported(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    for number, name in enumerate("ab"):
        tensors = {"w": np.full(4, 6e4, np.float16), "steps": np.array([number]), "same": np.arange(3)}
        save_arrays(storage, name, tensors, step=1, now=1e9)
    asked = MergeOptions(method="linear", weights=(1, 1))
    report = merge([memory_path / "a", memory_path / "b"], memory_path / "out", asked)
    assert sorted(note.partition(":")[0] for note in report.notes) == [
        f"differing integers were taken from {memory_path}/a",
        "merged values that are not finite (NaN or infinite)",
        "the weights sum to 2, not to 1",
    ]
    assert read(memory_path / "out")["steps"] == 0
    config = {"architectures": ["X"], "quantization_config": {"quant_method": "gptq"}}
    (memory_path / "hf").mkdir()
    save_file({"w": np.ones(4, np.float32)}, memory_path / "hf" / "model.safetensors")
    (memory_path / "hf" / "config.json").write_text(json.dumps(config))
    save_arrays(storage, "c", {"w": np.ones(4, np.complex64)}, step=1, now=1e9)
    codes = {"w": np.ones((4, 4), np.int8), "w.SCB": np.ones(4, np.float32)}
    save_file(codes, memory_path / "int8.safetensors")  # without a config that records it
    with pytest.raises(ConversionError, match="quantized") as caught:
        merge([memory_path / name for name in ("hf", "c", "int8.safetensors")], memory_path / "x", MergeOptions())
    assert any("dtype complex64" in problem for problem in caught.value.problems)
    assert sum("quantized weights" in problem for problem in caught.value.problems) == 2


def test_a_damaged_source_and_a_damaged_result_leave_nothing(
    memory_path: Path, sources: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sources(2)
    (data,) = Path(paths[1]).glob("*.distcp")
    whole = data.read_bytes()
    place = whole.index(arrays(1)["w"].tobytes())
    data.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DigestMismatchError, match="'w'"):
        merge(paths, memory_path / "out", MergeOptions())
    data.write_bytes(whole)
    true = LocalStorage.open_write

    def torn(self: LocalStorage, name: str, *args: Any, **options: Any) -> Any:
        handle = true(self, name, *args, **options)
        write = handle.write

        def changed(offset: int, buffers: Any) -> None:
            parts = [bytearray(part) for part in buffers]
            if offset > 1000 and len(parts[0]) > 100:
                parts[0][50] ^= 1
            write(offset, [memoryview(part) for part in parts])

        monkeypatch.setattr(handle, "write", changed, raising=False)
        return handle

    monkeypatch.setattr(LocalStorage, "open_write", torn)
    with pytest.raises((ConversionError, DigestMismatchError)):
        merge(paths, memory_path / "out", MergeOptions())
    assert sorted(path.name for path in memory_path.iterdir()) == ["run"]


@pytest.mark.parametrize("method", ["mean", pytest.param("ties", marks=pytest.mark.slow)])
def test_memory_grows_neither_with_the_model_nor_with_the_number_of_sources(memory_path: Path, method: str) -> None:
    """Four sources of 128 MiB together come to far more than the limit; the files are sparse."""
    torch_free = "import sys; from milepost.cli.main import main; status = main(sys.argv[1:]);"
    peak = (  # not ru_maxrss, which begins with what this process had when it forked
        "assert 'torch' not in sys.modules;"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]);"
        "sys.exit(status)"
    )
    shape, paths = (1 << 14, 1 << 11), []
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}}).encode()
    for number in range(4):
        path = memory_path / f"{number}.safetensors"
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 4 * shape[0] * shape[1])
        paths.append(str(path))
    base = ["--base", paths.pop()] if method == "ties" else []
    command = ["merge", *paths, "--to", str(memory_path / "out"), "--method", method, *base]
    done = subprocess.run(
        [sys.executable, "-c", torch_free + peak, *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 400 * 1000  # KB


def test_tied_weights_are_the_same_however_often_a_source_has_them(memory_path: Path) -> None:
    model: Any = HUB_KINDS["qwen2, tied"].model()
    model.save_pretrained(memory_path / "hub")
    torch.save(model.state_dict(), memory_path / "twice.pt")  # with the output projection, which the files leave out
    sources = [memory_path / "hub", memory_path / "twice.pt"]
    merge(sources, memory_path / "out", MergeOptions())
    assert_equal(hf_tensors(memory_path / "out"), hf_tensors(memory_path / "hub"))
    merge(sources[::-1], memory_path / "out.pt", MergeOptions())
    assert_equal(torch.load(memory_path / "out.pt"), dict(model.state_dict()))
    untied = dict(model.state_dict())
    untied["lm_head.weight"] = untied["lm_head.weight"] * 2
    torch.save(untied, memory_path / "untied.pt")
    with pytest.raises(ConversionError, match=r"unexpected: lm_head\.weight"):
        merge([sources[0], memory_path / "untied.pt"], memory_path / "no", MergeOptions())


def test_a_family_that_is_not_trained_here_is_merged_whatever_names_it_has(memory_path: Path) -> None:
    HUB_KINDS["mistral"].model().save_pretrained(memory_path / "hub")  # type: ignore[operator]
    convert(memory_path / "hub", memory_path / "ours", ConvertOptions(to="dcp", model="mistral"))
    report = merge([memory_path / "hub", memory_path / "ours"], memory_path / "out", MergeOptions())
    assert any("has other names than" in note and "both are mistral" in note for note in report.notes)
    assert_equal(hf_tensors(memory_path / "out"), hf_tensors(memory_path / "hub"))
    merge([memory_path / "ours", memory_path / "hub"], memory_path / "averaged", MergeOptions())
    convert(memory_path / "averaged", memory_path / "back", ConvertOptions(to="hf"))  # it still records its model
    assert_equal(hf_tensors(memory_path / "back"), hf_tensors(memory_path / "hub"))


def test_rows_that_belong_together_are_merged_in_narrow_parts(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all rows of MXFP4 weights do, of which one expert has more than is merged at a time."""
    monkeypatch.setattr(merged_parts, "PART_NUMEL", 64)
    monkeypatch.setattr(merged_parts, "MAX_PART_NUMEL", 100)
    rng = np.random.default_rng(1)
    stored = {"w_blocks": rng.integers(0, 256, (2, 6, 2, 16), np.uint8), "w_scales": np.full((2, 6, 2), 127, np.uint8)}
    values = {}
    for number, name in enumerate("ab"):
        stored["w_blocks"] = stored["w_blocks"] ^ number
        save_file(stored, memory_path / f"{name}.safetensors")
        with plain_weights(open_weights(memory_path / f"{name}.safetensors"), "float32").source as source:
            values[name] = np.empty((2, 64, 6), np.float32)
            source.read_into("w", Box.whole((2, 64, 6)), values[name])
    for method, expected in (("mean", (values["a"] + values["b"]) / 2), ("slerp", slerp(list(values.values()), 0.5))):
        sources = [memory_path / "a.safetensors", memory_path / "b.safetensors"]
        merge(sources, memory_path / method, MergeOptions(method=method, dtype="float32"))
        np.testing.assert_allclose(read(memory_path / method)["w"], expected, rtol=1e-6, atol=1e-6)


def test_weights_in_fp8_are_merged_as_what_they_stand_for(memory_path: Path) -> None:
    values = torch.arange(-128.0, 128).reshape(16, 16)
    for name, factor in (("a", 0.5), ("b", 1.5)):
        (memory_path / name).mkdir()
        stored = {"w": values.to(torch.float8_e4m3fn), "w_scale_inv": torch.full((1, 1), factor)}
        safetensors.torch.save_file(stored, memory_path / name / "model.safetensors")
        quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        config = {"architectures": ["X"], "quantization_config": quantized}
        (memory_path / name / "config.json").write_text(json.dumps(config))
    report = merge([memory_path / "a", memory_path / "b"], memory_path / "out", MergeOptions())
    expected = {"w": values.to(torch.float8_e4m3fn).float().to(torch.bfloat16)}
    assert_equal(hf_tensors(memory_path / "out"), expected)
    assert "quantization_config" not in json.loads((memory_path / "out" / "config.json").read_text())
    assert sum("dequantized to bfloat16" in note for note in report.notes) == 2
    with pytest.raises(ConfigError, match=r"ends in \.pt or \.pth"):
        merge([memory_path / "a", memory_path / "b"], memory_path / "out.safetensors", MergeOptions())
