"""Llama 3, 3.1 and 3.2: our parameters (Meta's names) and Hugging Face's names for them.

Sources: Meta's published ``consolidated.*.pth`` and ``LlamaForCausalLM`` of transformers.
"""

from __future__ import annotations

from milepost.interop.names.rules import Op, Parameter, Row, Scheme

PARAMETERS = (
    Parameter("tok_embeddings.weight", ("vocab", "dim")),
    Parameter("layers.{layer}.attention.wq.weight", ("q_rows", "dim")),
    Parameter("layers.{layer}.attention.wk.weight", ("kv_rows", "dim")),
    Parameter("layers.{layer}.attention.wv.weight", ("kv_rows", "dim")),
    Parameter("layers.{layer}.attention.wo.weight", ("dim", "q_rows")),
    Parameter("layers.{layer}.feed_forward.w1.weight", ("hidden", "dim")),
    Parameter("layers.{layer}.feed_forward.w2.weight", ("dim", "hidden")),
    Parameter("layers.{layer}.feed_forward.w3.weight", ("hidden", "dim")),
    Parameter("layers.{layer}.attention_norm.weight", ("dim",)),
    Parameter("layers.{layer}.ffn_norm.weight", ("dim",)),
    Parameter("norm.weight", ("dim",)),
    Parameter("output.weight", ("vocab", "dim")),
)

HF = Scheme(
    "hf",
    rows=(
        Row("tok_embeddings.weight", "model.embed_tokens.weight"),
        # Hugging Face rotates channel i with i + head_dim / 2, Meta each pair of neighbours.
        Row("layers.{layer}.attention.wq.weight", "model.layers.{layer}.self_attn.q_proj.weight", Op.TO_PAIRS),
        Row("layers.{layer}.attention.wk.weight", "model.layers.{layer}.self_attn.k_proj.weight", Op.TO_PAIRS),
        Row("layers.{layer}.attention.wv.weight", "model.layers.{layer}.self_attn.v_proj.weight"),
        Row("layers.{layer}.attention.wo.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
        Row("layers.{layer}.feed_forward.w1.weight", "model.layers.{layer}.mlp.gate_proj.weight"),
        Row("layers.{layer}.feed_forward.w2.weight", "model.layers.{layer}.mlp.down_proj.weight"),
        Row("layers.{layer}.feed_forward.w3.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        Row("layers.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
        Row("layers.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
        Row("norm.weight", "model.norm.weight"),
        Row("output.weight", "lm_head.weight"),
    ),
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    tied_output="lm_head.weight",
)
