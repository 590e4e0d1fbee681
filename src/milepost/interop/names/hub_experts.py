"""Mixtures of experts of the hub: DeepSeek-V3 (latent attention), gpt-oss, Llama 4 (the text model).

Sources: the classes of transformers 5, and torchtitan's models and state dict adapters of these families, of 0.2 and
0.3. Our names are torchtitan 0.2's: experts are stacked, [experts, out, in]; gpt-oss interleaves the rows of gate and
up.
"""

from __future__ import annotations

from collections.abc import Sequence

from milepost.interop.names.config_family import (
    ConfigFamily,
    ConfigValues,
    Line,
    attention_sizes,
    config_family,
    in_layer,
)
from milepost.interop.names.hub_dense import ATTENTION, EMBEDDING, HEAD, NORMS, QKV_BIASES
from milepost.interop.names.rules import Op, Parameter, Slice
from milepost.interop.names.sizes import Sizes
from milepost.interop.names.torchtitan import torchtitan_schemes

_SHAPES = {"w1": "experts expert_hidden dim", "w2": "experts dim expert_hidden", "w3": "experts expert_hidden dim"}


def _experts(
    theirs: Sequence[str], op: Op = Op.SAME, gate: Slice | None = None, up: Slice | None = None
) -> tuple[Line, ...]:
    """Define the experts; ``theirs`` are Hugging Face's names for ``w1``, ``w2`` and ``w3``."""
    parts = (gate, None, up)
    return tuple(
        in_layer(f"moe.experts.{ours}", shape, name, op, part=part, layers="moe")
        for (ours, shape), name, part in zip(_SHAPES.items(), theirs, parts, strict=True)
    )


def _gated(ours: str, theirs: str, hidden: str, *, layers: str, when: str = "") -> tuple[Line, ...]:
    """Define a gated feed-forward with one matrix per projection."""
    lines = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    return tuple(
        in_layer(
            f"{ours}.{our}.weight",
            f"dim {hidden}" if our == "w2" else f"{hidden} dim",
            f"{theirs}.{their}.weight",
            layers=layers,
            when=when,
        )
        for our, their in lines
    )


def _parameters(lines: Sequence[Line]) -> tuple[Parameter, ...]:
    return tuple(entry.parameter for entry in lines)


# ---- DeepSeek-V3 ----

_DEEPSEEK_V3 = (
    EMBEDDING,
    in_layer("attention.wq.weight", "q_rows dim", "self_attn.q_proj.weight", when="full queries"),
    in_layer("attention.wq_a.weight", "q_lora dim", "self_attn.q_a_proj.weight", when="latent queries"),
    in_layer("attention.q_norm.weight", "q_lora", "self_attn.q_a_layernorm.weight", when="latent queries"),
    in_layer("attention.wq_b.weight", "q_rows q_lora", "self_attn.q_b_proj.weight", when="latent queries"),
    in_layer("attention.wkv_a.weight", "kv_a_rows dim", "self_attn.kv_a_proj_with_mqa.weight"),
    in_layer("attention.kv_norm.weight", "kv_lora", "self_attn.kv_a_layernorm.weight"),
    in_layer("attention.wkv_b.weight", "kv_b_rows kv_lora", "self_attn.kv_b_proj.weight"),
    in_layer("attention.wo.weight", "dim v_rows", "self_attn.o_proj.weight"),
    *_gated("feed_forward", "mlp", "hidden", layers="dense"),
    in_layer("moe.router.gate.weight", "experts dim", "mlp.gate.weight", layers="moe"),
    in_layer("moe.expert_bias", "experts", "mlp.gate.e_score_correction_bias", layers="moe"),
    *_experts([f"mlp.experts.{{expert}}.{name}.weight" for name in ("gate_proj", "down_proj", "up_proj")]),
    *_gated("moe.shared_experts", "mlp.shared_experts", "shared_hidden", layers="moe", when="shared experts"),
    *NORMS,
    *HEAD,
)
_STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.experts.gate_up_proj")
_GATE_ROWS, _UP_ROWS = (Slice(index, ("expert_hidden", "expert_hidden")) for index in range(2))


def _deepseek_v3(config: ConfigValues) -> Sizes:
    heads, latent = config.number("num_attention_heads"), config.number("kv_lora_rank")
    nope, rope, v = (config.number(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    num_layers, num_dense = config.count("num_hidden_layers"), config.count("first_k_dense_replace", 0)
    hidden, num_shared = config.number("moe_intermediate_size"), config.count("n_shared_experts", 0)
    has_latent_queries = config.has("q_lora_rank")
    more = {
        "q_lora": config.number("q_lora_rank", 1),
        "q_rows": heads * (nope + rope),
        "kv_lora": latent,
        "kv_a_rows": latent + rope,
        "kv_b_rows": heads * (nope + v),
        "v_rows": heads * v,
        "experts": config.count("n_routed_experts"),
        "expert_hidden": hidden,
        "shared_hidden": num_shared * hidden,
    }
    kinds = {
        "dense": range(min(num_dense, num_layers)),
        "moe": range(num_dense, num_layers),
        # Layers that predict further tokens, which transformers' class also lacks.
        "beyond": range(num_layers, num_layers + config.count("num_nextn_predict_layers", 0)),
    }
    features = ["latent queries" if has_latent_queries else "full queries", *["shared experts"][: min(num_shared, 1)]]
    return attention_sizes(config, more, kinds=kinds, features=features)


DEEPSEEK_V3 = config_family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _DEEPSEEK_V3,
    _deepseek_v3,
    variants={"hf-stacked": _experts(_STACKED, Op.SAME, _GATE_ROWS, _UP_ROWS)},
    beside=("model.layers.{layer}.",),
    others=torchtitan_schemes(_parameters(_DEEPSEEK_V3), has_qkv_linear=False, transposes_experts=False),
)

# ---- gpt-oss ----

_GPT_OSS = (
    EMBEDDING,
    *ATTENTION,
    *QKV_BIASES,
    in_layer("attention.wo.bias", "dim", "self_attn.o_proj.bias"),
    in_layer("attention.sinks", "heads", "self_attn.sinks"),
    in_layer("moe.router.gate.weight", "experts dim", "mlp.router.weight"),
    in_layer("moe.router.gate.bias", "experts", "mlp.router.bias"),
    in_layer("moe.experts.mlp1_weight", "experts gate_up dim", "mlp.experts.gate_up_proj", Op.TRANSPOSED),
    in_layer("moe.experts.mlp1_bias", "experts gate_up", "mlp.experts.gate_up_proj_bias"),
    in_layer("moe.experts.mlp2_weight", "experts dim expert_hidden", "mlp.experts.down_proj", Op.TRANSPOSED),
    in_layer("moe.experts.mlp2_bias", "experts dim", "mlp.experts.down_proj_bias"),
    *NORMS,
    *HEAD,
)


def _gpt_oss(config: ConfigValues) -> Sizes:
    hidden = config.number("intermediate_size")
    more = {
        "heads": config.number("num_attention_heads"),
        "experts": config.count("num_local_experts"),
        "expert_hidden": hidden,
        "gate_up": 2 * hidden,
    }
    return attention_sizes(config, more)


GPT_OSS = config_family(
    "gpt_oss",
    "GptOssForCausalLM",
    _GPT_OSS,
    _gpt_oss,
    others=torchtitan_schemes(_parameters(_GPT_OSS), transposes_experts=False),
    defaults={"head_dim": 64},
)

# ---- Llama 4 ----

_GATE_COLUMNS, _UP_COLUMNS = (Slice(index, ("expert_hidden", "expert_hidden"), -1) for index in range(2))
_LLAMA4 = (
    EMBEDDING,
    *ATTENTION,
    *_gated("feed_forward", "feed_forward", "hidden", layers="dense"),
    in_layer("moe.router.gate.weight", "experts dim", "feed_forward.router.weight", layers="moe"),
    *_experts(
        ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", "feed_forward.experts.gate_up_proj"),
        Op.TRANSPOSED,
        _GATE_COLUMNS,
        _UP_COLUMNS,
    ),
    *_gated("moe.shared_experts", "feed_forward.shared_expert", "expert_hidden", layers="moe"),
    *NORMS,
    *HEAD,
)


def _llama4(config: ConfigValues) -> Sizes:
    num_layers, step = config.count("num_hidden_layers"), config.count("interleave_moe_layer_step", 1)
    said = config.numbers("moe_layers", num_layers)
    moe = tuple(range(step - 1, num_layers, step)) if said is None else said
    more = {
        "hidden": config.number("intermediate_size_mlp"),
        "expert_hidden": config.number("intermediate_size"),
        "experts": config.count("num_local_experts"),
    }
    kinds = {"moe": moe, "dense": tuple(layer for layer in range(num_layers) if layer not in set(moe))}
    return attention_sizes(config, more, kinds=kinds)


LLAMA4 = config_family(
    "llama4",
    "Llama4ForCausalLM",
    _LLAMA4,
    _llama4,
    model_types=("llama4_text", "llama4"),
    inside=("language_model.",),
    beside=("vision_model.", "multi_modal_projector."),
    others=torchtitan_schemes(_parameters(_LLAMA4), transposes_experts=False),
    defaults={"head_dim": 128},
)

EXPERTS: tuple[ConfigFamily, ...] = (DEEPSEEK_V3, GPT_OSS, LLAMA4)
