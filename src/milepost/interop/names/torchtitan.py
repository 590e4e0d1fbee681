"""The parameter names of torchtitan's releases, relative to ours.

0.2 has Meta's names, as we do. 0.3 puts the projections below ``attention.qkv_linear``, calls the output ``lm_head``
and the experts ``moe.routed_experts.inner_experts.w1_EFD``; checkpoints from between the releases hold a fused
``wqkv``, and either name of the output. torchtitan loads strictly, so tensors that only its modules have (the load
balancing bias of the experts, the tied output) are written too. Sources: the state dict adapters, ``FusedQKVLinear``
and ``MoE`` of torchtitan 0.2.2 and 0.3.0.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

from milepost.interop.names.rules import Constant, Op, Parameter, QkvGroup, Row, Scheme

OPTIMIZER_NAMES = {"torchtitan-0.3": "torchtitan between releases (wqkv, lm_head, experts as in 0.3)"}
"""A release whose optimizers use other names than its models: projections are fused, and split when it saves the
model."""

_ATTENTION = "layers.{layer}.attention."
_EXPERTS = "layers.{layer}.moe.experts."
_INNER_EXPERTS = "layers.{layer}.moe.routed_experts.inner_experts."
_BIAS = "layers.{layer}.moe.expert_bias"
_EXPERTS_03 = {
    f"{_EXPERTS}{ours}": f"{_INNER_EXPERTS}{theirs}"
    for ours, theirs in (
        ("w1", "w1_EFD"),
        ("w2", "w2_EDF"),
        ("w3", "w3_EFD"),
        ("mlp1_weight", "mlp1_weight_EGD"),
        ("mlp1_bias", "mlp1_bias_EG"),
        ("mlp2_weight", "mlp2_weight_EDF"),
        ("mlp2_bias", "mlp2_bias_ED"),
    )
} | {_BIAS: f"{_BIAS}_E"}
_MATRICES = tuple(f"{_EXPERTS}{weight}" for weight in ("w1", "w2", "w3"))
_SEPARATE_QKV = {
    f"{_ATTENTION}w{part}.{kind}": f"{_ATTENTION}qkv_linear.w{part}.{kind}"
    for part in "qkv"
    for kind in ("weight", "bias")
}
_FUSED_QKV = {
    f"{_ATTENTION}w{part}.{kind}": Row(
        f"{_ATTENTION}w{part}.{kind}", f"{_ATTENTION}qkv_linear.wqkv.{kind}", part=QkvGroup(part)
    )
    for part in "qkv"
    for kind in ("weight", "bias")
}


def own_scheme(parameters: Sequence[Parameter], name: str, *, writes_tied_output: bool = False) -> Scheme:
    """Return our own names, which are Meta's and torchtitan 0.2's."""
    return Scheme(
        name,
        tuple(Row(p.key, p.key) for p in parameters),
        ignored=("rope.freqs", "freqs_cis"),
        tied_output="output.weight",
        writes_tied_output=writes_tied_output,
    )


def torchtitan_schemes(
    parameters: Sequence[Parameter], *, has_qkv_linear: bool = True, transposes_experts: bool = True
) -> tuple[Scheme, ...]:
    """Return ``torchtitan-0.2``, ``torchtitan-0.3``, and the names in use between the two (for reading).

    ``has_qkv_linear``: attention projections (except latent attention's) are below that name. ``transposes_experts``:
    their [experts, out, in] is our [experts, in, out].
    """
    separate = _SEPARATE_QKV if has_qkv_linear else {}
    make = partial(_scheme, parameters=parameters, transposed=_MATRICES if transposes_experts else ())
    releases = (
        make("torchtitan-0.2", names={}),
        make("torchtitan-0.3", names={**separate, **_EXPERTS_03, "output.weight": "lm_head.weight"}),
    )
    between = []
    for fused, output, experts in itertools.product(
        (True, False) if has_qkv_linear else (False,), ("output", "lm_head"), ({}, _EXPERTS_03)
    ):
        projections = "wqkv" if fused else "qkv_linear"
        release = "0.3" if experts else "0.2"
        between.append(
            make(
                f"torchtitan between releases ({projections}, {output}, experts as in {release})",
                names={**({} if fused else separate), **experts, "output.weight": f"{output}.weight"},
                fused=fused,
            )
        )
    return (*releases, *between)


def _scheme(
    name: str,
    *,
    parameters: Sequence[Parameter],
    names: Mapping[str, str],
    transposed: Sequence[str],
    fused: bool = False,
) -> Scheme:
    fused_rows = _FUSED_QKV if fused else {}
    rows = []
    for parameter in parameters:
        op = Op.TRANSPOSED if parameter.key in transposed else Op.SAME
        rows.append(fused_rows.get(parameter.key, Row(parameter.key, names.get(parameter.key, parameter.key), op)))
    keys = {parameter.key: parameter for parameter in parameters}
    experts = next((parameter for key, parameter in keys.items() if key.startswith(_EXPERTS)), None)
    constants: tuple[Constant, ...] = ()
    if experts is not None and _BIAS not in keys:
        constants = (Constant(names.get(_BIAS, _BIAS), ("experts",), "float32", experts.layers),)
    return Scheme(
        name,
        tuple(rows),
        constants=constants,
        tied_output=names.get("output.weight", "output.weight"),
        writes_tied_output=True,
    )
