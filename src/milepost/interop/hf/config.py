"""Hugging Face's ``config.json``: checked against our sizes, and created from them.

Transformers 4 spells ``rope_theta``, ``rope_scaling`` and ``torch_dtype``; transformers 5 spells ``rope_parameters``
and ``dtype``. Both are read and written, so that either version loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from milepost.format.typed_json import as_type
from milepost.interop.hf.classes import architecture, model_type
from milepost.interop.names.identity import ModelIdentity, are_possible, flavor_of
from milepost.interop.names.model_sizes import ModelArgs, RopeScaling

_ABSENT = object()

_ARCHITECTURES = {
    "llama3": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
"""Family: (``model_type``, class)."""

_DEFAULT_THETA = 10_000.0
_MAX_NUMBER = 1 << 64
"""Limit on numbers: integers in JSON are unlimited, floats are not."""

_SPECIAL_TOKENS = {("llama3", 128256): (128000, 128001), ("qwen3", 151936): (151643, 151643)}
"""(model, published vocabulary) -> its ids of begin and end of text."""


def config_faults(config: Mapping[str, Any], family: str, args: ModelArgs) -> list[str]:
    """List the differences between ``config`` and ``family`` in the sizes ``args``, one line each.

    Only settings that affect the outputs are compared. Those missing in ``config`` have transformers' defaults.
    """
    wanted_type, _ = _ARCHITECTURES[family]
    found_type = model_type(config)
    if found_type != wanted_type:
        named = architecture(config)
        return [f"model_type is {found_type!r}{f' (of {named:.100})' if named else ''}, {family} is {wanted_type!r}"]
    faults = [
        f"{name} is {found!r}, the flavor's is {wanted!r}"
        for name, found, wanted in _compared(config, args)
        if found is not _ABSENT and not _equal(found, wanted)
    ]
    faults += [
        f"{name} is missing"
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if name not in config
    ]
    if config.get("quantization_config") is not None:
        faults.append("quantization_config: quantized weights can't be converted")
    return faults


def _compared(config: Mapping[str, Any], args: ModelArgs) -> list[tuple[str, Any, Any]]:
    """Return (name, the config's value, ours) for all settings that must agree."""
    heads = config.get("num_attention_heads", _ABSENT)
    size = config.get("hidden_size", _ABSENT)
    computed = size // heads if isinstance(heads, int) and isinstance(size, int) and heads else _ABSENT
    head_dim = config.get("head_dim")
    theta, scaling = _rope(config)
    compared: list[tuple[str, Any, Any]] = [
        ("hidden_size", size, args.dim),
        ("num_hidden_layers", config.get("num_hidden_layers", _ABSENT), args.n_layers),
        ("num_attention_heads", heads, args.n_heads),
        ("num_key_value_heads", config.get("num_key_value_heads", heads), args.n_kv_heads),
        ("head_dim", computed if head_dim is None else head_dim, args.head_dim),
        ("vocab_size", config.get("vocab_size", _ABSENT), args.vocab_size),
        ("rms_norm_eps", config.get("rms_norm_eps", 1e-6), args.norm_eps),
        ("rope_theta", theta, args.rope_theta),
        ("rope_scaling", scaling, _scaling_parameters(args.rope_scaling)),
        ("tie_word_embeddings", config.get("tie_word_embeddings", False), args.tied_embeddings),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("use_sliding_window", config.get("use_sliding_window", False), False),
    ]
    if args.moe is None:
        compared.append(("intermediate_size", config.get("intermediate_size", _ABSENT), args.hidden_dim))
        return compared
    experts = config.get("num_experts", config.get("num_local_experts", _ABSENT))
    return [
        *compared,
        ("num_experts", experts, args.moe.num_experts),
        ("num_experts_per_tok", config.get("num_experts_per_tok", 8), args.moe.top_k),
        ("moe_intermediate_size", config.get("moe_intermediate_size", _ABSENT), args.moe.hidden_dim),
        ("norm_topk_prob", config.get("norm_topk_prob", False), True),
        ("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1),
        ("mlp_only_layers", config.get("mlp_only_layers") or [], []),
    ]


def _rope(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Return theta and scaling, in either version's spelling; the newer one takes precedence."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        theta = parameters.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
        scaling: Any = parameters
    else:
        theta = config.get("rope_theta", _DEFAULT_THETA)
        scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return theta, None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    return theta, {"rope_type": kind} | {
        k: v for k, v in scaling.items() if k not in ("rope_type", "type", "rope_theta")
    }


def _scaling_parameters(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float) and not isinstance(found, bool):
        return bool(abs(found) <= _MAX_NUMBER and abs(found - wanted) <= 1e-9 * abs(wanted))
    return bool(found == wanted)


def make_config(family: str, args: ModelArgs, dtype: str) -> dict[str, Any]:
    """Create a ``config.json`` for weights of ``dtype``, readable by transformers 4 and 5."""
    family_name, class_name = _ARCHITECTURES[family]
    scaling = _scaling_parameters(args.rope_scaling)
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": family_name,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": args.rope_theta, **(scaling or {"rope_type": "default"})},
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    tokens = _SPECIAL_TOKENS.get((family.removesuffix("_moe"), args.vocab_size))
    if tokens is not None:
        config["bos_token_id"], config["eos_token_id"] = tokens
    if family == "llama3":
        config["mlp_bias"] = False
    else:
        config["use_sliding_window"] = False
        config["sliding_window"] = None
    if args.moe is not None:
        config |= {
            "num_experts": args.moe.num_experts,
            "num_experts_per_tok": args.moe.top_k,
            "moe_intermediate_size": args.moe.hidden_dim,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": args.moe.balance_loss_weight,
        }
    return config


def with_dtype(config: Mapping[str, Any], dtype: str, *, with_parts: bool = False) -> dict[str, Any]:
    """Return ``config`` for weights of another dtype; ``with_parts``: the configs of a composite model's parts too."""
    changed = dict(config)
    parts = [name for name, value in config.items() if name.endswith("_config") and isinstance(value, Mapping)]
    for name in parts if with_parts else ():
        own = config[name]
        if {"dtype", "torch_dtype"} & own.keys():
            changed[name] = with_dtype(own, dtype, with_parts=True)
    for name in ("dtype", "torch_dtype"):
        if name in changed:
            changed[name] = dtype
    return changed if {"dtype", "torch_dtype"} & changed.keys() else changed | {"torch_dtype": dtype}


def identity_of(config: Mapping[str, Any]) -> ModelIdentity | None:
    """Return the model described by a ``config.json`` in our terms; None if it is of an unknown kind.

    Settings without an equivalent (``hidden_act``, biases, other RoPE scalings) are checked by :func:`config_faults`.
    """
    family = next((name for name, (kind, _) in _ARCHITECTURES.items() if kind == model_type(config)), None)
    if family is None:
        return None
    name = family.removesuffix("_moe")
    theta, scaling = _rope(config)
    heads, dim = config.get("num_attention_heads"), config.get("hidden_size")
    default_head_dim = dim // heads if isinstance(dim, int) and isinstance(heads, int) and heads else None
    said = {
        "dim": dim,
        "n_layers": config.get("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim") or default_head_dim,
        "hidden_dim": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "max_seq_len": config.get("max_position_embeddings", 2048),
        "rope_theta": theta,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied_embeddings": config.get("tie_word_embeddings", False),
        "rope_scaling": _scaling_sizes(scaling),
        "moe": None,
    }
    if family == "qwen3_moe":
        said["moe"] = {
            "num_experts": config.get("num_experts", config.get("num_local_experts")),
            "top_k": config.get("num_experts_per_tok", 8),
            "hidden_dim": config.get("moe_intermediate_size"),
        }
    try:
        sizes = as_type(said, ModelArgs)
    except msgspec.ValidationError:
        return None
    return ModelIdentity(name=name, flavor=flavor_of(name, sizes), sizes=sizes) if are_possible(sizes) else None


def _scaling_sizes(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return Llama 3.1's scaling in our terms; None for none and for unsupported kinds."""
    if scaling is None or scaling.get("rope_type") != "llama3":
        return None
    return {
        "factor": scaling.get("factor"),
        "low_freq_factor": scaling.get("low_freq_factor"),
        "high_freq_factor": scaling.get("high_freq_factor"),
        "original_seq_len": scaling.get("original_max_position_embeddings"),
    }
