"""The model of a checkpoint, as recorded in its manifest: name, flavor and all sizes. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from milepost.errors import ConfigError
from milepost.format.typed_json import as_type
from milepost.interop.names.model_sizes import MODEL_NAMES, ModelArgs, model_args, model_flavors

RECORD = "model"
"""Name of the record in a manifest's ``extra``."""

CUSTOM = "custom"
"""The flavor for sizes that match no known flavor."""

_MAX_SIZE = 1 << 31
_MAX_COUNT = 1 << 14
"""Maximum number of layers and of experts: tables grow with them, so a hostile record must not request billions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """A model by name and flavor, with its actual sizes and settings."""

    name: str
    flavor: str
    sizes: ModelArgs

    def __str__(self) -> str:
        return f"{self.name} {self.flavor}"

    def record(self) -> dict[str, Any]:
        """Return the record for a manifest's ``extra``."""
        return {"name": self.name, "flavor": self.flavor, "sizes": asdict(self.sizes)}

    @classmethod
    def recorded(cls, extra: Mapping[str, Any]) -> ModelIdentity | None:
        """Read the model from a manifest's ``extra``; None if there is none, or it is invalid."""
        said = extra.get(RECORD)
        if not isinstance(said, Mapping):
            return None
        name, flavor = said.get("name"), said.get("flavor")
        if name not in MODEL_NAMES or not isinstance(flavor, str):
            return None
        try:
            sizes = as_type(said["sizes"], ModelArgs) if "sizes" in said else model_args(name, flavor)
        except (ConfigError, msgspec.ValidationError):
            return None
        return cls(name=name, flavor=flavor, sizes=sizes) if are_possible(sizes) else None


def are_possible(sizes: ModelArgs) -> bool:
    """Return whether all numbers are positive and plausible."""
    numbers = [sizes.dim, sizes.n_heads, sizes.n_kv_heads, sizes.head_dim, sizes.hidden_dim, sizes.vocab_size]
    counts, settings = [sizes.n_layers], [sizes.rope_theta, sizes.norm_eps]
    if sizes.moe is not None:
        numbers.append(sizes.moe.hidden_dim)
        counts += [sizes.moe.num_experts, sizes.moe.top_k]
    if sizes.rope_scaling is not None:
        scaling = sizes.rope_scaling
        numbers.append(scaling.original_seq_len)
        settings += [scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor]
    return (
        all(0 < number < _MAX_SIZE for number in (*numbers, sizes.max_seq_len))
        and all(0 < count < _MAX_COUNT for count in counts)
        and all(math.isfinite(setting) and setting > 0 for setting in settings)
    )


_WEIGHTS_DEPEND_ON = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "hidden_dim",
    "vocab_size",
    "tied_embeddings",
)


def size_differences(found: ModelArgs, expected: ModelArgs) -> list[str]:
    """List differing sizes on which weights depend, such as ``n_layers 32 instead of 16``."""
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in _WEIGHTS_DEPEND_ON]
    if found.moe is not None and expected.moe is not None:
        pairs = [pair for pair in pairs if pair[0] != "hidden_dim"]
        pairs.append(("num_experts", found.moe.num_experts, expected.moe.num_experts))
        pairs.append(("expert hidden_dim", found.moe.hidden_dim, expected.moe.hidden_dim))
    elif found.moe is not expected.moe:
        pairs.append(("experts", found.moe and found.moe.num_experts, expected.moe and expected.moe.num_experts))
    return [f"{name} {one} instead of {other}" for name, one, other in pairs if one != other]


def flavor_of(name: str, sizes: ModelArgs) -> str:
    """Return the flavor with these sizes, ignoring the vocabulary; ``custom`` if there is none."""
    for flavor in model_flavors(name):
        if not size_differences(replace(model_args(name, flavor), vocab_size=sizes.vocab_size), sizes):
            return flavor
    return CUSTOM


def with_settings(sizes: ModelArgs, of: ModelArgs) -> tuple[ModelArgs, list[str]]:
    """Return ``sizes`` with another model's settings that don't affect weights (RoPE, norm, context), and the
    changes."""
    names = ("rope_theta", "rope_scaling", "norm_eps", "max_seq_len")
    changed = {name: getattr(of, name) for name in names if getattr(of, name) != getattr(sizes, name)}
    words = [f"{name} {_shown(value)} instead of {_shown(getattr(sizes, name))}" for name, value in changed.items()]
    return replace(sizes, **changed), words


def _shown(value: Any) -> str:
    return f"by {value.factor:g} from {value.original_seq_len}" if hasattr(value, "factor") else str(value or "none")
