"""The tables of each model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milepost.interop.names import llama3, qwen3, qwen3_moe
from milepost.interop.names.config_family import ConfigFamily
from milepost.interop.names.hub_dense import DENSE
from milepost.interop.names.hub_experts import EXPERTS
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.rules import OWN, Family
from milepost.interop.names.torchtitan import own_scheme, torchtitan_schemes

META = "meta"
"""The names in Meta's own files, which have an output projection even if it is tied."""

LLAMA3 = Family(
    "llama3",
    llama3.PARAMETERS,
    (
        own_scheme(llama3.PARAMETERS, OWN),
        llama3.HF,
        own_scheme(llama3.PARAMETERS, META, writes_tied_output=True),
        *torchtitan_schemes(llama3.PARAMETERS),
    ),
)
QWEN3 = Family(
    "qwen3",
    qwen3.PARAMETERS,
    (own_scheme(qwen3.PARAMETERS, OWN), qwen3.HF, *torchtitan_schemes(qwen3.PARAMETERS)),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    qwen3_moe.PARAMETERS,
    (
        own_scheme(qwen3_moe.PARAMETERS, OWN),
        qwen3_moe.HF,
        qwen3_moe.HF_STACKED,
        *torchtitan_schemes(qwen3_moe.PARAMETERS),
    ),
)


def family_of(model: str, args: ModelArgs) -> Family:
    """Return the tables of ``model`` (a name in ``model_sizes``) for the sizes ``args``."""
    if model == "llama3":
        return LLAMA3
    return QWEN3 if args.moe is None else QWEN3_MOE


CONFIG_FAMILIES: Mapping[str, ConfigFamily] = {family.name: family for family in (*DENSE, *EXPERTS)}
"""Families that the trainer does not train, with sizes from ``config.json``."""
ALSO_CALLED = {"qwen2.5": "qwen2", "phi4": "phi3"}
"""Model names that users know better than the family's name."""
FAMILIES: tuple[Family, ...] = (LLAMA3, QWEN3, QWEN3_MOE, *(family.tables for family in CONFIG_FAMILIES.values()))


def config_family_named(model: str | None) -> ConfigFamily | None:
    """Return the family ``model`` whose sizes come from ``config.json``; None if there is none."""
    return CONFIG_FAMILIES.get(ALSO_CALLED.get(model, model)) if model is not None else None


def config_family_of(config: Mapping[str, Any]) -> ConfigFamily | None:
    """Return the family of a ``config.json``, if the trainer does not train it."""
    kind = config.get("model_type")
    return next((family for family in CONFIG_FAMILIES.values() if kind in family.model_types), None)
