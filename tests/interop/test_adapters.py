"""PEFT adapters: out of a run's step into PEFT's own folder, or merged into the base model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hub_models import KINDS, Kind, logits
from safetensors.torch import load_file, save_file
from tiny_models import assert_equal, hf_tensors

from milepost import CheckpointConfig, CheckpointManager
from milepost.cli.main import main
from milepost.errors import ConversionError
from milepost.interop.adapters import export_merged
from milepost.interop.options import ConvertOptions

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT refuses the torchao that torchtune is tested with, also where nothing is quantized."""
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)


def adapted(base: Any, **options: Any) -> Any:
    """A model with a trained adapter over ``base``, which keeps its own."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{**LORA, **options}))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def save(folder: Path, model: Any, **options: Any) -> Path:
    with CheckpointManager(folder, CheckpointConfig(interval=1, **options), model=model) as manager:
        manager.save(1)
    return folder


@pytest.fixture
def base(memory_path: Path) -> Any:
    model: Any = KINDS["qwen2, tied"].model()
    model.save_pretrained(memory_path / "base")
    return model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["norm"], "use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_is_written_as_peft_writes_it(memory_path: Path, base: Any, options: dict[str, Any]) -> None:
    model = adapted(base, **options)
    model.save_pretrained(memory_path / "expected")
    run = save(memory_path / "run", model, only_trainable=True)
    assert main(["export", str(run), str(memory_path / "out"), "--adapter"]) == 0
    found, expected = (load_file(memory_path / name / "adapter_model.safetensors") for name in ("out", "expected"))
    assert_equal(found, expected)
    configs = [json.loads((memory_path / name / "adapter_config.json").read_text()) for name in ("out", "expected")]
    assert configs[0] == configs[1]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), memory_path / "out").eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "alpha_pattern": {"layers.1.mlp.down_proj|q_proj": 5}, "modules_to_save": ["norm"]},
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=["patterns", "plain"],
)
def test_an_adapter_is_merged_as_peft_merges_it(memory_path: Path, base: Any, options: dict[str, Any]) -> None:
    model = adapted(base, **options)
    run = save(memory_path / "run", model)
    out, again = str(memory_path / "out"), str(memory_path / "again")
    assert main(["export", str(run), out, "--merge-adapter", "--base", str(memory_path / "base")]) == 0
    assert main(["export", str(run), again, "--merge-adapter", "--hf-assets", str(memory_path / "base")]) == 0
    merged = model.merge_and_unload().state_dict()
    found = hf_tensors(Path(out))
    assert found.keys() == hf_tensors(memory_path / "base").keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-6, atol=1e-7)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert_equal({k: v for k, v in hf_tensors(Path(again)).items() if k in found}, found)


def test_biases_that_were_trained_with_an_adapter_are_not_lost(
    memory_path: Path, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(base, bias="lora_only")
    run, below, out = str(save(memory_path / "run", model)), str(memory_path / "base"), str(memory_path / "out")
    assert main(["export", run, out, "--adapter"]) == 8
    assert "was trained with bias: use save_pretrained() of PEFT" in capsys.readouterr().err
    assert main(["export", run, out, "--merge-adapter", "--base", below]) == 8
    assert "was trained with bias: use merge_and_unload() of PEFT" in capsys.readouterr().err
    assert main(["export", run, out, "--merge-adapter", "--hf-assets", below]) == 0, "the step has the base, trained"
    merged = model.merge_and_unload().state_dict()
    for key, tensor in hf_tensors(Path(out)).items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_rows", [12, 6])
def test_a_module_of_another_shape_than_the_bases_is_refused(memory_path: Path, num_rows: int) -> None:
    adapter = {
        "base_model.model.l.lora_A.default.weight": torch.ones(2, 4),
        "base_model.model.l.lora_B.default.weight": torch.ones(4, 2),
        "base_model.model.lm_head.modules_to_save.default.weight": torch.ones(num_rows, 4),
    }
    torch.save(adapter, memory_path / "adapter.pt")
    (memory_path / "base").mkdir()
    (memory_path / "base" / "config.json").write_text("{}")
    held = {"l.weight": torch.ones(4, 4), "lm_head.weight": torch.zeros(8, 4)}
    save_file(held, memory_path / "base" / "model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    with pytest.raises(
        ConversionError, match=rf"lm_head.weight: \[{num_rows}, 4\] in the adapter, \[8, 4\] in the base"
    ):
        export_merged(
            memory_path / "adapter.pt", memory_path / "out", config, "", memory_path / "base", ConvertOptions(to="hf")
        )
    assert not (memory_path / "out").exists()


def test_what_can_not_be_exported_is_told(memory_path: Path, base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(memory_path / "out")
    plain = str(save(memory_path / "plain", base))
    assert main(["export", plain, out, "--adapter"]) == 8
    assert "holds no adapter_config.json" in capsys.readouterr().err
    dora = str(save(memory_path / "dora", adapted(base, use_dora=True)))
    assert main(["export", dora, out, "--merge-adapter", "--base", str(memory_path / "base")]) == 8
    assert "use_dora is set: use merge_and_unload() of PEFT" in capsys.readouterr().err
    other: Any = Kind("Qwen2Config", {"tie_word_embeddings": True, "intermediate_size": 64}).model()
    other.save_pretrained(memory_path / "other")
    lora = str(save(memory_path / "lora", adapted(base)))
    assert main(["export", lora, out, "--merge-adapter", "--base", str(memory_path / "other")]) == 8
    assert "model.layers.0.mlp.down_proj.weight: [64, 4] x [4, 96] for [64, 64]" in capsys.readouterr().err
    two = adapted(base)
    two.add_adapter("second", peft.LoraConfig(**LORA))
    several = str(save(memory_path / "two", two))
    assert main(["export", several, out, "--adapter"]) == 8
    assert main(["export", several, out, "--adapter", "--adapter-name", "second"]) == 0
    assert main(["export", several, out, "--adapter", "--merge-adapter", "--to", "pt"]) == 2
    assert capsys.readouterr().err.count("  - ") == 2
