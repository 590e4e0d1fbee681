"""The same weights give the same logits: ours against transformers, both ways, and against torchtune."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import KINDS, Kind, randomize
from torch import nn

import milepost
from milepost.format.huggingface import CONFIG_NAME
from milepost.interop.convert import convert
from milepost.interop.hf.config import config_faults, make_config
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import MODEL_NAMES, model_args, model_flavors
from milepost.train.models.decoder import Decoder
from milepost.train.models.llama3 import Llama3
from milepost.train.models.qwen3 import Qwen3

SEQ_LEN = 48


def our_model(kind: Kind) -> Decoder:
    model = {"llama3": Llama3, "qwen3": Qwen3}[kind.model](kind.args, SEQ_LEN).eval()
    randomize(model)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def assert_same_logits(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        first, second = (getattr(out, "logits", out) for out in (one(tokens()), other(tokens())))
    assert first.std() > 0.5, "equal logits everywhere would prove nothing"
    torch.testing.assert_close(first.float(), second.float(), rtol=1e-4, atol=1e-4)


def from_pretrained(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_transformers_give_the_same_logits_in_our_model(
    memory_path: Path, hf_folders: Callable[[str], Path], kind: str
):
    convert(hf_folders(kind), memory_path / "step-0", KINDS[kind].options("dcp"))
    ours = our_model(KINDS[kind])
    milepost.load(memory_path / "step-0", ours.state_dict())
    assert_same_logits(ours, from_pretrained(hf_folders(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_our_model_give_the_same_logits_in_transformers(memory_path: Path, kind: str):
    ours = our_model(KINDS[kind])
    milepost.save(memory_path / "step-0", ours.state_dict())
    convert(memory_path / "step-0", memory_path / "hf", KINDS[kind].options("hf"))
    assert_same_logits(ours, from_pretrained(memory_path / "hf"))


# ---- config.json ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_transformers_4_and_of_5_are_both_read(hf_folders: Callable[[str], Path], kind: str):
    args, family = KINDS[kind].args, family_of(KINDS[kind].model, KINDS[kind].args).name
    newer = json.loads((hf_folders(kind) / CONFIG_NAME).read_text())
    assert "rope_parameters" in newer
    assert config_faults(newer, family, args) == []
    older = {key: value for key, value in newer.items() if key not in ("rope_parameters", "dtype", "num_local_experts")}
    rope = dict(newer["rope_parameters"])
    older |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": "float32"}
    older["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if args.moe is not None:
        older["num_experts"] = args.moe.num_experts
    assert config_faults(older, family, args) == []
    assert config_faults(older, family, replace(args, rope_theta=1.0)) != []
    assert config_faults(newer, family, replace(args, norm_eps=1e-3)) != []


@pytest.mark.parametrize(("model", "flavor"), [(m, f) for m in MODEL_NAMES for f in model_flavors(m)])
def test_a_config_made_from_a_flavor_says_to_transformers_what_the_flavor_is(tmp_path: Path, model: str, flavor: str):
    args = model_args(model, flavor)
    family = family_of(model, args).name
    made = make_config(family, args, "bfloat16")
    assert made.keys() >= {"rope_theta", "rope_scaling", "torch_dtype", "rope_parameters", "dtype"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(made))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config_faults(loaded.to_dict(), family, args) == []
    assert loaded.dtype == torch.bfloat16
    assert loaded.rope_parameters["rope_theta"] == args.rope_theta
    assert loaded.rope_parameters["rope_type"] == ("llama3" if args.rope_scaling else "default")


# ---- torchtune ----


def tune_model(kind: Kind) -> nn.Module:
    """torchtune's Llama 3 in the sizes of ``kind``."""
    from torchtune.models.llama3 import llama3
    from torchtune.models.llama3_1 import llama3_1
    from torchtune.models.llama3_2 import llama3_2

    args = kind.args
    builder, more = llama3, {}
    if args.rope_scaling is not None:
        # torchtune fixes what else is in Llama 3.1's scaling: 1, 4 and 8192.
        builder = llama3_1
    elif args.tied_embeddings:
        # With a factor of 1 nothing is scaled.
        builder, more = llama3_2, {"scale_factor": 1}
    return builder(
        vocab_size=args.vocab_size,
        num_layers=args.n_layers,
        num_heads=args.n_heads,
        num_kv_heads=args.n_kv_heads,
        embed_dim=args.dim,
        max_seq_len=SEQ_LEN,
        intermediate_dim=args.hidden_dim,
        norm_eps=args.norm_eps,
        rope_base=int(args.rope_theta),
        **more,
    ).eval()


TUNE_KINDS = {
    "llama": (KINDS["llama"], "LLAMA3"),
    "llama-tied": (KINDS["llama-tied"], "LLAMA3_2"),
    "llama-3.1": (
        Kind("llama3", replace(KINDS["llama-3.1"].args, rope_scaling=model_args("llama3", "8B").rope_scaling)),
        "LLAMA3",
    ),
}


@pytest.mark.parametrize("kind", TUNE_KINDS)
def test_torchtune_loads_the_pt_file_and_gives_the_same_logits(memory_path: Path, kind: str):
    from torchtune.training import FullModelMetaCheckpointer

    model, model_type = TUNE_KINDS[kind]
    ours = our_model(model)
    milepost.save(memory_path / "step-5", ours.state_dict())
    convert(memory_path / "step-5", memory_path / "weights" / "model.pt", model.options("pt"))
    checkpointer = FullModelMetaCheckpointer(
        checkpoint_dir=str(memory_path / "weights"),
        checkpoint_files=["model.pt"],
        model_type=model_type,
        output_dir=str(memory_path / "tuned"),
    )
    tuned = tune_model(model)
    tuned.load_state_dict(checkpointer.load_checkpoint()["model"])
    assert_same_logits(ours, tuned)


@pytest.mark.parametrize("kind", TUNE_KINDS)
def test_torchtune_loads_the_hugging_face_folder_and_gives_the_same_logits(memory_path: Path, kind: str):
    from torchtune.training import FullModelHFCheckpointer

    model, model_type = TUNE_KINDS[kind]
    ours = our_model(model)
    milepost.save(memory_path / "step-5", ours.state_dict())
    convert(memory_path / "step-5", memory_path / "hf", model.options("hf", max_shard_nbytes=100_000))
    files = sorted(file.name for file in (memory_path / "hf").glob("*.safetensors"))
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(memory_path / "hf"),
        checkpoint_files=files,
        model_type=model_type,
        output_dir=str(memory_path / "tuned"),
    )
    tuned = tune_model(model)
    tuned.load_state_dict(checkpointer.load_checkpoint()["model"])
    assert_same_logits(ours, tuned)
