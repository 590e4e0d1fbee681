"""Any model of transformers in one's own loop: it starts from Hugging Face files and ends in them, sharded or not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import transformers
from hub_models import KINDS, Kind, logits
from tiny_models import assert_equal, hf_tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import milepost
from milepost import CheckpointConfig, CheckpointManager, HfModel
from milepost.errors import ConfigError, ConversionError, StateMismatchError
from milepost.interop.hf.hub_names import config_of, kept_names
from milepost.testing.world import run_world

MOE = Kind("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16})
"""Its module holds the experts of a layer as one tensor, its files each expert's matrices."""


def last_save(folder: Path, model: Any, part: Any = None, **options: Any) -> Path:
    """The last step of a run, in Hugging Face's form."""
    config = CheckpointConfig(last_save_in_hf=True, **options)
    hf = HfModel.of(part if part is not None else model)
    with CheckpointManager(folder, config, model=model, hf=hf) as manager:
        manager.save(1, last_step=True)
    return folder / "step-1"


def start(folder: Path, model: Any, path: Path, **options: Any) -> milepost.LoadReport:
    config = CheckpointConfig(initial_load_in_hf=True, initial_load_path=str(path), **options)
    with CheckpointManager(folder, config, model=model, hf=HfModel.of(model)) as manager:
        report = manager.load()
    assert report is not None
    return report


def other(model: Any) -> Any:
    """The same module with other values."""
    made = type(model)(copy.deepcopy(model.config))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(0.5)
    return made.eval()


@pytest.mark.parametrize("name", ["qwen2, tied", "moe", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_run_ends_in_what_save_pretrained_writes_and_starts_from_it(memory_path: Path, name: str) -> None:
    model: Any = (MOE if name == "moe" else KINDS[name]).model()
    model.save_pretrained(memory_path / "expected")
    step = last_save(memory_path / "run", model)
    assert_equal(hf_tensors(step), hf_tensors(memory_path / "expected"))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((step / file).read_text()) == json.loads((memory_path / "expected" / file).read_text()), file
    loaded = transformers.AutoModelForCausalLM.from_pretrained(step).eval()
    assert torch.equal(logits(loaded), logits(model))
    fresh = other(model)
    report = start(memory_path / "next", fresh, step)
    assert (report.missing, report.unexpected, report.cast) == ((), (), ())
    assert_equal(dict(fresh.state_dict()), dict(model.state_dict()))
    # A step's own record says that it is in this format.
    fresh = other(model)
    config = CheckpointConfig(initial_load_path=str(step))
    with CheckpointManager(memory_path / "another", config, model=fresh, hf=HfModel.of(fresh)) as manager:
        assert manager.load() is not None
    assert_equal(dict(fresh.state_dict()), dict(model.state_dict()))
    plain = torch.nn.Linear(2, 2)
    with (
        CheckpointManager(memory_path / "plain", config, model=plain) as manager,
        pytest.raises(ConfigError, match="holds Hugging Face files: give CheckpointManager `hf`"),
    ):
        manager.load()


def test_a_cast_is_in_the_config_too(memory_path: Path) -> None:
    model = KINDS["qwen2, tied"].model()
    step = last_save(memory_path / "run", model, export_dtype="bfloat16", async_mode="async_with_pinned_mem")
    assert transformers.AutoModelForCausalLM.from_pretrained(step).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in hf_tensors(step).values()} == {torch.bfloat16}


class Wrapper(nn.Module):
    """A module around a model, as in trainers."""

    def __init__(self, model: nn.Module, head: bool = False):
        super().__init__()
        self.model = model
        if head:
            self.value_head = nn.Linear(4, 1)


def test_prefixes_are_recognised_both_ways(memory_path: Path) -> None:
    model = KINDS["qwen2, tied"].model()
    model.save_pretrained(memory_path / "expected")  # type: ignore[operator]
    expected = hf_tensors(memory_path / "expected")
    assert_equal(hf_tensors(last_save(memory_path / "run", Wrapper(model))), expected)
    for number, prefix in enumerate(("module.", "_orig_mod.", "model.", "module._orig_mod.")):
        state = {prefix + key: value for key, value in model.state_dict().items()}
        torch.save(state, memory_path / f"{number}.pt")
        fresh = Wrapper(other(model))
        start(memory_path / f"from{number}", fresh, memory_path / f"{number}.pt")
        assert_equal(dict(fresh.model.state_dict()), dict(model.state_dict()))


@pytest.mark.slow  # of the import of the compiler
def test_a_compiled_model_is_stored_as_if_it_were_not(memory_path: Path) -> None:
    model: Any = KINDS["qwen2, tied"].model()
    model.save_pretrained(memory_path / "expected")
    for number, wrapped in enumerate((torch.compile(model), Wrapper(torch.compile(model)))):  # type: ignore[arg-type]
        step = last_save(memory_path / f"run{number}", wrapped)
        assert_equal(hf_tensors(step), hf_tensors(memory_path / "expected"))


def test_what_would_be_lost_or_left_as_it_was_is_refused(memory_path: Path) -> None:
    model = KINDS["qwen2, tied"].model()
    with pytest.raises(milepost.MilepostError, match=r"not the model's: value_head\.weight"):
        last_save(memory_path / "run", Wrapper(model, head=True))
    model.save_pretrained(memory_path / "weights")  # type: ignore[operator]
    deeper = Kind("Qwen2Config", {"tie_word_embeddings": True, "num_hidden_layers": 3}).model()
    before = copy.deepcopy(dict(deeper.state_dict()))
    with pytest.raises(StateMismatchError) as caught:
        start(memory_path / "deeper", deeper, memory_path / "weights")
    assert any(key.startswith("model.layers.2.") for key in caught.value.missing)
    assert_equal(dict(deeper.state_dict()), before)
    shallow = Kind("Qwen2Config", {"tie_word_embeddings": True, "num_hidden_layers": 1}).model()
    with pytest.raises(StateMismatchError, match=r"allow_unexpected.*model\.layers\.1"):
        start(memory_path / "shallow", shallow, memory_path / "weights")
    report = start(memory_path / "cut", shallow, memory_path / "weights", allow_unexpected=["model.layers.1.*"])
    assert len(report.unexpected) == len([key for key in before if key.startswith("model.layers.2.")])
    with pytest.raises(ConfigError, match="expects a PreTrainedModel"):
        HfModel.of(nn.Linear(2, 2))


def build_sharded(how: str, model: Any) -> Any:
    if how == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, Any] = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in ("q", "k", "v")} | {
        "model.layers.*.self_attn.o_proj": RowwiseParallel()
    }
    return parallelize_module(model, mesh, plan)


def train_sharded(folder: Path, how: str) -> float:
    model: Any = (MOE if how == "fsdp" else Kind("LlamaConfig")).model()
    fresh = build_sharded(how, other(model))
    report = start(folder / f"{how}-next", fresh, folder / how)
    last_save(folder / f"{how}-run", fresh, async_mode="async" if how == "fsdp" else "disabled")
    return float(len(report.missing))


@pytest.mark.parametrize("how", ["fsdp", "tp"])
def test_sharded_models_read_and_write_the_same_files(memory_path: Path, how: str) -> None:
    """Two ranks start from a folder and save what they have loaded: it is that folder again."""
    model: Any = (MOE if how == "fsdp" else Kind("LlamaConfig")).model()
    model.save_pretrained(memory_path / how)
    assert run_world(train_sharded, 2, memory_path, how) == [0.0, 0.0]
    assert_equal(hf_tensors(memory_path / f"{how}-run" / "step-1"), hf_tensors(memory_path / how))


def test_a_step_says_that_its_names_are_the_hubs(memory_path: Path) -> None:
    from milepost.cli.main import main

    model = KINDS["qwen2, tied"].model()
    model.save_pretrained(memory_path / "assets")  # type: ignore[operator]
    with CheckpointManager(
        memory_path / "run", CheckpointConfig(interval=1), model=model, hf=HfModel.of(model)
    ) as manager:
        manager.save(1)
    assert (
        main(["export", str(memory_path / "run"), str(memory_path / "out"), "--hf-assets", str(memory_path / "assets")])
        == 0
    )
    assert_equal(hf_tensors(memory_path / "out"), hf_tensors(memory_path / "assets"))


def test_what_a_class_computes_and_never_stores_is_not_missing(memory_path: Path) -> None:
    sizes = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    config = transformers.MarianConfig(
        **sizes, d_model=8, vocab_size=32, max_position_embeddings=16, pad_token_id=0, decoder_start_token_id=0
    )
    model: Any = transformers.MarianMTModel(config)
    model.save_pretrained(memory_path / "weights")
    fresh: Any = transformers.MarianMTModel(config)
    report = start(memory_path / "next", fresh, memory_path / "weights")
    assert report.missing == ()
    assert any("encoder.embed_positions.weight is in no file of this class" in note for note in report.notes)
    assert_equal(dict(fresh.state_dict()), dict(model.state_dict()))


def dinov2() -> Any:
    """A module that holds gate and up projection apart, which its files have as one tensor."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True))


def test_what_the_files_have_as_one_tensor_is_joined_and_cut_again(memory_path: Path) -> None:
    model = dinov2()
    model.save_pretrained(memory_path / "expected")
    step = last_save(memory_path / "run", model)
    assert_equal(hf_tensors(step), hf_tensors(memory_path / "expected"))
    fresh = dinov2()
    start(memory_path / "next", fresh, step)
    assert_equal(dict(fresh.state_dict()), dict(model.state_dict()))


def test_parts_of_several_dtypes_are_not_joined(memory_path: Path) -> None:
    model = dinov2()
    names = kept_names(model)
    joined = next(key for key in names.theirs if sum(link.theirs_key == key for link in names.links) > 1)
    part = next(link.ours_key for link in names.links if link.theirs_key == joined)
    model.get_parameter(part).data = model.get_parameter(part).data.bfloat16()
    with pytest.raises(ConversionError, match=rf"{joined}: parts of bfloat16 and float32"):
        last_save(memory_path / "run", model)


def test_files_of_earlier_versions_of_transformers_are_loaded(memory_path: Path) -> None:
    """As on the hub: norms with gamma and beta, and no prefix of the base model."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=32, max_position_embeddings=16)
    model: Any = transformers.BertForMaskedLM(config)
    model.save_pretrained(memory_path / "today")
    before = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in hf_tensors(memory_path / "today").items()
    }
    (memory_path / "before").mkdir()
    safetensors.torch.save_file(before, memory_path / "before/model.safetensors")
    fresh: Any = transformers.BertForMaskedLM(config)
    report = start(memory_path / "next", fresh, memory_path / "before")
    assert (report.missing, report.unexpected) == ((), ())
    assert_equal(dict(fresh.state_dict()), dict(model.state_dict()))
    bare: Any = transformers.BertModel(config, add_pooling_layer=False)
    bare.load_state_dict(model.bert.state_dict())
    bare.save_pretrained(memory_path / "bare")
    fresh = transformers.BertForMaskedLM(config)
    report = start(memory_path / "head", fresh, memory_path / "bare", allow_missing=["cls.*"])
    assert {key.partition(".")[0] for key in report.missing} == {"cls"}
    assert_equal(dict(fresh.bert.state_dict()), dict(model.bert.state_dict()))


def test_the_config_of_a_folder_is_read_as_from_pretrained_reads_it() -> None:
    config = transformers.GraniteMoeHybridConfig(time_step_limit=(0.5, float("inf")))
    assert tuple(config_of(config.to_json_string()).time_step_limit) == tuple(config.time_step_limit)


def test_what_a_class_leaves_out_by_its_own_list_is_left_out(memory_path: Path) -> None:
    """As ``from_pretrained`` does: layers for further predictions, and constants that old files lack."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    model: Any = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads))
    model._keys_to_ignore_on_load_unexpected = {r"layers\.9\."}  # DeepSeek-V3's list has the one behind its last
    model.save_pretrained(memory_path / "weights")
    file = memory_path / "weights/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["final_logits_bias"]
    safetensors.torch.save_file(tensors | {"model.decoder.layers.9.fc1.weight": torch.ones(2)}, file)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        fresh.model.decoder.layers[0].fc1.weight.fill_(0.5)
    report = start(memory_path / "next", fresh, memory_path / "weights")
    assert (report.missing, report.unexpected) == ((), ())
    assert "not read, as the class does not use them: model.decoder.layers.9.fc1.weight" in report.notes
    assert any("as the class allows, left as initialized: final_logits_bias" in note for note in report.notes)
    assert_equal(dict(fresh.state_dict()), dict(model.state_dict()))
