"""Qwen 3, dense: our parameters (torchtitan's names) and Hugging Face's names for them.

Our model rotates the halves of each head as Hugging Face's does, so no rows move. Source: ``Qwen3ForCausalLM`` of
transformers.
"""

from __future__ import annotations

from milepost.interop.names.rules import Parameter, Row, Scheme

ATTENTION_PARAMETERS = (
    Parameter("layers.{layer}.attention.wq.weight", ("q_rows", "dim")),
    Parameter("layers.{layer}.attention.wk.weight", ("kv_rows", "dim")),
    Parameter("layers.{layer}.attention.wv.weight", ("kv_rows", "dim")),
    Parameter("layers.{layer}.attention.wo.weight", ("dim", "q_rows")),
    Parameter("layers.{layer}.attention.q_norm.weight", ("head_dim",)),
    Parameter("layers.{layer}.attention.k_norm.weight", ("head_dim",)),
    Parameter("layers.{layer}.attention_norm.weight", ("dim",)),
    Parameter("layers.{layer}.ffn_norm.weight", ("dim",)),
)

PARAMETERS = (
    Parameter("tok_embeddings.weight", ("vocab", "dim")),
    *ATTENTION_PARAMETERS,
    Parameter("layers.{layer}.feed_forward.w1.weight", ("hidden", "dim")),
    Parameter("layers.{layer}.feed_forward.w2.weight", ("dim", "hidden")),
    Parameter("layers.{layer}.feed_forward.w3.weight", ("hidden", "dim")),
    Parameter("norm.weight", ("dim",)),
    Parameter("output.weight", ("vocab", "dim")),
)

SHARED_ROWS = (
    Row("tok_embeddings.weight", "model.embed_tokens.weight"),
    Row("layers.{layer}.attention.wq.weight", "model.layers.{layer}.self_attn.q_proj.weight"),
    Row("layers.{layer}.attention.wk.weight", "model.layers.{layer}.self_attn.k_proj.weight"),
    Row("layers.{layer}.attention.wv.weight", "model.layers.{layer}.self_attn.v_proj.weight"),
    Row("layers.{layer}.attention.wo.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
    Row("layers.{layer}.attention.q_norm.weight", "model.layers.{layer}.self_attn.q_norm.weight"),
    Row("layers.{layer}.attention.k_norm.weight", "model.layers.{layer}.self_attn.k_norm.weight"),
    Row("layers.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    Row("layers.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    Row("norm.weight", "model.norm.weight"),
    Row("output.weight", "lm_head.weight"),
)
"""The rows common to dense and MoE models."""

HF = Scheme(
    "hf",
    rows=(
        *SHARED_ROWS,
        Row("layers.{layer}.feed_forward.w1.weight", "model.layers.{layer}.mlp.gate_proj.weight"),
        Row("layers.{layer}.feed_forward.w2.weight", "model.layers.{layer}.mlp.down_proj.weight"),
        Row("layers.{layer}.feed_forward.w3.weight", "model.layers.{layer}.mlp.up_proj.weight"),
    ),
    ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    tied_output="lm_head.weight",
)
