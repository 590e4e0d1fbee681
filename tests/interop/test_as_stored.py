"""Models that there is no table for: any class of transformers goes into a checkpoint and back under its own names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import transformers
from hub_models import KINDS, Kind, logits, saved
from tiny_models import assert_equal, hf_tensors

from milepost import CheckpointConfig, CheckpointManager
from milepost.cli.main import main
from milepost.errors import ConfigError, ConversionError
from milepost.interop import as_stored
from milepost.interop.convert import convert
from milepost.interop.hf.hub_names import kept_names
from milepost.interop.options import ConvertOptions

FAST = ("qwen2, tied", "gpt2", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_hub_to_checkpoint_and_back(memory_path: Path, kind: str) -> None:
    source, middle, back = (memory_path / name for name in ("source", "middle", "back"))
    model = saved(kind, source)
    there = convert(source, middle, ConvertOptions(to="dcp", verify=True))
    assert (there.model, there.flavor) == ("hf", type(model).__name__)
    report = convert(middle, back, ConvertOptions(to="hf", model="hf", hf_assets=source, verify=True))
    assert report.checked_nbytes >= report.written_nbytes
    assert_equal(hf_tensors(source), hf_tensors(back))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes().strip() == (source / name).read_bytes().strip(), name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("kind", ["qwen2, tied", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_trained_module_is_exported(memory_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of a training state is in the step; the folder has what `save_pretrained` writes, tied weights once."""
    model = saved(kind, memory_path / "assets")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(1, 17).reshape(1, -1)).logits.sum().backward()
    optimizer.step()
    with CheckpointManager(
        memory_path / "run", CheckpointConfig(enable=True, interval=1), model=model, optimizer=optimizer
    ) as manager:
        manager.save(1)
    model.save_pretrained(memory_path / "expected", max_shard_size="60KB")  # type: ignore[operator]
    asked = ["export", str(memory_path / "run"), str(memory_path / "out"), "--model", "hf", "--verify"]
    assert main([*asked, "--hf-assets", str(memory_path / "assets")]) == 0, capsys.readouterr().err
    assert_equal(hf_tensors(memory_path / "out"), hf_tensors(memory_path / "expected"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "out").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert main(["export", str(memory_path / "run"), str(memory_path / "out.pt"), "--model", "hf", "--to", "pt"]) == 0
    assert_equal(torch.load(memory_path / "out.pt", weights_only=True), dict(model.state_dict()))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module."])
def test_what_wrappers_put_before_names_is_left_out(memory_path: Path, prefix: str) -> None:
    model = saved("mistral", memory_path / "assets")
    state = {prefix + key: value for key, value in model.state_dict().items()}
    dcp.save(state, checkpoint_id=memory_path / "stock", no_dist=True)
    torch.save(state, memory_path / "file.pt")
    for source in ("stock", "file.pt"):
        out = memory_path / f"from-{source}"
        options = ConvertOptions(to="hf", model="hf", hf_assets=memory_path / "assets")
        convert(memory_path / source, out, options)
        assert_equal(hf_tensors(out), hf_tensors(memory_path / "assets"))
    convert(memory_path / "stock", memory_path / "out.pt", ConvertOptions(to="pt", model="hf"))
    assert_equal(torch.load(memory_path / "out.pt", weights_only=True), dict(model.state_dict()))


def test_a_cast_leaves_whole_numbers_alone(memory_path: Path) -> None:
    torch.save({"w": torch.randn(4, 3), "steps": torch.tensor([2**40 + 1])}, memory_path / "in.pt")
    asked = ConvertOptions(to="pt", dtype="bfloat16", verify=True)
    assert convert(memory_path / "in.pt", memory_path / "out.pt", asked).verified
    found = torch.load(memory_path / "out.pt", weights_only=True)
    assert (found["w"].dtype, found["steps"].item()) == (torch.bfloat16, 2**40 + 1)


def test_what_does_not_fit_is_refused(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_stored, "names_of_class", lambda name, config: None)  # as without transformers
    model = saved("mistral", memory_path / "assets")
    saved("phi3", memory_path / "other")
    torch.save(model.state_dict(), memory_path / "in.pt")
    out = memory_path / "out"
    with pytest.raises(ConversionError, match=r"missing: model\.layers\.0\.mlp\.gate_up_proj\.weight") as caught:
        convert(memory_path / "in.pt", out, ConvertOptions(to="hf", model="hf", hf_assets=memory_path / "other"))
    assert any(line.startswith("unexpected: ") for line in caught.value.problems)
    with pytest.raises(ConversionError, match="name a folder that has it with --hf-assets"):
        convert(memory_path / "in.pt", out, ConvertOptions(to="hf", model="hf"))
    with pytest.raises(ConfigError, match="--model hf if it is a model of transformers"):
        convert(memory_path / "in.pt", out, ConvertOptions(to="dcp"))
    with pytest.raises(ConfigError, match="takes no --flavor"):
        ConvertOptions(to="dcp", model="hf", flavor="8B")
    config = json.loads((memory_path / "assets" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (memory_path / "assets" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"quantized weights \(gptq\)"):
        convert(memory_path / "assets", out, ConvertOptions(to="dcp", dtype="bfloat16"))
    assert not out.exists()


def test_an_output_that_is_no_longer_tied_is_not_lost(memory_path: Path) -> None:
    model = saved("qwen2, tied", memory_path / "assets")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["lm_head.weight"][0, 0] += 1
    torch.save(state, memory_path / "in.pt")
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight: it would be"):
        convert(
            memory_path / "in.pt",
            memory_path / "out",
            ConvertOptions(to="hf", model="hf", hf_assets=memory_path / "assets"),
        )


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"], ids=["index", "one file"])
def test_what_a_module_has_under_several_names_is_stored_under_the_one_of_its_files(
    memory_path: Path, max_shard_size: str
) -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=96)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(memory_path / "assets", max_shard_size=max_shard_size)
    torch.save(model.state_dict(), memory_path / "in.pt")
    options = ConvertOptions(to="hf", model="hf", hf_assets=memory_path / "assets", verify=True)
    report = convert(memory_path / "in.pt", memory_path / "out", options)
    assert "lm_head.weight is shared.weight, which is stored once" in report.notes
    assert_equal(hf_tensors(memory_path / "out"), hf_tensors(memory_path / "assets"))


MIXTRAL = Kind("MixtralConfig", {"num_local_experts": 4, "tie_word_embeddings": True})


@pytest.mark.parametrize("asked", ["here", pytest.param("transformers", marks=pytest.mark.slow)])
def test_a_module_that_is_cut_in_another_way_than_its_files_is_stored_as_they_are(
    memory_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts of a layer are one tensor of the module, and several in the files."""
    model: Any = MIXTRAL.model()
    if asked == "here":  # the answer of a process with transformers
        monkeypatch.setattr(as_stored, "names_of_class", lambda name, config: kept_names(model))
    model.save_pretrained(memory_path / "assets", max_shard_size="60KB")
    with CheckpointManager(memory_path / "run", CheckpointConfig(interval=1), model=model) as manager:
        manager.save(1)
    step, out = memory_path / "run/step-1", memory_path / "out"
    options = ConvertOptions(to="hf", model="hf", hf_assets=memory_path / "assets", verify=True)
    report = convert(step, out, options)
    assert any("names are those of the module of MixtralForCausalLM" in note for note in report.notes)
    assert_equal(hf_tensors(out), hf_tensors(memory_path / "assets"))
    convert(step, memory_path / "half", replace(options, dtype="bfloat16"))
    expected = {key: value.bfloat16() for key, value in hf_tensors(out).items()}
    assert_equal(hf_tensors(memory_path / "half"), expected)
    untied = dict(model.state_dict())
    untied["lm_head.weight"] = untied["lm_head.weight"] + 1
    torch.save(untied, memory_path / "untied.pt")
    with pytest.raises(ConversionError, match=r"ties lm_head\.weight to .* it would be lost|it would be lost"):
        convert(memory_path / "untied.pt", memory_path / "lost", options)
    del untied["model.norm.weight"]
    untied["lm_head.weight"] = model.state_dict()["lm_head.weight"]
    torch.save(untied, memory_path / "less.pt")
    with pytest.raises(ConversionError, match=r"missing: model\.norm\.weight"):
        convert(memory_path / "less.pt", memory_path / "lost", options)


def test_a_class_gives_its_names_where_assets_have_no_weights(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a state dict that records no class: its config names it."""
    model: Any = MIXTRAL.model()
    monkeypatch.setattr(as_stored, "names_of_class", lambda name, config: kept_names(model))
    model.save_pretrained(memory_path / "expected")
    (memory_path / "assets").mkdir()
    shutil.copy(memory_path / "expected/config.json", memory_path / "assets")
    torch.save(model.state_dict(), memory_path / "in.pt")
    options = ConvertOptions(to="hf", model="hf", hf_assets=memory_path / "assets", verify=True)
    convert(memory_path / "in.pt", memory_path / "out", options)
    assert_equal(hf_tensors(memory_path / "out"), hf_tensors(memory_path / "expected"))


def test_assets_with_the_names_of_an_earlier_version_do_not_hinder_an_export(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model of the hub whose norms are called gamma and beta: the files are those of today's class."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=32))
    monkeypatch.setattr(as_stored, "names_of_class", lambda name, config: kept_names(model))
    model.save_pretrained(memory_path / "assets")
    expected = hf_tensors(memory_path / "assets")
    earlier = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in expected.items()}
    safetensors.torch.save_file(earlier, memory_path / "assets/model.safetensors")
    torch.save(model.state_dict(), memory_path / "in.pt")
    options = ConvertOptions(to="hf", model="hf", hf_assets=memory_path / "assets", verify=True)
    report = convert(memory_path / "in.pt", memory_path / "out", options)
    assert any("of an earlier version of transformers" in note for note in report.notes)
    assert_equal(hf_tensors(memory_path / "out"), expected)
    state = dict(model.state_dict())
    del state["bert.embeddings.LayerNorm.weight"]
    torch.save(state, memory_path / "less.pt")
    with pytest.raises(ConversionError, match=r"missing: bert\.embeddings\.LayerNorm\.gamma"):
        convert(memory_path / "less.pt", memory_path / "lost", options)


def test_a_models_own_prompt_encoder_is_not_an_adapter(memory_path: Path) -> None:
    """SAM's, unlike that of PEFT's prompts."""
    config = {"model_type": "made up", "architectures": ["X"]}
    (memory_path / "config.json").write_text(json.dumps(config))
    options = ConvertOptions(to="hf", model="hf", hf_assets=memory_path)
    torch.save({"prompt_encoder.mask_embed.conv1.bias": torch.ones(2)}, memory_path / "sam.pt")
    convert(memory_path / "sam.pt", memory_path / "sam", options)
    torch.save({"prompt_encoder.default.embedding.weight": torch.ones(2)}, memory_path / "peft.pt")
    with pytest.raises(ConversionError, match="holds a PEFT adapter"):
        convert(memory_path / "peft.pt", memory_path / "peft", options)


def test_a_cast_is_in_the_configs_of_parts_too(memory_path: Path) -> None:
    """Programs that read a composite model's text part alone go by its own dtype."""
    (memory_path / "source").mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, memory_path / "source/model.safetensors")
    parts = {"text_config": {"dtype": "float32", "vision_config": {"torch_dtype": "float32"}}, "audio_config": {"n": 1}}
    config = {"model_type": "made up", "architectures": ["X"], "dtype": "float32", **parts}
    (memory_path / "source/config.json").write_text(json.dumps(config))
    convert(memory_path / "source", memory_path / "out", ConvertOptions(to="hf", model="hf", dtype="bfloat16"))
    found = json.loads((memory_path / "out/config.json").read_text())
    assert (found["dtype"], found["text_config"]["dtype"], found["audio_config"]) == ("bfloat16", "bfloat16", {"n": 1})
    assert found["text_config"]["vision_config"] == {"torch_dtype": "bfloat16"}


def test_names_in_files_are_the_models_own(memory_path: Path) -> None:
    """Also those that look like a wrapper's, as of Levit."""
    (memory_path / "source").mkdir()
    tensors = {"blocks.0.module.weight": torch.ones(2), "head.weight": torch.ones(3)}
    safetensors.torch.save_file(tensors, memory_path / "source/model.safetensors")
    config = {"architectures": ["LevitForImageClassification"], "model_type": "levit"}
    (memory_path / "source/config.json").write_text(json.dumps(config))
    convert(memory_path / "source", memory_path / "middle", ConvertOptions(to="dcp"))
    options = ConvertOptions(to="hf", model="hf", hf_assets=memory_path / "source", verify=True)
    convert(memory_path / "middle", memory_path / "back", options)
    assert_equal(hf_tensors(memory_path / "back"), tensors)
