"""The parameter names of torchtitan's releases, relative to ours.

0.2 has Meta's names, as we do. 0.3 puts the projections below ``attention.qkv_linear``, calls the output ``lm_head``
and the experts ``moe.routed_experts.inner_experts.w1_EFD``; checkpoints from between the releases hold a fused
``wqkv``, and either name of the output. torchtitan loads strictly, so what its modules have beyond ours (the load
balancing bias of the experts, the tied output) is written too. Sources: the state dict adapters, ``FusedQKVLinear``
and ``MoE`` of torchtitan 0.2.2 and 0.3.0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from milepost.interop.names.rules import Constant, Op, Parameter, QkvGroup, Row, Scheme

OPTIMIZER_NAMES = {"torchtitan-0.3": "torchtitan between releases (wqkv, lm_head, experts as in 0.3)"}
"""Of a release whose optimizers have other names than its models: these are fused, and taken apart when it saves."""

_ATTENTION = "layers.{layer}.attention."
_EXPERTS_02 = {
    f"layers.{{layer}}.moe.experts.{weight}": f"layers.{{layer}}.moe.experts.{weight}" for weight in ("w1", "w2", "w3")
}
_EXPERTS_03 = {
    f"layers.{{layer}}.moe.experts.{ours}": f"layers.{{layer}}.moe.routed_experts.inner_experts.{theirs}"
    for ours, theirs in (("w1", "w1_EFD"), ("w2", "w2_EDF"), ("w3", "w3_EFD"))
}
_EXPERT = Op.TRANSPOSED  # torchtitan's experts are [experts, out, in], ours [experts, in, out]
_SEPARATE_QKV = {f"{_ATTENTION}{part}.weight": f"{_ATTENTION}qkv_linear.{part}.weight" for part in ("wq", "wk", "wv")}
_FUSED_QKV = tuple(
    Row(f"{_ATTENTION}w{part}.weight", f"{_ATTENTION}qkv_linear.wqkv.weight", part=QkvGroup(part)) for part in "qkv"
)


def own_scheme(parameters: Sequence[Parameter], name: str, *, writes_tied_output: bool = False) -> Scheme:
    """Our own names, which are Meta's and torchtitan 0.2's."""
    return Scheme(
        name,
        tuple(Row(p.key, p.key) for p in parameters),
        ignored=("rope.freqs", "freqs_cis"),
        tied_output="output.weight",
        writes_tied_output=writes_tied_output,
    )


def torchtitan_schemes(parameters: Sequence[Parameter]) -> tuple[Scheme, ...]:
    """``torchtitan-0.2`` and ``torchtitan-0.3``, then the names in use between the two (for reading)."""
    releases = (
        _scheme("torchtitan-0.2", parameters, {}, bias="expert_bias"),
        _scheme(
            "torchtitan-0.3",
            parameters,
            {**_SEPARATE_QKV, **_EXPERTS_03, "output.weight": "lm_head.weight"},
            bias="expert_bias_E",
        ),
    )
    between = []
    for fused, output, experts in itertools.product((True, False), ("output", "lm_head"), (_EXPERTS_02, _EXPERTS_03)):
        projections = "wqkv" if fused else "qkv_linear"
        release = "0.2" if experts is _EXPERTS_02 else "0.3"
        between.append(
            _scheme(
                f"torchtitan between releases ({projections}, {output}, experts as in {release})",
                parameters,
                {**({} if fused else _SEPARATE_QKV), **experts, "output.weight": f"{output}.weight"},
                fused=fused,
                bias="expert_bias" if experts is _EXPERTS_02 else "expert_bias_E",
            )
        )
    return (*releases, *between)


def _scheme(
    name: str, parameters: Sequence[Parameter], names: Mapping[str, str], *, bias: str, fused: bool = False
) -> Scheme:
    fused_rows = {row.ours: row for row in _FUSED_QKV} if fused else {}
    rows = []
    for parameter in parameters:
        op = _EXPERT if parameter.key in _EXPERTS_02 else Op.SAME
        rows.append(fused_rows.get(parameter.key, Row(parameter.key, names.get(parameter.key, parameter.key), op)))
    has_experts = any(parameter.key in _EXPERTS_02 for parameter in parameters)
    return Scheme(
        name,
        tuple(rows),
        constants=(Constant(f"layers.{{layer}}.moe.{bias}", ("experts",), "float32"),) if has_experts else (),
        tied_output=names.get("output.weight", "output.weight"),
        writes_tied_output=True,
    )
