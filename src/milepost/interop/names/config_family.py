"""Families whose sizes are told by a model's ``config.json``: how a table is written, and how sizes are read.

A table has one line a parameter: our name, its shape, and Hugging Face's name for it. The trainer trains none of these
models; our names are those that Meta's and torchtitan's models have.
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
"""Of layers and experts: tables are made of them, so a hostile config must not ask for billions."""
_MAX_EXPERTS = 1 << 20
"""Of all layers together: fifty times those of the largest published models."""


# ---- writing a table ----


@dataclass(frozen=True, slots=True)
class Line:
    """One parameter, ours and Hugging Face's."""

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
    """One parameter. ``shape`` names sizes, with spaces between; for the rest see ``Parameter`` and ``Row``."""
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
    """One parameter of each layer, by its names below the layer's."""
    ours, theirs = f"layers.{{layer}}.{ours}", f"model.layers.{{layer}}.{theirs}"
    return line(ours, shape, theirs, op, part=part, layers=layers, when=when)


@dataclass(frozen=True, slots=True)
class ConfigFamily:
    """A family of models of transformers with all that is needed to convert one."""

    name: str
    tables: Family
    model_types: tuple[str, ...]
    """``model_type`` of the text model's config; others are those of models that contain it."""
    architecture: str
    """The class of transformers that the converted weights are of."""
    read: Callable[[ConfigValues], Sizes]
    defaults: Mapping[str, Any]
    """What an entry means that published configs leave out: that of transformers' class."""

    def has_scheme(self, name: str) -> bool:
        """Return whether another program's names are known of it."""
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
    ignored: Sequence[str] = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    others: Sequence[Scheme] = (),
    defaults: Mapping[str, Any] | None = None,
) -> ConfigFamily:
    """Make a family of its table.

    ``variants``: lines in place of those of the same parameter, in other layouts that Hugging Face files have.
    ``inside``: prefixes of a larger model that the text model may be part of; ``beside``: what else that model has.
    ``others``: the names that other programs give our parameters.
    """
    parameters = tuple(entry.parameter for entry in lines)
    rows = tuple(entry.row for entry in lines)
    schemes = [_hf_scheme("hf", rows, ignored, beside)]
    for variant, changed in (variants or {}).items():
        replaced = {entry.row.ours: entry.row for entry in changed}
        schemes.append(_hf_scheme(variant, tuple(replaced.get(row.ours, row) for row in rows), ignored, beside))
    for prefix in inside:
        nested = tuple(Row(row.ours, prefix + row.theirs, row.op, row.part) for row in rows)
        schemes.append(_hf_scheme(f"hf, below {prefix}", nested, [prefix + key for key in ignored], beside, prefix))
    tables = Family(name, parameters, (own_scheme(parameters, "milepost"), *schemes, *others))
    return ConfigFamily(name, tables, tuple(model_types) or (name,), architecture, read, defaults or {})


def _hf_scheme(
    name: str, rows: tuple[Row, ...], ignored: Sequence[str], beside: Sequence[str], prefix: str = ""
) -> Scheme:
    return Scheme(name, rows, ignored=tuple(ignored), left_out=tuple(beside), tied_output=f"{prefix}lm_head.weight")


# ---- reading sizes ----


class ConfigValues:
    """A ``config.json`` that may hold anything. What is wrong with it is gathered in ``faults``."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self.faults: list[str] = []

    def number(self, name: str, default: int | None = None, *, least: int = 1, most: int = _MAX_SIZE) -> int:
        """A number from ``least`` to ``most`` (exclusive); ``default`` where there is none, or null."""
        value = self._config.get(name)
        if value is None:
            value = default
        if isinstance(value, int) and not isinstance(value, bool) and least <= value < most:
            return value
        self.faults.append(f"{name} is missing" if value is None else f"{name} is {value!r:.50}: expected a size")
        return 1

    def count(self, name: str, default: int | None = None) -> int:
        """A number of layers or experts; it may be 0 where that is the ``default``."""
        return self.number(name, default, least=0 if default == 0 else 1, most=_MAX_COUNT)

    def has(self, name: str) -> bool:
        """Return whether there is something other than null, zero, false or empty."""
        return bool(self._config.get(name))

    def is_true(self, name: str, default: bool = False) -> bool:
        """A switch; ``default`` where there is none, or null."""
        value = self._config.get(name)
        if value is None:
            value = default
        if not isinstance(value, bool):
            self.faults.append(f"{name} is {value!r:.50}: expected true or false")
        return value is True

    def numbers(self, name: str, below: int) -> tuple[int, ...] | None:
        """A list of numbers from 0 to ``below`` (exclusive); None where there is none, or null."""
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
    """The sizes that all decoders have, and ``more``."""
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
    """The sizes of the model of ``family`` that ``config`` describes.

    Raises:
        ConversionError: with everything that is missing in the config at ``path``, or is no size.
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
