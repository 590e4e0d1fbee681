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
from milepost.interop import as_stored
from milepost.interop.adapters import export_merged
from milepost.interop.hf.hub_names import kept_names
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


def test_what_can_not_be_exported_is_reported(memory_path: Path, base: Any, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_an_adapter_is_merged_into_the_base_that_it_was_trained_over_alone(
    memory_path: Path, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, below = str(memory_path / "out"), str(memory_path / "base")
    alone = str(save(memory_path / "alone", adapted(base), only_trainable=True))
    assert main(["export", alone, out, "--merge-adapter", "--hf-assets", below]) == 8
    assert "name its base model with --base" in capsys.readouterr().err
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.k_proj.weight.mul_(1.001)
    tuned.save_pretrained(memory_path / "other")
    whole = str(save(memory_path / "whole", adapted(base)))
    for run in (alone, whole):
        assert main(["export", run, out, "--merge-adapter", "--base", str(memory_path / "other")]) == 8
        assert "was trained on another base than --base" in capsys.readouterr().err
    base.to(torch.bfloat16).save_pretrained(memory_path / "bf16")  # the same, rounded
    assert main(["export", alone, out, "--merge-adapter", "--base", str(memory_path / "bf16")]) == 0


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"layer_replication": [[0, 2], [1, 2]]}])
def test_what_else_an_adapter_changes_is_not_left_out_of_a_merge(
    memory_path: Path, base: Any, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    run = str(save(memory_path / "run", adapted(base, **options)))
    assert main(["export", run, str(memory_path / "out"), "--merge-adapter", "--base", str(memory_path / "base")]) == 8
    assert next(iter(options)) in capsys.readouterr().err


def test_what_was_trained_beside_an_adapter_is_not_lost(
    memory_path: Path, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, below = adapted(base), str(memory_path / "out"), str(memory_path / "base")
    norm = model.base_model.model.model.norm.weight
    with torch.no_grad():
        norm.requires_grad_().fill_(3.0)
    runs = [save(memory_path / "alone", model, only_trainable=True), memory_path / "whole"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    model(torch.arange(4)[None]).logits.sum().backward()
    optimizer.step()
    config = CheckpointConfig(interval=1)
    with CheckpointManager(runs[1], config, model=model, optimizer=optimizer) as manager:
        manager.save(1)
    expected = model.merge_and_unload().state_dict()
    for number, run in enumerate(map(str, runs)):
        assert main(["export", run, out, "--adapter"]) == 8
        assert "model.norm.weight. Name such modules in modules_to_save" in capsys.readouterr().err
        assert main(["export", run, f"{out}-{number}", "--merge-adapter", "--base", below]) == 0
        for key, tensor in hf_tensors(Path(f"{out}-{number}")).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        pytest.param({"modules_to_save": ["lm_head"]}, marks=pytest.mark.slow),
        pytest.param({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["q_proj", "lm_head"]}, marks=pytest.mark.slow),
    ],
    ids=["embedding", "output", "both", "lora"],
)
def test_what_is_trained_of_tied_weights_is_not_given_to_both(
    memory_path: Path, base: Any, options: dict[str, Any]
) -> None:
    model, out, again = adapted(base, **options), memory_path / "out", memory_path / "again"
    alone, whole = (str(save(memory_path / str(only), model, only_trainable=only)) for only in (True, False))
    assert main(["export", alone, str(out), "--merge-adapter", "--base", str(memory_path / "base")]) == 0
    assert main(["export", whole, str(again), "--merge-adapter", "--hf-assets", str(memory_path / "base")]) == 0
    for folder in (out, again):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
        assert loaded.config.tie_word_embeddings is False, "for programs that would leave out what they take for tied"


def test_a_step_with_an_adapter_is_not_written_or_merged_as_a_plain_model(
    memory_path: Path, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run, below, out = save(memory_path / "run", adapted(base)), str(memory_path / "base"), str(memory_path / "out")
    assert main(["export", str(run), out, "--hf-assets", below, "--model", "hf"]) == 8
    assert "holds a PEFT adapter" in capsys.readouterr().err
    steps = [str(run / "step-1")] * 2
    assert main(["merge", *steps, "--to", out]) == 8
    assert "a PEFT adapter in it" in capsys.readouterr().err
    assert main(["export", str(run), f"{out}.pt", "--to", "pt"]) == 0, "for a training to begin with"


LAYERS = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
KINDS_OF_ADAPTERS = {
    "loha": peft.LoHaConfig(r=2, **LAYERS),
    "lokr": peft.LoKrConfig(r=2, **LAYERS),
    "ia3": peft.IA3Config(**LAYERS, feedforward_modules=[]),
    "fourierft": peft.FourierFTConfig(n_frequency=9, **LAYERS),
    "hra": peft.HRAConfig(r=2, **LAYERS),
    "c3a": peft.C3AConfig(block_size=8, **LAYERS),
    "road": peft.RoadConfig(group_size=16, **LAYERS),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "embedding": peft.LoraConfig(**(LORA | {"target_modules": ["embed_tokens"]})),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("loha", "embedding") else pytest.param(name, marks=pytest.mark.slow)
        for name in KINDS_OF_ADAPTERS
    ],
)
def test_adapters_of_other_kinds_are_written_as_peft_writes_them(memory_path: Path, base: Any, name: str) -> None:
    model = peft.get_peft_model(copy.deepcopy(base), KINDS_OF_ADAPTERS[name]).eval()
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.01 * (number + 1))
    model.save_pretrained(memory_path / "expected")
    run = save(memory_path / "run", model)
    assert main(["export", str(run), str(memory_path / "out"), "--adapter"]) == 0
    found, expected = (load_file(memory_path / place / "adapter_model.safetensors") for place in ("out", "expected"))
    assert_equal(found, expected)
    assert (
        main(["export", str(run), str(memory_path / "merged"), "--merge-adapter", "--base", str(memory_path / "base")])
        == 8
    )
    assert (
        main(
            ["export", str(run), str(memory_path / "plain"), "--hf-assets", str(memory_path / "base"), "--model", "hf"]
        )
        == 8
    )


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_of_another_size_than_the_bases_goes_with_the_adapter(
    memory_path: Path, base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "base")
    larger.resize_token_embeddings(140)
    model = peft.get_peft_model(larger, peft.LoraConfig(**LORA))
    model.save_pretrained(memory_path / "expected")
    assert main(["export", str(save(memory_path / "run", model)), str(memory_path / "out"), "--adapter"]) == 0
    found, expected = (load_file(memory_path / place / "adapter_model.safetensors") for place in ("out", "expected"))
    assert found.keys() == expected.keys() | {"base_model.model.lm_head.weight"}  # which PEFT's save finds to be shared
    assert_equal({key: found[key] for key in expected}, expected)
    alone = save(memory_path / "alone", model, only_trainable=True)
    assert main(["export", str(alone), str(memory_path / "no"), "--adapter"]) == 8
    assert "has 140 words, its base" in capsys.readouterr().err
    prompts = peft.get_peft_model(
        copy.deepcopy(base), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    assert main(["export", str(save(memory_path / "prompts", prompts)), str(memory_path / "no"), "--adapter"]) == 8
    assert "its configuration says PROMPT_TUNING: use save_pretrained() of PEFT" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_a_step_with_its_base_is_merged_into_what_save_pretrained_writes(
    memory_path: Path, base: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied tensors once, and the names of files, not of the module."""
    if kind == "moe":
        base = Kind("MixtralConfig", {"num_local_experts": 4}).model()
        names = kept_names(base)
        monkeypatch.setattr(as_stored, "names_of_class", lambda name, config: names)
        base.save_pretrained(memory_path / "base")
    model = adapted(base, target_modules=["q_proj"])
    run = save(memory_path / "run", model)
    out = memory_path / "out"
    assert main(["export", str(run), str(out), "--merge-adapter", "--hf-assets", str(memory_path / "base")]) == 0
    model.merge_and_unload().save_pretrained(memory_path / "expected")
    found, expected = hf_tensors(out), hf_tensors(memory_path / "expected")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)


def test_an_adapter_is_merged_into_files_with_other_names_than_the_module(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = Kind("MixtralConfig", {"num_local_experts": 4}).model()
    names = kept_names(base)
    monkeypatch.setattr(as_stored, "names_of_class", lambda name, config: names)
    base.save_pretrained(memory_path / "base")
    model = adapted(base, target_modules=["q_proj"], modules_to_save=["gate"])
    run = save(memory_path / "run", model, only_trainable=True)
    out = memory_path / "out"
    assert main(["export", str(run), str(out), "--merge-adapter", "--base", str(memory_path / "base")]) == 0
    model.merge_and_unload().save_pretrained(memory_path / "expected")
    found, expected = hf_tensors(out), hf_tensors(memory_path / "expected")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)
