"""Conversions end to end: the same bytes after a round trip, and no output if there is an error."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import safetensors.torch
import torch
from tiny_models import KINDS, assert_equal, hf_tensors

import milepost
from milepost.errors import ConfigError, ConversionError, MilepostError, StorageError
from milepost.format.box import Slab
from milepost.format.huggingface import CONFIG_NAME, INDEX_NAME
from milepost.format.safetensors import plan_layout
from milepost.interop.convert import convert
from milepost.interop.hf.config import make_config
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import model_args
from milepost.interop.names.rules import correspond
from milepost.interop.options import NAMES, ConvertOptions
from milepost.interop.sinks import DcpSink
from milepost.interop.weights.boxes import Array, Bytes
from milepost.interop.weights.stream import SlabReader
from milepost.run import checkpoint_record
from milepost.saving.save import save
from milepost.storage import LocalStorage, syscalls

KIND = KINDS["llama"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("via", ["dcp", "pt"])
def test_hf_and_back_gives_the_same_bytes(memory_path: Path, hf_folders: Callable[[str], Path], kind: str, via: str):
    source, model = hf_folders(kind), KINDS[kind]
    middle, back = memory_path / f"middle.{via}", memory_path / "back"
    there = convert(source, middle, model.options(via, verify=True))  # type: ignore[arg-type]
    convert(middle, back, model.options("hf", verify=True, hf_assets=source))
    assert there.verified
    assert there.source_names == "hf"
    assert_equal(hf_tensors(source), hf_tensors(back))
    same_split = json.loads((source / INDEX_NAME).read_text())["weight_map"]
    assert json.loads((back / INDEX_NAME).read_text())["weight_map"] == same_split
    assert json.loads((back / CONFIG_NAME).read_text()) == json.loads((source / CONFIG_NAME).read_text())
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("names", NAMES)
def test_a_checkpoint_in_any_names_and_back_gives_the_same_bytes(
    memory_path: Path, hf_folders: Callable[[str], Path], kind: str, names: str
):
    source, model = hf_folders(kind), KINDS[kind]
    convert(source, memory_path / "one", model.options("dcp", names=names))
    report = convert(memory_path / "one", memory_path / "back", model.options("hf"))
    assert report.source_names in (names, "milepost")
    assert report.checked_nbytes >= report.written_nbytes, "every byte that was read was compared with its digest"
    assert_equal(hf_tensors(source), hf_tensors(memory_path / "back"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_change_of_dtype_rounds_as_torch_does(memory_path: Path, hf_folders: Callable[[str], Path], dtype: str):
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 70000.0, 65519.9, 1.00390625, -3.3895e38])
    source = Path(shutil.copytree(hf_folders("llama"), memory_path / "source"))
    file = next(source.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    first = next(tensor for key, tensor in tensors.items() if "norm" not in key)
    first.view(-1)[: len(special)] = special
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    report = convert(source, memory_path / "out", KIND.options("hf", dtype=dtype, hf_assets=source, verify=True))
    assert any("infinite values, since float16 ends" in note for note in report.notes) == (dtype == "float16")
    wanted = {key: tensor.to(getattr(torch, dtype)) for key, tensor in hf_tensors(source).items()}
    found = hf_tensors(memory_path / "out")
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        # Which bits of a NaN come out is not torch's promise either.
        assert torch.equal(found[key].isnan(), tensor.isnan()), key
        assert torch.equal(found[key].nan_to_num(0, 1, -1), tensor.nan_to_num(0, 1, -1)), key
    assert json.loads((memory_path / "out" / CONFIG_NAME).read_text())["dtype"] == dtype


def test_the_model_of_a_sharded_training_checkpoint_is_converted(memory_path: Path, hf_folders: Callable[[str], Path]):
    source = hf_folders("llama")
    convert(source, memory_path / "model.pt", KIND.options("pt"))
    weights = torch.load(memory_path / "model.pt", weights_only=True)
    save(memory_path / "step-7", {**weights, "optimizer": {"step": torch.ones(4)}, "train_state": {"step": 7}})
    report = convert(memory_path / "step-7", memory_path / "back", KIND.options("hf", verify=True))
    assert report.num_tensors == len(hf_tensors(source))
    assert_equal(hf_tensors(source), hf_tensors(memory_path / "back"))


def test_a_state_dict_below_a_prefix_in_a_pt_file_is_found(memory_path: Path, hf_folders: Callable[[str], Path]):
    convert(hf_folders("llama"), memory_path / "plain.pt", KIND.options("pt"))
    weights = torch.load(memory_path / "plain.pt", weights_only=True)
    torch.save({"model": weights, "step": 3}, memory_path / "nested.pt")
    convert(memory_path / "nested.pt", memory_path / "back", KIND.options("hf"))
    assert_equal(hf_tensors(hf_folders("llama")), hf_tensors(memory_path / "back"))


@pytest.mark.parametrize(
    ("entry", "other"), [("model", "optimizer"), ("state_dict", "optimizer_states"), ("model", "")]
)
def test_of_a_training_checkpoint_in_a_torch_file_the_model_is_taken(memory_path: Path, entry: str, other: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    beside = {other: optimizer.state_dict(), "rng_state": torch.get_rng_state(), "epoch": 3} if other else {}
    torch.save({entry: model.state_dict(), **beside}, memory_path / "train.pt")
    report = convert(memory_path / "train.pt", memory_path / "out.pt", ConvertOptions(to="pt", model="hf", verify=True))
    found = torch.load(memory_path / "out.pt")
    assert {key.removeprefix("model.") for key in found} == set(model.state_dict())
    assert any(f"not the model's: {other}, rng_state" in note for note in report.notes) == bool(other)
    with milepost.open(memory_path / "train.pt") as opened:
        assert len(opened) == 4 + (13 if other else 0), "it may be looked at as a whole"


def test_experts_stacked_by_transformers_5_are_read(memory_path: Path, hf_folders: Callable[[str], Path]):
    source, model = hf_folders("qwen3-moe"), KINDS["qwen3-moe"]
    tensors = hf_tensors(source)
    stacked = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    for layer in range(model.args.n_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{e}.{name}_proj.weight"] for e in range(4)])
            for name in ("gate", "up", "down")
        )
        stacked[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        stacked[f"{prefix}.down_proj"] = down
    folder = memory_path / "stacked"
    folder.mkdir()
    safetensors.torch.save_file(stacked, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / CONFIG_NAME, folder)
    report = convert(folder, memory_path / "back", model.options("hf", verify=True))
    assert report.source_names == "hf-stacked"
    assert_equal(tensors, hf_tensors(memory_path / "back"))


def test_a_vocabulary_of_another_size_is_taken_from_the_weights_and_said(
    memory_path: Path, hf_folders: Callable[[str], Path]
):
    grown = replace(KIND.args, vocab_size=1000)
    report = convert(hf_folders("llama"), memory_path / "out", ConvertOptions(to="dcp", model="llama3", sizes=grown))
    assert report.notes == ("the vocabulary has 128 entries; the published model's has 1000",)


def test_files_are_split_by_size_when_no_index_says_otherwise(memory_path: Path, hf_folders: Callable[[str], Path]):
    source = hf_folders("llama")
    convert(source, memory_path / "one", KIND.options("hf"))
    assert [file.name for file in (memory_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert not (memory_path / "one" / INDEX_NAME).exists()
    convert(source, memory_path / "many", KIND.options("hf", max_shard_nbytes=100_000, hf_assets=source))
    files = sorted((memory_path / "many").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 100_000 + 10_000 for file in files)
    assert_equal(hf_tensors(source), hf_tensors(memory_path / "many"))


def test_a_converted_checkpoint_says_which_model_it_is(memory_path: Path, hf_folders: Callable[[str], Path]):
    convert(_debug_model(memory_path / "hf"), memory_path / "step-3", _debug_options("dcp"))
    info = checkpoint_record.read_manifest(LocalStorage(memory_path), "step-3")
    assert (info.step, info.kind) == (3, "model")
    convert(memory_path / "step-3", memory_path / "back", ConvertOptions(to="hf"))
    assert_equal(hf_tensors(memory_path / "hf"), hf_tensors(memory_path / "back"))
    convert(hf_folders("llama"), memory_path / "model.pt", KIND.options("pt"))
    with pytest.raises(ConfigError, match="give --model and --flavor"):
        convert(memory_path / "model.pt", memory_path / "x", ConvertOptions(to="hf"))


def _debug_options(to: str) -> ConvertOptions:
    return ConvertOptions(to=to, model="llama3", flavor="debugmodel")  # type: ignore[arg-type]


def _debug_model(folder: Path) -> Path:
    """A Hugging Face folder of the flavor ``debugmodel``, in bfloat16."""
    args = model_args("llama3", "debugmodel")
    family = family_of("llama3", args)
    folder.mkdir()
    tensors = {
        key: torch.randn(shape).bfloat16()
        for key, shape in correspond(family, family.scheme("hf"), args).theirs.items()
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(make_config("llama3", args, "bfloat16")))
    return folder


# ---- what must not be written ----


def untouched(folder: Path, before: set[str]) -> bool:
    return {entry.name for entry in folder.iterdir()} == before


def test_a_wrong_flavor_is_detected_from_the_config_only(memory_path: Path, hf_folders: Callable[[str], Path]):
    with pytest.raises(ConversionError, match="hidden_size is 64, the flavor's is 4096") as caught:
        convert(hf_folders("llama"), memory_path / "out", ConvertOptions(to="dcp", model="llama3", flavor="8B"))
    assert len(caught.value.problems) > 3
    assert untouched(memory_path, set())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "model_type"),
        ({"vocab_size": 200}, "vocab_size 200"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantiz"),
    ],
)
def test_a_config_that_does_not_match_is_refused(
    memory_path: Path, hf_folders: Callable[[str], Path], changes: dict[str, object], said: str
):
    source = Path(shutil.copytree(hf_folders("llama"), memory_path / "source"))
    config = json.loads((source / CONFIG_NAME).read_text()) | changes
    (source / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=said):
        convert(source, memory_path / "out", KIND.options("dcp"))
    assert untouched(memory_path, {"source"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, "rope_theta"),
        ({"rms_norm_eps": 1e-6}, "norm_eps"),
    ],
)
def test_what_the_weights_do_not_depend_on_is_taken_from_the_config_and_noted(
    memory_path: Path, hf_folders: Callable[[str], Path], changes: dict[str, object], said: str
):
    source = Path(shutil.copytree(hf_folders("llama"), memory_path / "source"))
    config = json.loads((source / CONFIG_NAME).read_text()) | changes
    (source / CONFIG_NAME).write_text(json.dumps(config))
    report = convert(source, memory_path / "out", KIND.options("dcp"))
    assert any(said in note for note in report.notes), report.notes


def test_keys_that_do_not_fit_are_all_listed(memory_path: Path, hf_folders: Callable[[str], Path]):
    source = memory_path / "source"
    source.mkdir()
    tensors = hf_tensors(hf_folders("llama"))
    tensors["model.norm.wieght"] = tensors.pop("model.norm.weight")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :60].contiguous()
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert(source, memory_path / "out", KIND.options("dcp"))
    message = caught.value.message
    assert "missing: model.norm.weight (found model.norm.wieght)" in message
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "lm_head.weight has shape [128, 60]" in message
    assert untouched(memory_path, {"source"})


def test_an_output_that_is_not_the_embedding_is_not_silently_dropped(
    memory_path: Path, hf_folders: Callable[[str], Path]
):
    source = memory_path / "source"
    source.mkdir()
    tensors = hf_tensors(hf_folders("llama-tied"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    convert(source, memory_path / "same", KINDS["llama-tied"].options("dcp"))
    tensors["lm_head.weight"][100, 3] += 1
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    with pytest.raises(ConversionError, match="differs from model"):
        convert(source, memory_path / "out", KINDS["llama-tied"].options("dcp"))
    assert untouched(memory_path, {"source", "same"})


def test_what_is_there_is_never_overwritten(memory_path: Path, hf_folders: Callable[[str], Path]):
    (memory_path / "full").mkdir()
    (memory_path / "full" / "mine").touch()
    (memory_path / "model.pt").write_text("mine")
    for to, name in (("dcp", "full"), ("hf", "full"), ("pt", "model.pt")):
        with pytest.raises(ConversionError, match="already exists"):
            convert(hf_folders("llama"), memory_path / name, KIND.options(to))  # type: ignore[arg-type]
    assert (memory_path / "model.pt").read_text() == "mine"
    (memory_path / "runs/a").mkdir(parents=True)
    for to, name in (("dcp", "model"), ("hf", "model"), ("pt", "model.pt")):
        with pytest.raises(ConversionError) as caught:
            convert(hf_folders("llama"), memory_path / "runs", KIND.options(to))  # type: ignore[arg-type]
        assert "remove" not in str(caught.value)
        assert f"give another destination, such as {memory_path}/runs/{name}" in str(caught.value)
        with pytest.raises(ConversionError, match=f"is the root of a .*: give a name in it, such as /{name}"):
            convert(hf_folders("llama"), "/", KIND.options(to))  # type: ignore[arg-type]
    (memory_path / "empty").mkdir()
    convert(hf_folders("llama"), memory_path / "empty", KIND.options("hf"))
    assert (memory_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize("to", ["dcp", "hf", "pt"])
def test_a_destination_inside_a_checkpoint_is_refused(
    memory_path: Path, hf_folders: Callable[[str], Path], to: Literal["dcp", "hf", "pt"]
):
    convert(hf_folders("llama"), memory_path / "step-4", KIND.options("dcp"))
    before = sorted(memory_path.rglob("*"))
    with pytest.raises(ConversionError, match=r"inside the checkpoint .*/step-4, .*outside of it"):
        convert(hf_folders("llama"), memory_path / "step-4" / "below" / "out", KIND.options(to))
    assert sorted(memory_path.rglob("*")) == before


@pytest.mark.parametrize("to", ["dcp", "hf", "pt"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, hf_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, to: str
):
    def full(fd: int, nbytes: int) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(syscalls, "reserve", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        convert(hf_folders("llama"), tmp_path / "out", KIND.options(to))  # type: ignore[arg-type]
    assert caught.value.errno == errno.ENOSPC
    assert untouched(tmp_path, set())


@pytest.mark.parametrize("to", ["dcp", "hf", "pt"])
def test_an_interrupt_leaves_nothing(memory_path: Path, hf_folders: Callable[[str], Path], to: str):
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf_folders("llama"), memory_path / "out", KIND.options(to), interrupt)  # type: ignore[arg-type]
    assert untouched(memory_path, set())


def test_verification_finds_a_wrong_value_and_publishes_nothing(
    memory_path: Path, hf_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """One that was written with this content, so that its digest is valid."""
    write = DcpSink.write

    def spoil_and_write(self: DcpSink, reader: SlabReader, *args: object) -> None:
        read_into = reader.read_into

        def spoiled(key: str, slab: Slab, raw: Bytes) -> Array:
            array = read_into(key, slab, raw)
            raw[0] ^= 1
            return array

        reader.read_into = spoiled  # type: ignore[method-assign]
        write(self, reader, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DcpSink, "write", spoil_and_write)
    with pytest.raises(MilepostError, match="does not convert back"):
        convert(hf_folders("llama"), memory_path / "out", KIND.options("dcp", verify=True))
    assert untouched(memory_path, set())


def test_verification_finds_a_changed_byte_and_publishes_nothing(
    memory_path: Path, hf_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    write = DcpSink.write

    def write_and_spoil(self: DcpSink, *args: object) -> None:
        write(self, *args)  # type: ignore[arg-type]
        with open(f"{self.storage.root}/{self.place.path('__0_0.distcp')}", "r+b") as file:
            file.seek(20_000)
            byte = file.read(1)
            file.seek(20_000)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(DcpSink, "write", write_and_spoil)
    with pytest.raises(MilepostError, match="digest mismatch"):
        convert(hf_folders("llama"), memory_path / "out", KIND.options("dcp", verify=True))
    assert untouched(memory_path, set())


# ---- in a process of its own ----

_CHILD = """
import os, signal, sys
from milepost.interop.convert import convert
from milepost.interop.options import ConvertOptions
src, dst, to, kill = sys.argv[1:]

def progress(stage, done, total):
    if kill and done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

convert(src, dst, ConvertOptions(to=to, model="llama3", flavor="debugmodel", budget_nbytes=100 << 20), progress)
assert "torch" not in sys.modules, "torch was imported"
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def run_child(src: Path, dst: Path, to: str, *, kill: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _CHILD, str(src), str(dst), to, "yes" if kill else ""]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("to", ["dcp", "hf", "pt"])
def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_the_next_one_sweeps(memory_path: Path, to: str):
    source = _debug_model(memory_path / "source")
    assert run_child(source, memory_path / "out", to, kill=True).returncode == -signal.SIGKILL
    left = {entry.name for entry in memory_path.iterdir()} - {"source"}
    assert len(left) == 1
    assert left.pop().startswith(".milepost-attempt-")
    done = run_child(source, memory_path / "out", to)
    assert done.returncode == 0, done.stderr
    assert untouched(memory_path, {"source", "out"})


def test_a_large_model_is_converted_in_little_memory(memory_path: Path):
    """600 MB of (sparse) weights, cast to 1.2 GB and written to memory, with 100 MiB of buffers."""
    args = replace(model_args("llama3", "debugmodel"), vocab_size=600_000)
    family = family_of("llama3", args)
    shapes = correspond(family, family.scheme("hf"), args).theirs
    layout = plan_layout({key: ("bfloat16", shape) for key, shape in shapes.items()})
    source = memory_path / "source"
    source.mkdir()
    with open(source / "model.safetensors", "wb") as file:
        file.write(layout.prefix)
        file.truncate(layout.nbytes)
    (source / CONFIG_NAME).write_text(json.dumps(make_config("llama3", args, "bfloat16")))
    done = run_child(source, memory_path / "out", "dcp")
    assert done.returncode == 0, done.stderr
    assert layout.nbytes > 600_000_000
    assert int(done.stdout) * 1024 < 250_000_000


def test_options_that_contradict_each_other_are_all_reported():
    with pytest.raises(ConfigError) as caught:
        ConvertOptions(to="hf", model="llama3", dtype="int8", names="torchtitan-0.3")
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="did you mean"):
        ConvertOptions(to="hf", model="llama3", flavor="8b")
