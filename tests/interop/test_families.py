"""Families by table: models of transformers under the trainer's names and back, bit for bit and with equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import transformers
from hub_models import logits, saved
from tiny_models import assert_equal, hf_tensors

from milepost.cli.main import main
from milepost.errors import ConfigError, ConversionError
from milepost.interop.convert import convert
from milepost.interop.names.config_family import read_sizes
from milepost.interop.names.families import CONFIG_FAMILIES
from milepost.interop.names.rules import correspond
from milepost.interop.options import ConvertOptions

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODELS = {
    # kind of tests/interop/hub_models.py: (--model, some of our names with the shapes of the tiny model)
    "mistral": ("mistral", {"layers.1.attention.wk.weight": (32, 64), "layers.0.feed_forward.w2.weight": (64, 96)}),
    "qwen2, tied": ("qwen2.5", {"layers.1.attention.wq.bias": (64,), "tok_embeddings.weight": (128, 64)}),
    "olmo2": ("olmo2", {"layers.0.attention.k_norm.weight": (32,), "layers.1.post_ffn_norm.weight": (64,)}),
    "phi3": ("phi4", {"layers.0.attention.wv.weight": (32, 64), "layers.0.feed_forward.w3.weight": (96, 64)}),
    "gemma3": ("gemma3", {"layers.0.attention.q_norm.weight": (16,), "layers.1.post_attention_norm.weight": (64,)}),
}
MODELS |= {
    "deepseek_v3": (
        "deepseek_v3",
        {
            "layers.0.attention.wkv_b.weight": (96, 16),
            "layers.0.feed_forward.w2.weight": (64, 96),
            "layers.1.moe.experts.w1": (4, 32, 64),
            "layers.1.moe.shared_experts.w2.weight": (64, 32),
            "layers.1.moe.expert_bias": (4,),
        },
    ),
    "gpt_oss": ("gpt_oss", {"layers.0.moe.experts.mlp1_weight": (4, 192, 64), "layers.1.attention.sinks": (4,)}),
    "llama4": ("llama4", {"layers.0.feed_forward.w1.weight": (80, 64), "layers.1.moe.experts.w3": (4, 96, 64)}),
}
FAST = ("mistral", "phi3", "deepseek_v3")
SOME = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in metadata.items()}
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


@pytest.mark.parametrize("kind", SOME)
def test_a_model_of_the_hub_gets_the_trainers_names_and_back(
    memory_path: Path, kind: str, tabulate: Callable[..., None]
) -> None:
    """The checkpoint records the config: the way back needs no option, and gives the same keys, bytes and logits."""
    source, middle, back = (memory_path / name for name in ("source", "middle", "back"))
    model = saved(kind, source)
    name, some = MODELS[kind]
    there = convert(source, middle, ConvertOptions(to="dcp", model=name, verify=True))
    ours = stored(middle)
    assert {key: tuple(ours[key].shape) for key in some} == some
    assert sum(value.numel() for value in ours.values()) == sum(value.numel() for value in hf_tensors(source).values())
    report = convert(middle, back, ConvertOptions(to="hf", verify=True))
    assert report.model == there.model in CONFIG_FAMILIES
    assert report.checked_nbytes >= report.written_nbytes
    assert_equal(hf_tensors(source), hf_tensors(back))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
    assert type(loaded) is type(model)
    difference = (logits(loaded) - logits(model)).abs().max().item()
    assert difference == 0
    options = ["--to", "dcp", "--model", name]
    tabulate(there.model, "HF -> DCP", source, options, there.num_tensors, difference)
    tabulate(there.model, "DCP -> HF", middle, ["--to", "hf"], report.num_tensors, difference)


@pytest.mark.parametrize("name", CONFIG_FAMILIES)
def test_a_table_has_the_keys_and_shapes_of_the_class_in_its_published_size(name: str) -> None:
    """The default config of each class of transformers is that of a published model."""
    family = CONFIG_FAMILIES[name]
    config = transformers.AutoConfig.for_model(family.model_types[0])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}
    scheme = family.tables.scheme("hf-stacked" if family.has_scheme("hf-stacked") else "hf")
    sizes = read_sizes(family, json.loads(config.to_json_string(use_diff=False)), "config.json")
    assert dict(correspond(family.tables, scheme, sizes).theirs) == theirs
    assert type(model).__name__ == family.architecture


def test_sizes_of_a_checkpoint_that_records_none_come_from_the_assets(memory_path: Path) -> None:
    """Such as one from another trainer, with an enlarged embedding."""
    source, stock = memory_path / "source", memory_path / "stock"
    saved("mistral", source)
    convert(source, memory_path / "ours", ConvertOptions(to="dcp", model="mistral"))
    state = stored(memory_path / "ours")
    for key in ("tok_embeddings.weight", "output.weight"):
        state[key] = torch.cat([state[key], torch.randn(8, 64)])
    dcp.save(state, checkpoint_id=str(stock), no_dist=True)
    with pytest.raises(ConfigError, match=r"--hf-assets"):
        convert(stock, memory_path / "out", ConvertOptions(to="hf", model="mistral"))
    report = convert(stock, memory_path / "out", ConvertOptions(to="hf", model="mistral", hf_assets=source))
    assert any("136 entries" in note for note in report.notes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "out")
    assert loaded.config.vocab_size == 136
    assert torch.equal(loaded.lm_head.weight, state["output.weight"])
    assert (memory_path / "out" / "tokenizer.json").exists()
    (memory_path / "tokenizer").mkdir()
    (memory_path / "tokenizer" / "tokenizer.json").write_text("{}")
    again = convert(stock, memory_path / "recorded", ConvertOptions(to="dcp", model="mistral", hf_assets=source))
    assert again.num_tensors == len(state)
    lent = ConvertOptions(to="hf", hf_assets=memory_path / "tokenizer")
    convert(memory_path / "recorded", memory_path / "lent", lent)
    assert (memory_path / "lent" / "tokenizer.json").read_text() == "{}"
    assert_equal(hf_tensors(memory_path / "lent"), hf_tensors(memory_path / "out"))
    convert(memory_path / "recorded", memory_path / "x.pt", ConvertOptions(to="pt"))
    assert_equal(torch.load(memory_path / "x.pt", weights_only=True), state)


def test_the_text_model_of_a_model_that_sees_is_converted(memory_path: Path) -> None:
    """As Gemma 3 is published from 4B on: the text model below `language_model.`, its config below `text_config`."""
    source, larger = memory_path / "source", memory_path / "larger"
    model = saved("gemma3", source)
    config = json.loads((source / "config.json").read_text())
    tensors = {f"language_model.{key}": value for key, value in hf_tensors(source).items()}
    tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.ones(4, 4)
    tensors["multi_modal_projector.mm_input_projection_weight"] = torch.ones(4, 4)
    larger.mkdir()
    safetensors.torch.save_file(tensors, larger / "model.safetensors", metadata={"format": "pt"})
    text = {key: value for key, value in config.items() if key != "architectures"}
    (larger / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}, "dtype": "float32"})
    )
    report = convert(larger, memory_path / "ours", ConvertOptions(to="dcp", model="gemma3", verify=True))
    assert any("skipped" in note and "and 1 like it" in note for note in report.notes)
    convert(memory_path / "ours", memory_path / "back", ConvertOptions(to="hf"))
    assert_equal(hf_tensors(source), hf_tensors(memory_path / "back"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "back", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(model))


# ---- torchtitan ----

_TITAN_03 = {
    "deepseek_v3": {
        "layers.0.attention.wq_a.weight": (24, 64),
        "layers.0.attention.wkv_a.weight": (24, 64),
        "layers.1.moe.expert_bias_E": (4,),
        "layers.1.moe.routed_experts.inner_experts.w1_EFD": (4, 32, 64),
        "layers.1.moe.routed_experts.inner_experts.w2_EDF": (4, 64, 32),
        "layers.1.moe.shared_experts.w3.weight": (32, 64),
        "lm_head.weight": (128, 64),
    },
    "gpt_oss": {
        "layers.0.attention.qkv_linear.wq.bias": (64,),
        "layers.0.attention.sinks": (4,),
        "layers.1.moe.expert_bias_E": (4,),
        "layers.1.moe.routed_experts.inner_experts.mlp1_weight_EGD": (4, 192, 64),
        "layers.1.moe.routed_experts.inner_experts.mlp2_bias_ED": (4, 64),
        "lm_head.weight": (128, 64),
    },
    "llama4": {
        "layers.0.attention.qkv_linear.wk.weight": (32, 64),
        "layers.0.feed_forward.w1.weight": (80, 64),
        "layers.1.moe.expert_bias_E": (4,),
        "layers.1.moe.routed_experts.inner_experts.w3_EFD": (4, 96, 64),
        "layers.1.moe.shared_experts.w2.weight": (64, 96),
        "lm_head.weight": (128, 64),
    },
}


@pytest.mark.parametrize(
    "kind", ["gpt_oss", *(pytest.param(k, marks=pytest.mark.slow) for k in ("llama4", "deepseek_v3"))]
)
def test_families_that_torchtitan_trains_get_the_names_of_its_releases_and_back(memory_path: Path, kind: str) -> None:
    source = memory_path / "source"
    saved(kind, source)
    for names in ("torchtitan-0.2", "torchtitan-0.3"):
        convert(source, memory_path / names, ConvertOptions(to="dcp", model=kind, names=names))
        report = convert(memory_path / names, memory_path / f"{names}-back", ConvertOptions(to="hf", verify=True))
        assert report.source_names in (names, "milepost"), "of DeepSeek-V3 ours are those of 0.2"
        assert_equal(hf_tensors(source), hf_tensors(memory_path / f"{names}-back"))
    found = {key: tuple(value.shape) for key, value in stored(memory_path / "torchtitan-0.3").items()}
    assert {key: found.get(key) for key in _TITAN_03[kind]} == _TITAN_03[kind]
    assert not [key for key in found if ".moe.experts." in key or key.startswith("output.")]
    older = stored(memory_path / "torchtitan-0.2")
    bias = older["layers.1.moe.expert_bias"]
    assert kind == "deepseek_v3" or torch.equal(bias, torch.zeros(4))


def test_projections_that_torchtitan_fused_between_its_releases_are_read(memory_path: Path) -> None:
    """Biases too, as of gpt-oss: for each key-value head its queries, its key, its value."""
    source = memory_path / "source"
    saved("gpt_oss", source)
    convert(source, memory_path / "ours", ConvertOptions(to="dcp", model="gpt_oss"))
    state = stored(memory_path / "ours")
    for layer in range(2):
        for kind in ("weight", "bias"):
            q, k, v = (state.pop(f"layers.{layer}.attention.w{part}.{kind}") for part in "qkv")
            parts = [part.view(2, -1, 16, *part.shape[1:]) for part in (q, k, v)]
            state[f"layers.{layer}.attention.qkv_linear.wqkv.{kind}"] = torch.cat(parts, dim=1).flatten(0, 2)
    dcp.save(state, checkpoint_id=str(memory_path / "fused"), no_dist=True)
    asked = ConvertOptions(to="hf", model="gpt_oss", hf_assets=source, verify=True)
    assert "wqkv" in convert(memory_path / "fused", memory_path / "back", asked).source_names
    assert_equal(hf_tensors(source), hf_tensors(memory_path / "back"))


def test_layers_that_predict_further_tokens_are_left_out_and_noted(memory_path: Path) -> None:
    """DeepSeek-V3 is published with one, as layer 61; transformers' class has none either."""
    source = memory_path / "source"
    saved("deepseek_v3", source)
    tensors = hf_tensors(source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    further = {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "model.layers.2.enorm.weight": torch.ones(64)}
    safetensors.torch.save_file({**tensors, **further}, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(source, memory_path / "ours", ConvertOptions(to="dcp", model="deepseek_v3", verify=True))
    assert any("skipped" in note and "model.layers.2.eh_proj.weight" in note for note in report.notes)
    convert(memory_path / "ours", memory_path / "back", ConvertOptions(to="hf"))
    assert_equal(tensors, hf_tensors(memory_path / "back"))
    beyond = {key.replace(".2.", ".3."): value for key, value in further.items()}
    safetensors.torch.save_file({**tensors, **beyond}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"unexpected: model\.layers\.3\.eh_proj\.weight"):
        convert(source, memory_path / "out", ConvertOptions(to="dcp", model="deepseek_v3"))


# ---- what no table fits ----


def test_a_model_that_fits_half_gets_one_report(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report names the keys that match, those that don't, the nearest family, and what to do."""
    model = saved("mistral", memory_path / "source")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["model.layers.0.self_attn.sinks"] = torch.ones(4)
    del state["model.layers.1.mlp.up_proj.weight"]
    torch.save(state, memory_path / "in.pt")
    source, out = str(memory_path / "in.pt"), str(memory_path / "out")
    assert (
        main(["convert", source, out, "--to", "dcp", "--model", "mistral", "--hf-assets", f"{source[:-5]}source"]) == 8
    )
    said = capsys.readouterr().err
    assert "1 missing, 1 unexpected, 0 misshapen, 20 match" in said
    assert "missing: model.layers.1.mlp.up_proj.weight" in said
    assert "unexpected: model.layers.0.self_attn.sinks" in said
    assert "nearest family: 'llama3' or 'mistral' (scheme 'hf'); 20 of 21 keys match it, 1 do not" in said
    assert "does not match: model.layers.N.self_attn.sinks" in said
    assert "do: --model llama3 --flavor SIZE if that is what it is; --model hf to keep the names as they are" in said
    assert main(["convert", source, out, "--to", "hf"]) == 2
    assert "nearest family: 'llama3' or 'mistral'" in capsys.readouterr().err
    assert not Path(out).exists()


def test_a_model_of_another_family_is_identified_by_its_config_or_its_keys(memory_path: Path) -> None:
    model = saved("qwen2, tied", memory_path / "qwen2")
    saved("mistral", memory_path / "mistral")
    with pytest.raises(
        ConversionError, match=r"model_type is 'qwen2', mistral is mistral; --model qwen2 is that family"
    ):
        convert(memory_path / "qwen2", memory_path / "out", ConvertOptions(to="dcp", model="mistral"))
    torch.save(dict(model.state_dict()), memory_path / "in.pt")
    asked = ConvertOptions(to="dcp", model="mistral", hf_assets=memory_path / "mistral")
    with pytest.raises(ConversionError, match=r"nearest family: 'qwen2'[^;]*; 27 of 27 keys match(.|\n)*--model qwen2"):
        convert(memory_path / "in.pt", memory_path / "out", asked)
    convert(memory_path / "qwen2", memory_path / "ours", ConvertOptions(to="dcp", model="qwen2"))
    for other in ("hf", "mistral"):
        with pytest.raises(ConversionError, match=r"holds a qwen2 model: .*leave --model out"):
            convert(memory_path / "ours", memory_path / "out", ConvertOptions(to="pt", model=other))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776: expected a size"),
        ({"hidden_size": "64", "vocab_size": None}, "hidden_size is '64': expected a size(.|\n)*vocab_size is missing"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: expected true or false"),
    ],
)
def test_a_config_without_sizes_is_refused(memory_path: Path, changes: dict[str, object], said: str) -> None:
    saved("mistral", memory_path / "source")
    path = memory_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConversionError, match=said):
        convert(memory_path / "source", memory_path / "out", ConvertOptions(to="dcp", model="mistral"))


def test_a_config_of_absurdly_many_experts_is_refused() -> None:
    config = json.loads(transformers.DeepseekV3Config().to_json_string(use_diff=False))
    asked = config | {"num_hidden_layers": 16_000, "n_routed_experts": 16_000}
    with pytest.raises(ConversionError, match="16000 layers of 16000 experts: more than any known model has"):
        read_sizes(CONFIG_FAMILIES["deepseek_v3"], asked, "config.json")


def test_what_a_family_cannot_do_is_reported_before_anything_is_opened() -> None:
    with pytest.raises(ConfigError, match=r"--names torchtitan-0\.3 is for llama3.* and .* only"):
        ConvertOptions(to="dcp", model="mistral", names="torchtitan-0.3")
    with pytest.raises(ConfigError, match="--model mistral takes no --flavor: it is in the config"):
        ConvertOptions(to="dcp", model="mistral", flavor="7B")
    with pytest.raises(ConfigError, match="there is no such family; did you mean 'mistral'"):
        ConvertOptions(to="dcp", model="mistrall")
