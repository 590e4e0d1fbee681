"""Qwen 3 MoE: our parameters and Hugging Face's two ways to store the experts.

The published files hold one matrix for each expert; ``save_pretrained(save_original_format=False)`` of transformers 5
stacks the experts and puts gate over up. Source: ``Qwen3MoeForCausalLM`` and ``conversion_mapping.py`` of
transformers 5.
"""

from __future__ import annotations

from milepost.interop.names.qwen3 import ATTENTION_PARAMETERS, SHARED_ROWS
from milepost.interop.names.rules import Op, Parameter, Row, Scheme, Slice

PARAMETERS = (
    Parameter("tok_embeddings.weight", ("vocab", "dim")),
    *ATTENTION_PARAMETERS,
    Parameter("layers.{layer}.moe.router.gate.weight", ("experts", "dim")),
    Parameter("layers.{layer}.moe.experts.w1", ("experts", "dim", "expert_hidden")),
    Parameter("layers.{layer}.moe.experts.w2", ("experts", "expert_hidden", "dim")),
    Parameter("layers.{layer}.moe.experts.w3", ("experts", "dim", "expert_hidden")),
    Parameter("norm.weight", ("dim",)),
    Parameter("output.weight", ("vocab", "dim")),
)

_EXPERT = Op.TRANSPOSED  # ours are [in, out], theirs [out, in]
_GATE, _UP = (Slice(index, ("expert_hidden", "expert_hidden")) for index in range(2))
_ROUTER = Row("layers.{layer}.moe.router.gate.weight", "model.layers.{layer}.mlp.gate.weight")

HF = Scheme(
    "hf",
    rows=(
        *SHARED_ROWS,
        _ROUTER,
        Row("layers.{layer}.moe.experts.w1", "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", _EXPERT),
        Row("layers.{layer}.moe.experts.w2", "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", _EXPERT),
        Row("layers.{layer}.moe.experts.w3", "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", _EXPERT),
    ),
    tied_output="lm_head.weight",
)

HF_STACKED = Scheme(
    "hf-stacked",
    rows=(
        *SHARED_ROWS,
        _ROUTER,
        Row("layers.{layer}.moe.experts.w1", "model.layers.{layer}.mlp.experts.gate_up_proj", _EXPERT, _GATE),
        Row("layers.{layer}.moe.experts.w2", "model.layers.{layer}.mlp.experts.down_proj", _EXPERT),
        Row("layers.{layer}.moe.experts.w3", "model.layers.{layer}.mlp.experts.gate_up_proj", _EXPERT, _UP),
    ),
    tied_output="lm_head.weight",
)
