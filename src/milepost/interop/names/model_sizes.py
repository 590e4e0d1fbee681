"""The sizes of the models that Milepost trains and converts: plain tables, without torch.

Sources: the ``params.json`` / ``config.json`` files published with Llama 3.1, Llama 3.2 and Qwen 3. The debug flavors
are ours; Llama's has the shape and RoPE of torchtitan's, so that their checkpoints are interchangeable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from milepost.errors import ConfigError, near

__all__ = ["MODEL_NAMES", "MoEArgs", "ModelArgs", "RopeScaling", "model_args", "model_flavors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths to contexts longer than the pre-training's."""

    factor: float
    low_freq_factor: float = 1.0
    """Wavelengths above ``original_seq_len / low_freq_factor`` are stretched by the full factor."""
    high_freq_factor: float = 4.0
    """Wavelengths below ``original_seq_len / high_freq_factor`` are unchanged."""
    original_seq_len: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEArgs:
    """A feed-forward layer with ``num_experts``, of which each token uses ``top_k``."""

    num_experts: int
    top_k: int
    hidden_dim: int
    """The hidden width of one expert."""
    balance_loss_weight: float = 1e-3
    """Weight of the loss that keeps the experts evenly used (see ``models/moe.py``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs:
    """The shape of one decoder-only transformer."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    """The hidden width of the dense feed-forward; unused with ``moe``."""
    vocab_size: int
    max_seq_len: int
    """The longest context the published weights were trained for; a run may use any length."""
    rope_theta: float
    norm_eps: float
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    """The output projection is the embedding matrix, stored once, as ``tok_embeddings.weight``."""
    moe: MoEArgs | None = None


def _llama(dim: int, layers: int, heads: int, hidden_dim: int, *, factor: float = 8.0, tied: bool = False) -> ModelArgs:
    return ModelArgs(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=8,
        head_dim=dim // heads,
        hidden_dim=hidden_dim,
        vocab_size=128256,
        max_seq_len=131072,
        rope_theta=500_000.0,
        norm_eps=1e-5,
        rope_scaling=RopeScaling(factor=factor),
        tied_embeddings=tied,
    )


def _qwen(
    dim: int,
    layers: int,
    heads: int,
    hidden_dim: int,
    *,
    kv_heads: int = 8,
    tied: bool = False,
    moe: MoEArgs | None = None,
) -> ModelArgs:
    return ModelArgs(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=128,
        hidden_dim=hidden_dim,
        vocab_size=151936,
        max_seq_len=40960,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        tied_embeddings=tied,
        moe=moe,
    )


_DEBUG = ModelArgs(
    dim=256,
    n_layers=6,
    n_heads=16,
    n_kv_heads=16,
    head_dim=16,
    hidden_dim=768,
    vocab_size=2048,
    max_seq_len=2048,
    rope_theta=500_000.0,
    norm_eps=1e-5,
    rope_scaling=RopeScaling(factor=8.0),
)
_QWEN_DEBUG = replace(
    _DEBUG, n_heads=8, n_kv_heads=4, head_dim=32, rope_theta=1_000_000.0, norm_eps=1e-6, rope_scaling=None
)

_LLAMA3 = {
    "debugmodel": _DEBUG,
    "1B": _llama(2048, 16, 32, 8192, factor=32.0, tied=True),
    "3B": _llama(3072, 28, 24, 8192, factor=32.0, tied=True),
    "8B": _llama(4096, 32, 32, 14336),
    "70B": _llama(8192, 80, 64, 28672),
    "405B": _llama(16384, 126, 128, 53248),
}

_QWEN3 = {
    "debugmodel": _QWEN_DEBUG,
    "0.6B": _qwen(1024, 28, 16, 3072, tied=True),
    "1.7B": _qwen(2048, 28, 16, 6144, tied=True),
    "4B": _qwen(2560, 36, 32, 9728, tied=True),
    "8B": _qwen(4096, 36, 32, 12288),
    "14B": _qwen(5120, 40, 40, 17408),
    "32B": _qwen(5120, 64, 64, 25600),
    "debugmodel_moe": replace(_QWEN_DEBUG, moe=MoEArgs(num_experts=8, top_k=2, hidden_dim=256)),
    "30B-A3B": _qwen(2048, 48, 32, 6144, kv_heads=4, moe=MoEArgs(num_experts=128, top_k=8, hidden_dim=768)),
    "235B-A22B": _qwen(4096, 94, 64, 12288, kv_heads=4, moe=MoEArgs(num_experts=128, top_k=8, hidden_dim=1536)),
}

_MODELS: Mapping[str, Mapping[str, ModelArgs]] = MappingProxyType({"llama3": _LLAMA3, "qwen3": _QWEN3})

MODEL_NAMES = tuple(_MODELS)


def model_flavors(name: str) -> tuple[str, ...]:
    """Return the flavors of model ``name``, smallest first within dense and MoE. Raises ConfigError."""
    _require(name, _MODELS, "model.name", "model")
    return tuple(_MODELS[name])


def model_args(name: str, flavor: str, *, vocab_size: int | None = None) -> ModelArgs:
    """Return the published sizes of ``flavor``, with the given ``vocab_size``, if any.

    Raises:
        ConfigError: no such model or flavor; the message lists those that exist and names the nearest.
    """
    _require(name, _MODELS, "model.name", "model")
    _require(flavor, _MODELS[name], "model.flavor", f"flavor of {name}")
    args = _MODELS[name][flavor]
    return args if vocab_size is None else replace(args, vocab_size=vocab_size)


def _require(choice: str, choices: Mapping[str, object], option: str, kind: str) -> None:
    if choice in choices:
        return
    found = near(choice, choices, cutoff=0.4)
    hint = f"did you mean {found!r}? " if found else ""
    raise ConfigError(f"{option} = {choice!r}: there is no such {kind}; {hint}choices: {', '.join(choices)}")
