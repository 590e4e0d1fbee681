"""torchtitan's names: those that its releases load strictly, and those in between that we can still read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import KINDS, Kind, hf_model

from milepost.interop.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

_LAYER_02 = {
    "attention.wq.weight": (64, 64),
    "attention.wk.weight": (32, 64),
    "attention.wv.weight": (32, 64),
    "attention.wo.weight": (64, 64),
    "feed_forward.w1.weight": (96, 64),
    "feed_forward.w2.weight": (64, 96),
    "feed_forward.w3.weight": (96, 64),
    "attention_norm.weight": (64,),
    "ffn_norm.weight": (64,),
}
_MOE_LAYER_03 = {
    "attention.qkv_linear.wq.weight": (128, 64),
    "attention.qkv_linear.wk.weight": (64, 64),
    "attention.qkv_linear.wv.weight": (64, 64),
    "attention.wo.weight": (64, 128),
    "attention.q_norm.weight": (32,),
    "attention.k_norm.weight": (32,),
    "moe.router.gate.weight": (4, 64),
    "moe.routed_experts.inner_experts.w1_EFD": (4, 48, 64),
    "moe.routed_experts.inner_experts.w2_EDF": (4, 64, 48),
    "moe.routed_experts.inner_experts.w3_EFD": (4, 48, 64),
    "moe.expert_bias_E": (4,),
    "attention_norm.weight": (64,),
    "ffn_norm.weight": (64,),
}
EXPECTED = {
    # torchtitan 0.2 asks for the output projection although it is tied.
    ("llama-tied", "torchtitan-0.2"): (_LAYER_02, {"output.weight": (128, 64)}),
    ("qwen3-moe", "torchtitan-0.3"): (_MOE_LAYER_03, {"lm_head.weight": (128, 64)}),
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in metadata.items()}
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


@pytest.mark.parametrize(("kind", "names"), EXPECTED)
def test_a_release_finds_every_key_of_its_module(
    memory_path: Path, hf_folders: Callable[[str], Path], kind: str, names: str
):
    convert(hf_folders(kind), memory_path / "step-0", KINDS[kind].options("dcp", names=names))
    layer, output = EXPECTED[kind, names]
    wanted = {f"layers.{i}.{key}": shape for i in range(2) for key, shape in layer.items()}
    wanted |= {"tok_embeddings.weight": (128, 64), "norm.weight": (64,), **output}
    found = stored(memory_path / "step-0")
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == wanted
    if kind == "llama-tied":
        assert torch.equal(found["output.weight"], found["tok_embeddings.weight"])
    else:
        assert torch.equal(found["layers.0.moe.expert_bias_E"], torch.zeros(4))


def our_weights(kind: Kind, hf_folder: Path, work: Path) -> dict[str, torch.Tensor]:
    convert(hf_folder, work / "ours", kind.options("dcp"))
    return stored(work / "ours")


@pytest.mark.parametrize("output", ["output.weight", "lm_head.weight"])
def test_a_fused_projection_from_between_the_releases_is_taken_apart(
    memory_path: Path, hf_folders: Callable[[str], Path], output: str
):
    kind = KINDS["qwen3"]
    ours = our_weights(kind, hf_folders("qwen3"), memory_path)
    heads, kv_heads, width = kind.args.n_heads, kind.args.n_kv_heads, kind.args.head_dim
    theirs = {key: tensor for key, tensor in ours.items() if "attention.w" not in key or ".wo." in key}
    theirs[output] = theirs.pop("output.weight")
    for layer in range(2):
        prefix = f"layers.{layer}.attention."
        # For each key-value head: its queries, its key, its value (torchtitan's FusedQKVLinear).
        q = ours[f"{prefix}wq.weight"].view(kv_heads, heads // kv_heads, width, -1)
        k = ours[f"{prefix}wk.weight"].view(kv_heads, 1, width, -1)
        v = ours[f"{prefix}wv.weight"].view(kv_heads, 1, width, -1)
        theirs[f"{prefix}qkv_linear.wqkv.weight"] = torch.cat([q, k, v], dim=1).flatten(0, 2)
    dcp.save(theirs, checkpoint_id=str(memory_path / "theirs"), no_dist=True)
    report = convert(memory_path / "theirs", memory_path / "back", kind.options("dcp", verify=True))
    assert "wqkv" in report.source_names
    assert report.checked_nbytes == report.written_nbytes, "every byte was compared with stock DCP's CRC-32s"
    back = stored(memory_path / "back")
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_a_training_checkpoint_of_torchtitan_is_converted_without_its_balancing_bias(
    memory_path: Path, hf_folders: Callable[[str], Path]
):
    kind = KINDS["qwen3-moe"]
    convert(hf_folders("qwen3-moe"), memory_path / "titan", kind.options("dcp", names="torchtitan-0.2"))
    state = stored(memory_path / "titan")
    training = {**state, "optimizer.state.norm.weight.exp_avg": torch.ones(64), "lr_scheduler.last_epoch": 3}
    dcp.save(training, checkpoint_id=str(memory_path / "step-10"), no_dist=True)
    report = convert(memory_path / "step-10", memory_path / "back", kind.options("dcp"))
    assert any("layers.0.moe.expert_bias" in note for note in report.notes)
    ours = our_weights(kind, hf_folders("qwen3-moe"), memory_path)
    back = stored(memory_path / "back")
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_square_experts_of_torchtitan_are_distinguished_from_ours_by_the_bias_beside_them(memory_path: Path):
    kind = Kind("qwen3", replace(KINDS["qwen3-moe"].args, moe=replace(KINDS["qwen3-moe"].args.moe, hidden_dim=64)))
    hf_model(kind).save_pretrained(memory_path / "hf")
    ours = our_weights(kind, memory_path / "hf", memory_path)
    convert(memory_path / "hf", memory_path / "titan", kind.options("dcp", names="torchtitan-0.2"))
    report = convert(memory_path / "titan", memory_path / "back", kind.options("dcp"))
    assert report.source_names == "torchtitan-0.2"
    back = stored(memory_path / "back")
    assert all(torch.equal(back[key], ours[key]) for key in ours)
