"""Families whose sizes are in a model's ``config.json``: writing their tables, and reading sizes.

A table has one line per parameter: our name, its shape, and Hugging Face's name for it. The trainer does not train
these models; our names are those of Meta's and torchtitan's models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.errors import ConversionError
from milepost.interop.names.rules import Family, Op, Parameter, QkvGroup, Row, Scheme, Slice
from milepost.interop.names.sizes import Sizes
from milepost.interop.names.torchtitan import own_scheme

_MAX_SIZE = 1 << 31
_MAX_COUNT = 1 << 14
"""Maximum number of layers and of experts: tables grow with them, so a hostile config must not request billions."""
_MAX_EXPERTS = 1 << 20
"""Maximum number of experts in all layers together: fifty times that of the largest published models."""


# ---- writing a table ----


@dataclass(frozen=True, slots=True)
class Line:
    """One parameter, under our and Hugging Face's name."""

    parameter: Parameter
    row: Row


def line(
    ours: str,
    shape: str,
    theirs: str,
    op: Op = Op.SAME,
    *,
    part: Slice | QkvGroup | None = None,
    layers: str = "",
    when: str = "",
) -> Line:
    """Define one parameter. ``shape`` names sizes, separated by spaces; for the rest see ``Parameter`` and ``Row``."""
    return Line(Parameter(ours, tuple(shape.split()), layers, when), Row(ours, theirs, op, part))


def in_layer(
    ours: str,
    shape: str,
    theirs: str,
    op: Op = Op.SAME,
    *,
    part: Slice | QkvGroup | None = None,
    layers: str = "",
    when: str = "",
) -> Line:
    """Define one parameter of each layer, by its names below the layer's."""
    ours, theirs = f"layers.{{layer}}.{ours}", f"model.layers.{{layer}}.{theirs}"
    return line(ours, shape, theirs, op, part=part, layers=layers, when=when)


@dataclass(frozen=True, slots=True)
class ConfigFamily:
    """A family of transformers models, with everything needed to convert one."""

    name: str
    tables: Family
    model_types: tuple[str, ...]
    """``model_type`` of the text model's config; others are those of models that contain it."""
    architecture: str
    """The transformers class of the converted weights."""
    read: Callable[[ConfigValues], Sizes]
    defaults: Mapping[str, Any]
    """Defaults for entries missing in published configs, from transformers' class."""

    def has_scheme(self, name: str) -> bool:
        """Return whether another program's names for it are known."""
        return any(scheme.name == name for scheme in self.tables.schemes)


def config_family(
    name: str,
    architecture: str,
    lines: Sequence[Line],
    read: Callable[[ConfigValues], Sizes],
    *,
    model_types: Sequence[str] = (),
    variants: Mapping[str, Sequence[Line]] | None = None,
    inside: Sequence[str] = (),
    beside: Sequence[str] = (),
    others: Sequence[Scheme] = (),
    defaults: Mapping[str, Any] | None = None,
) -> ConfigFamily:
    """Build a family from its table.

    ``variants``: alternative lines for the same parameter, for other layouts of Hugging Face files. ``inside``:
    prefixes of a larger model that may contain the text model; ``beside``: other parts of that model. ``others``: other
    programs' names for our parameters.
    """
    parameters = tuple(entry.parameter for entry in lines)
    rows = tuple(entry.row for entry in lines)
    schemes = [_hf_scheme("hf", rows, beside)]
    for variant, changed in (variants or {}).items():
        replaced = {entry.row.ours: entry.row for entry in changed}
        schemes.append(_hf_scheme(variant, tuple(replaced.get(row.ours, row) for row in rows), beside))
    for prefix in inside:
        nested = tuple(Row(row.ours, prefix + row.theirs, row.op, row.part) for row in rows)
        schemes.append(_hf_scheme(f"hf, below {prefix}", nested, beside, prefix))
    tables = Family(name, parameters, (own_scheme(parameters, "milepost"), *schemes, *others))
    return ConfigFamily(name, tables, tuple(model_types) or (name,), architecture, read, defaults or {})


def _hf_scheme(name: str, rows: tuple[Row, ...], beside: Sequence[str], prefix: str = "") -> Scheme:
    ignored = (f"{prefix}model.layers.{{layer}}.self_attn.rotary_emb.inv_freq",)
    return Scheme(name, rows, ignored=ignored, left_out=tuple(beside), tied_output=f"{prefix}lm_head.weight")


# ---- reading sizes ----


class ConfigValues:
    """A ``config.json`` with untrusted content. Problems are collected in ``faults``."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self.faults: list[str] = []

    def number(self, name: str, default: int | None = None, *, least: int = 1, most: int = _MAX_SIZE) -> int:
        """Return a number from ``least`` to ``most`` (exclusive); ``default`` if missing or null."""
        value = self._config.get(name)
        if value is None:
            value = default
        if isinstance(value, int) and not isinstance(value, bool) and least <= value < most:
            return value
        self.faults.append(f"{name} is missing" if value is None else f"{name} is {value!r:.50}: expected a size")
        return 1

    def count(self, name: str, default: int | None = None) -> int:
        """Return a number of layers or experts; 0 is allowed if it is the ``default``."""
        return self.number(name, default, least=0 if default == 0 else 1, most=_MAX_COUNT)

    def has(self, name: str) -> bool:
        """Return whether the entry is present and not null, zero, false or empty."""
        return bool(self._config.get(name))

    def is_true(self, name: str) -> bool:
        """Return a boolean; False if missing or null."""
        value = self._config.get(name)
        if value is not None and not isinstance(value, bool):
            self.faults.append(f"{name} is {value!r:.50}: expected true or false")
        return value is True

    def numbers(self, name: str, below: int) -> tuple[int, ...] | None:
        """Return a list of numbers from 0 to ``below`` (exclusive); None if missing or null."""
        value = self._config.get(name)
        if value is None:
            return None
        if isinstance(value, list) and all(type(entry) is int and 0 <= entry < below for entry in value):
            return tuple(sorted(set(value)))
        self.faults.append(f"{name} is {value!r:.50}: expected numbers below {below}")
        return ()


def attention_sizes(
    config: ConfigValues,
    more: Mapping[str, int] | None = None,
    *,
    kinds: Mapping[str, Sequence[int]] | None = None,
    features: Sequence[str] = (),
) -> Sizes:
    """Return the sizes that all decoders have, and ``more``."""
    dim, heads = config.number("hidden_size"), config.number("num_attention_heads")
    kv_heads = config.number("num_key_value_heads", heads)
    width = config.number("head_dim", max(1, dim // heads))
    named = {
        "vocab": config.number("vocab_size"),
        "dim": dim,
        "head_dim": width,
        "q_rows": heads * width,
        "kv_rows": kv_heads * width,
        "hidden": config.number("intermediate_size"),
    }
    return Sizes(
        named={**named, **(more or {})},
        n_layers=config.count("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=width,
        tied_embeddings=config.is_true("tie_word_embeddings"),
        kinds=kinds or {},
        features=frozenset(features),
    )


def read_sizes(family: ConfigFamily, config: Mapping[str, Any], path: str) -> Sizes:
    """Read the sizes of the model of ``family`` described by ``config``.

    Raises:
        ConversionError: with all missing or invalid entries of the config at ``path``.
    """
    said = {name: value for name, value in config.items() if value is not None}
    values = ConfigValues({**family.defaults, **said})
    sizes = family.read(values)
    if sizes.n_layers * sizes.named.get("experts", 1) > _MAX_EXPERTS:
        values.faults.append(
            f"{sizes.n_layers} layers of {sizes.named['experts']} experts: more than any known model has"
        )
    if values.faults:
        raise ConversionError(
            f"{path} does not describe a {family.name} model:\n  " + "\n  ".join(values.faults),
            path=path,
            problems=values.faults,
        )
    return sizes
