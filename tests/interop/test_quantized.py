"""Quantized sources: fp8 and MXFP4 dequantized as transformers and torch do, bit for bit; others refused by name."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import transformers
from hub_models import logits, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import stored
from tiny_models import assert_equal, hf_tensors
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from milepost import CheckpointConfig, CheckpointManager, HfModel
from milepost.errors import ConversionError
from milepost.format.box import Box
from milepost.interop.adapters import export_merged
from milepost.interop.convert import convert
from milepost.interop.options import DEFAULT_BUDGET_NBYTES, ConvertOptions
from milepost.interop.weights.boxes import array_dtype
from milepost.interop.weights.dequantized import method_of, plain_weights
from milepost.interop.weights.open import open_weights
from milepost.interop.weights.stream import SlabReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

BLOCK = 16
"""Published weights have blocks of 128 x 128; the tiny models are smaller than one."""


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, object] | None, config: Path) -> None:
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((config / "config.json").read_text())
    said |= {"quantization_config": quantization} if quantization is not None else {}
    (folder / "config.json").write_text(json.dumps(said))


def to_fp8(weight: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-wise, as DeepSeek publishes: weights and their inverse scales."""
    rows, columns = (-(-n // block) for n in weight.shape)
    padded = torch.zeros(rows * block, columns * block)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    tiles = padded.view(rows, block, columns, block)
    scale = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    quantized = (tiles / scale[:, None, :, None]).view(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return quantized.contiguous().to(torch.float8_e4m3fn), scale


def from_fp8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: int = BLOCK) -> torch.Tensor:
    """transformers' dequantization; it takes whole blocks only, so what is short is filled up with zeros."""
    rows, columns = (n * block for n in scale.shape)
    padded = torch.zeros(rows, columns).to(weight.dtype)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    whole: torch.Tensor = Fp8Dequantize(None)._dequantize_one(padded, scale, output_dtype=dtype)
    return whole[: weight.shape[0], : weight.shape[1]].contiguous()


def fp8_folder(folder: Path, source: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The model in ``source`` as DeepSeek-V3 is published: all projections but the output in fp8."""
    tensors, quantized = {}, {}
    for key, weight in hf_tensors(source).items():
        if weight.dim() < 2 or "embed" in key or key.startswith("lm_head") or key.endswith("mlp.gate.weight"):
            tensors[key] = weight if "bias" in key else weight.bfloat16()
            continue
        quantized[key] = tensors[key], tensors[f"{key}_scale_inv"] = to_fp8(weight)
    write(folder, tensors, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}, source)
    return quantized


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_blocks_of_fp8_become_what_transformers_makes_of_them(memory_path: Path, dtype: str) -> None:
    """Under the trainer's names and under the hub's; what goes back is a model that transformers loads."""
    source, folder = memory_path / "source", memory_path / "fp8"
    saved("deepseek_v3", source)
    quantized = fp8_folder(folder, source)
    expected = {key: from_fp8(*pair, getattr(torch, dtype)) for key, pair in quantized.items()}
    assert any(weight.shape[0] % BLOCK for weight in expected.values()), "blocks at the edge are shorter"
    report = convert(
        folder, memory_path / "ours", ConvertOptions(to="dcp", model="deepseek_v3", dtype=dtype, verify=True)
    )
    assert any("fp8 weights were dequantized" in note for note in report.notes)
    convert(memory_path / "ours", memory_path / "back", ConvertOptions(to="hf", verify=True))
    convert(folder, memory_path / "kept", ConvertOptions(to="hf", dtype=dtype, hf_assets=folder, verify=True))
    for out in ("back", "kept"):
        found = hf_tensors(memory_path / out)
        assert found.keys() == hf_tensors(source).keys()
        assert_equal({key: found[key] for key in expected}, expected)
        config = json.loads((memory_path / out / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == dtype
        loaded = transformers.AutoModelForCausalLM.from_pretrained(memory_path / out, dtype=torch.float32).eval()
        assert logits(loaded).std() > 0.01


def test_factors_are_those_of_torchs_own_reader(memory_path: Path) -> None:
    """``QuantizedHuggingFaceStorageReader`` of torch, in blocks of 128 of which the last are short."""
    weight, scale = to_fp8(torch.randn(300, 200), 128)
    saved("deepseek_v3", memory_path / "source")
    write(memory_path / "fp8", {"a.weight": weight, "a.weight_scale_inv": scale}, None, memory_path / "source")
    index = {"metadata": {}, "weight_map": dict.fromkeys(("a.weight", "a.weight_scale_inv"), "model.safetensors")}
    (memory_path / "fp8" / "model.safetensors.index.json").write_text(json.dumps(index))
    state = {"a.weight": torch.empty(300, 200)}
    reader = QuantizedHuggingFaceStorageReader(str(memory_path / "fp8"), target_dtype=torch.float32)
    dcp.load(state, storage_reader=reader, no_dist=True)
    asked = ConvertOptions(to="pt", model="hf", dtype="float32", verify=True)
    convert(memory_path / "fp8", memory_path / "out.pt", asked)
    assert_equal(torch.load(memory_path / "out.pt", weights_only=True), state)


def test_mxfp4_becomes_what_transformers_makes_of_it(memory_path: Path) -> None:
    source, folder = memory_path / "source", memory_path / "mxfp4"
    saved("gpt_oss", source)
    generator = torch.Generator().manual_seed(3)
    tensors, expected = {}, {}
    for key, weight in hf_tensors(source).items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = weight.shape
            shape = (experts, outputs, inputs // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(115, 130, shape, dtype=torch.uint8, generator=generator)
            scales[0, 0], scales[0, 1], scales[0, 2] = 0, 254, 255
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            expected[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        else:
            expected[key] = tensors[key] = weight.bfloat16()
    write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, source)
    convert(folder, memory_path / "ours", ConvertOptions(to="dcp", model="gpt_oss"))
    mlp1 = stored(memory_path / "ours")["layers.0.moe.experts.mlp1_weight"]
    gate_up = expected["model.layers.0.mlp.experts.gate_up_proj"].transpose(1, 2)
    torch.testing.assert_close(mlp1, gate_up, rtol=0, atol=0, equal_nan=True)
    convert(memory_path / "ours", memory_path / "back", ConvertOptions(to="hf"))
    assert_equal(hf_tensors(memory_path / "back"), expected)
    # As it is stored it goes through a checkpoint unchanged; with --dtype it does not.
    convert(folder, memory_path / "kept", ConvertOptions(to="dcp"))
    carried = ConvertOptions(to="hf", model="hf", hf_assets=folder)
    convert(memory_path / "kept", memory_path / "same", carried)
    assert_equal(hf_tensors(memory_path / "same"), tensors)
    cast = ConvertOptions(to="hf", model="hf", hf_assets=folder, dtype="bfloat16")
    convert(memory_path / "kept", memory_path / "plain", cast)
    assert_equal(hf_tensors(memory_path / "plain"), expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "plain")
    assert torch.equal(loaded.model.layers[1].mlp.experts.down_proj, expected["model.layers.1.mlp.experts.down_proj"])


def test_a_model_of_the_hub_starts_from_quantized_weights(memory_path: Path) -> None:
    source, folder = memory_path / "source", memory_path / "fp8"
    model = saved("mistral", source)
    quantized = fp8_folder(folder, source)
    config = CheckpointConfig(initial_load_in_hf=True, initial_load_path=str(folder))
    with CheckpointManager(memory_path / "run", config, model=model, hf=HfModel.of(model)) as manager:
        report = manager.load()
    assert report is not None
    assert any("dequantized" in note for note in report.notes)
    found = model.state_dict()
    for key, pair in quantized.items():
        assert torch.equal(found[key], from_fp8(*pair, torch.float32)), key


def test_an_adapter_is_merged_into_a_quantized_base_as_numbers(memory_path: Path) -> None:
    weight, scale = to_fp8(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))
    (memory_path / "config.json").write_text("{}")
    base = {"l.weight": weight, "l.weight_scale_inv": scale}
    how: dict[str, object] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    write(memory_path / "fp8", base, how, memory_path)
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    name = "base_model.model.l.lora_{}.default.weight"
    torch.save({name.format("A"): a, name.format("B"): b}, memory_path / "adapter.pt")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    asked = ConvertOptions(to="hf", dtype="float32")
    report = export_merged(memory_path / "adapter.pt", memory_path / "out", config, "", memory_path / "fp8", asked)
    assert any("dequantized" in note for note in report.notes)
    merged = hf_tensors(memory_path / "out")
    torch.testing.assert_close(merged["l.weight"], from_fp8(weight, scale, torch.float32) + b @ a)
    assert "quantization_config" not in json.loads((memory_path / "out" / "config.json").read_text())
    write(
        memory_path / "int8",
        {"l.weight": torch.ones(32, 32, dtype=torch.int8), "l.SCB": torch.ones(32)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        memory_path,
    )
    with pytest.raises(ConversionError, match="bitsandbytes"):
        export_merged(memory_path / "adapter.pt", memory_path / "no", config, "", memory_path / "int8", asked)
    assert not (memory_path / "no").exists()


def test_a_training_starts_from_a_quantized_file(memory_path: Path) -> None:
    """Of a model that is not quantized; one that has the factors itself gets what is stored."""
    weight, scale = to_fp8(torch.randn(130, 200), 128)
    tensors = {"weight": weight, "weight_scale_inv": scale, "bias": torch.ones(130)}
    safetensors.torch.save_file(tensors, memory_path / "fp8.safetensors")
    model = torch.nn.Linear(200, 130)
    start = CheckpointConfig(enable=True, initial_load_path=str(memory_path / "fp8.safetensors"))
    with CheckpointManager(memory_path / "run", start, model=model) as manager:
        manager.load()
    assert torch.equal(model.weight, from_fp8(weight, scale, torch.float32, 128))
    model.register_buffer("weight_scale_inv", torch.zeros_like(scale))
    with CheckpointManager(memory_path / "other", start, model=model) as manager:
        manager.load()
    assert torch.equal(model.weight_scale_inv, scale)
    assert torch.equal(model.weight, weight.float())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_box_of_a_dequantized_tensor_is_that_part_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("boxes")
    weight, scale = to_fp8(torch.randn(40, 37, generator=torch.Generator().manual_seed(1)))
    tensors = {
        "a": torch.stack([weight, weight]),
        "a_scale_inv": torch.stack([scale, scale + 1]),
        "b_blocks": torch.randint(0, 256, (2, 5, 3, 16), dtype=torch.uint8),
        "b_scales": torch.randint(120, 130, (2, 5, 3), dtype=torch.uint8),
    }
    key = data.draw(st.sampled_from(["a", "b"]))
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k[0] == key}, folder / "model.safetensors")
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}} if key == "a" else {}
    (folder / "config.json").write_text(json.dumps(said))
    with plain_weights(open_weights(folder), "float32").source as source:
        shape = source.tensors[key].shape
        whole = np.empty(shape, np.float32)
        source.read_into(key, Box.whole(shape), whole)
        bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        box = Box(tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds))
        part = np.full(box.sizes, -1, np.float32)
        source.read_into(key, box, part)
    np.testing.assert_array_equal(part, whole[tuple(slice(low, high) for low, high in bounds)])


def test_memory_does_not_grow_with_a_quantized_tensor(tmp_path: Path) -> None:
    """64 MiB of fp8, 128 MiB dequantized, pass through a hundredth of that."""
    tensors = {
        "a.weight": torch.zeros(8192, 8192, dtype=torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(64, 64),
        "b.weight": torch.zeros(8, 2048, dtype=torch.float32),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    with plain_weights(open_weights(tmp_path), "bfloat16").source as source:
        reader = SlabReader(source, DEFAULT_BUDGET_NBYTES)
        out = np.empty(reader.slab_nbytes, np.uint8)
        tracemalloc.start()
        for slab in reader.slabs("a.weight"):
            reader.read_into("a.weight", slab, out[: slab.nbytes])
        _, peak_nbytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert array_dtype("bfloat16").itemsize * 8192 * 8192 > 20 * peak_nbytes


REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, {"a.qweight": torch.int32, "a.g_idx": torch.int32}),
    "awq": ({"quant_method": "awq", "bits": 4}, {"a.qweight": torch.int32, "a.qzeros": torch.int32}),
    "bitsandbytes int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"a.weight": torch.int8, "a.SCB": torch.float32},
    ),
    "bitsandbytes nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"a.weight": torch.uint8, "a.weight.quant_state.bitsandbytes__nf4": torch.uint8},
    ),
}


@pytest.mark.parametrize("method", REFUSED)
def test_other_quantizations_are_refused_by_name_with_what_would_do(memory_path: Path, method: str) -> None:
    """Told by the config, and without one by the keys."""
    quantization, dtypes = REFUSED[method]
    saved("mistral", memory_path / "source")
    tensors = {key: torch.ones(4, 4).to(dtype) for key, dtype in dtypes.items()}
    write(memory_path / "folder", tensors, quantization, memory_path / "source")
    torch.save(tensors, memory_path / "file.pt")
    for options in (ConvertOptions(to="dcp", model="mistral"), ConvertOptions(to="pt", dtype="bfloat16")):
        with pytest.raises(ConversionError, match=rf"quantized weights \({method}\).*convert the original model"):
            convert(memory_path / "folder", memory_path / "out", options)
    with pytest.raises(ConversionError, match=rf"quantized weights \({method}\)"):
        convert(memory_path / "file.pt", memory_path / "out", ConvertOptions(to="pt", dtype="bfloat16"))
    assert not (memory_path / "out").exists()


KINDS_OF_BITSANDBYTES: list[tuple[dict[str, Any], str, str]] = [
    ({"load_in_4bit": True}, "a.weight.absmax", "bitsandbytes fp4"),
    ({"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": None}, "a", "bitsandbytes fp4"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "a.quant_state.bitsandbytes__nf4", "bitsandbytes nf4"),
    ({"load_in_8bit": True, "load_in_4bit": False}, "a", "bitsandbytes int8"),
    ({"quant_method": "bitsandbytes"}, "a.SCB", "bitsandbytes int8"),
    ({"quant_method": "bitsandbytes"}, "a", "bitsandbytes"),
]


@pytest.mark.parametrize(("said", "key", "method"), KINDS_OF_BITSANDBYTES)
def test_the_kind_of_bitsandbytes_is_that_of_the_tensors_else_of_the_config(
    memory_path: Path, said: dict[str, Any], key: str, method: str
) -> None:
    assert transformers.BitsAndBytesConfig(load_in_4bit=True).bnb_4bit_quant_type == "fp4", "its default"
    torch.save({key: torch.ones(2)}, memory_path / "m.pt")
    with open_weights(memory_path / "m.pt").source as source:
        assert method_of(source, {"quantization_config": said}) == method


def test_what_is_wrong_with_factors_is_all_reported(memory_path: Path) -> None:
    source, folder = memory_path / "source", memory_path / "fp8"
    saved("deepseek_v3", source)
    quantized = fp8_folder(folder, source)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    first, second, third = list(quantized)[:3]
    del tensors[f"{first}_scale_inv"], tensors[third]
    tensors[f"{second}_scale_inv"] = tensors[f"{second}_scale_inv"][:1].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert(folder, memory_path / "out", ConvertOptions(to="dcp", model="deepseek_v3"))
    said = "\n".join(caught.value.problems)
    assert f"{first} is float8_e4m3fn without a" in said
    assert f"{second}_scale_inv is float32" in said
    assert f"{third}_scale_inv is a scale without weights" in said
    shutil.rmtree(folder)
    write(folder, hf_tensors(source), {"quant_method": "fp8"}, source)
    with pytest.raises(ConversionError, match=r"quantized weights \(fp8\):\n  no tensor is quantized: if"):
        convert(folder, memory_path / "out", ConvertOptions(to="dcp", model="deepseek_v3"))


def test_weights_that_are_not_quantized_take_the_config_of_a_folder_that_is(memory_path: Path) -> None:
    """A model that was trained in bfloat16 from fp8: the published folder lends tokenizer and config."""
    source, folder = memory_path / "source", memory_path / "fp8"
    model = saved("deepseek_v3", source)
    fp8_folder(folder, source)
    convert(source, memory_path / "step", ConvertOptions(to="dcp", model="hf"))
    convert(memory_path / "step", memory_path / "out", ConvertOptions(to="hf", model="hf", hf_assets=folder))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(model))
