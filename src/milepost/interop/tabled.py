"""A model with tables and its sizes: as recorded in a source, or as named by the caller. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from milepost.errors import ConfigError, ConversionError, near
from milepost.format.huggingface import CONFIG_NAME
from milepost.interop.by_config import Described, sizes_in
from milepost.interop.hf.classes import architecture
from milepost.interop.hf.config import identity_of
from milepost.interop.names.families import (
    ALSO_CALLED,
    CONFIG_FAMILIES,
    config_family_named,
    config_family_of,
    family_of,
)
from milepost.interop.names.identity import CUSTOM, RECORD, ModelIdentity
from milepost.interop.names.model_sizes import MODEL_NAMES, ModelArgs, model_args
from milepost.interop.names.rules import Family
from milepost.interop.names.sizes import Sizes, sizes_of
from milepost.interop.weights.open import Weights, read_config

TABLED = (*MODEL_NAMES, *CONFIG_FAMILIES, *ALSO_CALLED)
"""Names of all models with tables."""
_BOTH = "--model and --flavor need each other: give both, or neither to compare keys as stored"


@dataclass(frozen=True, slots=True)
class Tabled:
    """A model: its name, its tables, and the sizes for them."""

    name: str
    tables: Family
    sizes: Sizes
    flavor: str = CUSTOM
    args: ModelArgs | None = None
    """All sizes and settings, for a model that Milepost trains."""

    def __str__(self) -> str:
        return f"{self.name} {self.flavor}" if self.args is not None else self.name

    @staticmethod
    def of_ours(name: str, sizes: ModelArgs, flavor: str = CUSTOM) -> Tabled:
        """A model that Milepost trains."""
        return Tabled(name, family_of(name, sizes), sizes_of(sizes), flavor, sizes)


def recorded_model(extra: Mapping[str, Any], config: Mapping[str, Any] | None, path: str) -> Tabled | None:
    """The model named by a manifest's ``extra`` or a ``config.json``, if it has tables.

    Raises:
        ConversionError: it is named, but sizes are missing or impossible.
    """
    identity = ModelIdentity.recorded(extra) or (identity_of(config) if config is not None else None)
    if identity is not None:
        return Tabled.of_ours(identity.name, identity.sizes, identity.flavor)
    record = extra.get(RECORD)
    name = record.get("name") if isinstance(record, Mapping) else None
    family = CONFIG_FAMILIES.get(name) if isinstance(name, str) else None
    if family is not None and isinstance(record, Mapping):
        return _tabled(sizes_in(family, record.get("config"), path))
    family = config_family_of(config) if config is not None else None
    return _tabled(sizes_in(family, config, f"{path}/{CONFIG_NAME}")) if family is not None else None


def model_of(weights: Weights) -> Tabled | None:
    """The model recorded in open weights. Raises like :func:`recorded_model`."""
    extra = weights.manifest.extra if weights.manifest is not None else {}
    return recorded_model(extra, weights.config, weights.source.path)


def model_as_asked(
    model: str | None, flavor: str | None, assets: str | os.PathLike[str], recorded: Iterable[Tabled | None]
) -> Tabled:
    """Return the model named by ``--model``, ``--flavor`` and ``--hf-assets``; its sizes may come from ``recorded``.

    Raises:
        ConfigError: there is no such model, or its sizes are recorded nowhere.
        ConversionError: the config in ``assets`` describes another model, or lacks sizes.
    """
    family = config_family_named(model)
    if model is None and (flavor is not None or not assets):
        raise ConfigError(_BOTH)
    if model is not None and model not in MODEL_NAMES and family is None:
        hint = near(model, TABLED, cutoff=0.4)
        did_you_mean = f"did you mean {hint!r}? " if hint is not None else ""
        raise ConfigError(f"--model {model}: there is no such family; {did_you_mean}choices: {', '.join(TABLED)}")
    if family is not None and flavor is not None:
        raise ConfigError(f"--model {model} takes no --flavor: it is in the config")
    if model is not None and flavor is not None:
        return Tabled.of_ours(model, model_args(model, flavor), flavor)
    name = family.name if family is not None else model
    if assets:
        return _lent(os.fspath(assets), name)
    chosen = next((one for one in recorded if one is not None and one.name == name), None)
    if chosen is None and family is None:
        raise ConfigError(_BOTH)
    if chosen is None:
        raise ConfigError(
            f"--model {model}: its sizes are recorded nowhere; name a folder that has its {CONFIG_NAME} with "
            "--hf-assets"
        )
    return chosen


def _lent(assets: str, name: str | None) -> Tabled:
    """The model of the config in ``assets``, which must be a ``name``, if there is one."""
    config = read_config(assets)
    found = recorded_model({}, config, assets)
    if config is None:
        raise ConfigError(f"--hf-assets {assets}: no {CONFIG_NAME} is there")
    if found is None or name not in (None, found.name):
        is_of = f"a {found}" if found is not None else f"{architecture(config) or 'a model'}, which has no tables"
        wanted = f", not of a {name}" if name is not None else f"; models with tables: {', '.join(TABLED)}"
        raise ConversionError(f"--hf-assets {assets} is of {is_of}{wanted}", path=assets)
    return found


def _tabled(described: Described | None) -> Tabled | None:
    if described is None:
        return None
    return Tabled(described.family.name, described.family.tables, described.sizes, described.flavor)
