"""Dense families of the hub: Mistral, Qwen 2 and 2.5, OLMo 2, Phi 3 and 4, Gemma 3 (the text model).

Source: the classes of transformers 5. Rows of the query and key projections stay in Hugging Face's order (halves),
except for Mistral, whose own files have Meta's.
"""

from __future__ import annotations

from milepost.interop.names.config_family import ConfigFamily, attention_sizes, config_family, in_layer, line
from milepost.interop.names.rules import Op, Slice

EMBEDDING = line("tok_embeddings.weight", "vocab dim", "model.embed_tokens.weight")
HEAD = (
    line("norm.weight", "dim", "model.norm.weight"),
    line("output.weight", "vocab dim", "lm_head.weight"),
)
WO = in_layer("attention.wo.weight", "dim q_rows", "self_attn.o_proj.weight")
ATTENTION = (
    in_layer("attention.wq.weight", "q_rows dim", "self_attn.q_proj.weight"),
    in_layer("attention.wk.weight", "kv_rows dim", "self_attn.k_proj.weight"),
    in_layer("attention.wv.weight", "kv_rows dim", "self_attn.v_proj.weight"),
    WO,
)
QKV_BIASES = (
    in_layer("attention.wq.bias", "q_rows", "self_attn.q_proj.bias"),
    in_layer("attention.wk.bias", "kv_rows", "self_attn.k_proj.bias"),
    in_layer("attention.wv.bias", "kv_rows", "self_attn.v_proj.bias"),
)
W2 = in_layer("feed_forward.w2.weight", "dim hidden", "mlp.down_proj.weight")
MLP = (
    in_layer("feed_forward.w1.weight", "hidden dim", "mlp.gate_proj.weight"),
    W2,
    in_layer("feed_forward.w3.weight", "hidden dim", "mlp.up_proj.weight"),
)
NORMS = (
    in_layer("attention_norm.weight", "dim", "input_layernorm.weight"),
    in_layer("ffn_norm.weight", "dim", "post_attention_layernorm.weight"),
)

MISTRAL = config_family(
    "mistral",
    "MistralForCausalLM",
    (
        EMBEDDING,
        in_layer("attention.wq.weight", "q_rows dim", "self_attn.q_proj.weight", Op.TO_PAIRS),
        in_layer("attention.wk.weight", "kv_rows dim", "self_attn.k_proj.weight", Op.TO_PAIRS),
        *ATTENTION[2:],
        *MLP,
        *NORMS,
        *HEAD,
    ),
    attention_sizes,
)

QWEN2 = config_family(
    "qwen2", "Qwen2ForCausalLM", (EMBEDDING, *ATTENTION, *QKV_BIASES, *MLP, *NORMS, *HEAD), attention_sizes
)

OLMO2 = config_family(
    "olmo2",
    "Olmo2ForCausalLM",
    (
        EMBEDDING,
        *ATTENTION,
        in_layer("attention.q_norm.weight", "q_rows", "self_attn.q_norm.weight"),
        in_layer("attention.k_norm.weight", "kv_rows", "self_attn.k_norm.weight"),
        *MLP,
        # Both norms follow the layers that they normalize.
        in_layer("post_attention_norm.weight", "dim", "post_attention_layernorm.weight"),
        in_layer("post_ffn_norm.weight", "dim", "post_feedforward_layernorm.weight"),
        *HEAD,
    ),
    attention_sizes,
)

_QKV = [Slice(index, ("q_rows", "kv_rows", "kv_rows")) for index in range(3)]
_GATE, _UP = (Slice(index, ("hidden", "hidden")) for index in range(2))

PHI3 = config_family(
    "phi3",
    "Phi3ForCausalLM",
    (
        EMBEDDING,
        in_layer("attention.wq.weight", "q_rows dim", "self_attn.qkv_proj.weight", part=_QKV[0]),
        in_layer("attention.wk.weight", "kv_rows dim", "self_attn.qkv_proj.weight", part=_QKV[1]),
        in_layer("attention.wv.weight", "kv_rows dim", "self_attn.qkv_proj.weight", part=_QKV[2]),
        WO,
        in_layer("feed_forward.w1.weight", "hidden dim", "mlp.gate_up_proj.weight", part=_GATE),
        W2,
        in_layer("feed_forward.w3.weight", "hidden dim", "mlp.gate_up_proj.weight", part=_UP),
        *NORMS,
        *HEAD,
    ),
    attention_sizes,
)

GEMMA3 = config_family(
    "gemma3",
    "Gemma3ForCausalLM",
    (
        EMBEDDING,
        *ATTENTION,
        in_layer("attention.q_norm.weight", "head_dim", "self_attn.q_norm.weight"),
        in_layer("attention.k_norm.weight", "head_dim", "self_attn.k_norm.weight"),
        *MLP,
        in_layer("attention_norm.weight", "dim", "input_layernorm.weight"),
        in_layer("post_attention_norm.weight", "dim", "post_attention_layernorm.weight"),
        in_layer("ffn_norm.weight", "dim", "pre_feedforward_layernorm.weight"),
        in_layer("post_ffn_norm.weight", "dim", "post_feedforward_layernorm.weight"),
        *HEAD,
    ),
    attention_sizes,
    model_types=("gemma3_text", "gemma3"),
    inside=("language_model.",),
    beside=("vision_tower.", "multi_modal_projector."),
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
)

DENSE: tuple[ConfigFamily, ...] = (MISTRAL, QWEN2, OLMO2, PHI3, GEMMA3)
