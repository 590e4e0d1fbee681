"""Tiny models of every architecture that is converted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch import nn

from milepost.interop.hf.config import make_config
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import ModelArgs, MoEArgs, RopeScaling
from milepost.interop.options import ConvertOptions, TargetKind

_LLAMA = ModelArgs(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
    vocab_size=128,
    max_seq_len=512,
    rope_theta=500_000.0,
    norm_eps=1e-5,
)
_QWEN = replace(_LLAMA, head_dim=32, rope_theta=1_000_000.0, norm_eps=1e-6)


@dataclass(frozen=True, slots=True)
class Kind:
    """A tiny model: its name among ours, its sizes, and the options that convert it."""

    model: str
    args: ModelArgs

    def options(self, to: TargetKind, **more: object) -> ConvertOptions:
        """Options of a conversion to ``to``."""
        return ConvertOptions(to=to, model=self.model, sizes=self.args, **more)  # type: ignore[arg-type]


KINDS = {
    "llama": Kind("llama3", _LLAMA),
    "llama-multi-head": Kind("llama3", replace(_LLAMA, n_kv_heads=4)),
    "llama-tied": Kind("llama3", replace(_LLAMA, tied_embeddings=True)),
    "llama-3.1": Kind("llama3", replace(_LLAMA, rope_scaling=RopeScaling(factor=8.0, original_seq_len=16))),
    "qwen3": Kind("qwen3", _QWEN),
    "qwen3-tied": Kind("qwen3", replace(_QWEN, tied_embeddings=True)),
    "qwen3-moe": Kind("qwen3", replace(_QWEN, moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=48))),
}


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8)), key


def randomize(model: nn.Module) -> None:
    """Weights of a size that lets attention choose and logits differ."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.1)


def hf_model(kind: Kind) -> transformers.PreTrainedModel:
    """The model as ``transformers`` builds it from our config, with random weights in float32."""
    family = family_of(kind.model, kind.args).name
    config = transformers.AutoConfig.for_model(**make_config(family, kind.args, "float32"))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomize(model)
    return model
