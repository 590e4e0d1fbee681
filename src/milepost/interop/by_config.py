"""Identify models of families that the trainer does not train, from a ``config.json``.

The config is that of the source, of ``--hf-assets``, or the one recorded in the checkpoint by a conversion, so that
converting back needs no options.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from milepost.errors import ConfigError, ConversionError
from milepost.format.huggingface import CONFIG_NAME
from milepost.interop.hf.config import with_dtype
from milepost.interop.hf.extras import HfExtras, lent_extras, main_dtype
from milepost.interop.names.config_family import ConfigFamily, read_sizes
from milepost.interop.names.families import CONFIG_FAMILIES, config_family_named, config_family_of
from milepost.interop.names.identity import CUSTOM, RECORD
from milepost.interop.names.sizes import Sizes
from milepost.interop.options import DEFAULT_SHARD_NBYTES, HUB, ConvertOptions
from milepost.interop.weights.boxes import TensorInfo
from milepost.interop.weights.open import Weights, read_config

_MAX_RECORD_NBYTES = 1 << 20
"""A larger config (with a list of labels) is not recorded."""
_OF_THE_LARGER = ("quantization_config", "vision_config", "text_config")


@dataclass(frozen=True, slots=True)
class Described:
    """A model of a family, with the sizes in ``config`` (of the text model, not quantized)."""

    family: ConfigFamily
    sizes: Sizes
    config: Mapping[str, Any]
    flavor: str = CUSTOM

    @property
    def name(self) -> str:
        """The family's name."""
        return self.family.name

    def record(self) -> dict[str, Any]:
        """Return the record for a manifest, read by :func:`described_by`."""
        config = dict(self.config)
        if len(json.dumps(config)) > _MAX_RECORD_NBYTES:
            return {"name": self.name, "flavor": self.flavor}
        return {"name": self.name, "flavor": self.flavor, "config": config}

    def extras(self, tensors: Mapping[str, TensorInfo], weights: Weights, options: ConvertOptions) -> HfExtras:
        """Return the files beside ``tensors`` in a Hugging Face folder, split by the assets' index if possible.

        Raises:
            ConversionError, CheckpointDamagedError: see :func:`lent_extras`.
        """
        config = with_dtype(self.config, main_dtype(tensors)) | {"architectures": [self.family.architecture]}
        folder = os.fspath(options.hf_assets)
        if not folder and weights.config is not None:
            folder = weights.source.path
        if not folder:
            return HfExtras(config=config, max_shard_nbytes=options.max_shard_nbytes or DEFAULT_SHARD_NBYTES)
        lent = lent_extras(folder, None, options.max_shard_nbytes, lends_index=bool(options.hf_assets), config=config)
        places_all = options.max_shard_nbytes is None and all(key in lent.weight_map for key in tensors)
        return replace(lent, weight_map=lent.weight_map if places_all else {})


def described_by(weights: Weights, options: ConvertOptions) -> Described | None:
    """Return the model of ``weights``, if it was requested or recorded as one of these families.

    Raises:
        ConfigError: there is no config with the sizes.
        ConversionError: a config describes another model, or lacks sizes.
    """
    recorded = weights.manifest.extra.get(RECORD) if weights.manifest is not None else None
    name = recorded.get("name") if isinstance(recorded, Mapping) else None
    family = CONFIG_FAMILIES.get(name) if isinstance(name, str) else None
    asked = config_family_named(options.model)
    path = weights.source.path
    if family is not None and options.model is not None and asked is not family:
        advice = "its keys have the trainer's names, " if options.model == HUB else ""
        raise ConversionError(f"{path} holds a {family.name} model: {advice}leave --model out", path=path)
    if family is None:
        if asked is None:
            return None
        family, recorded = asked, None
    source = sizes_in(family, weights.config, f"{path}/{CONFIG_NAME}")
    stored = sizes_in(family, recorded.get("config") if recorded is not None else None, path)
    assets = os.fspath(options.hf_assets)
    lent = sizes_in(family, read_config(assets) if assets else None, f"{assets}/{CONFIG_NAME}")
    found = lent or source or stored
    if found is None:
        raise ConfigError(
            f"{path} does not record the sizes of its {family.name} model: name a folder that has its "
            f"{CONFIG_NAME} with "
            "--hf-assets"
        )
    for other in (source, stored):
        if other is not None and (differences := _differences(found.sizes, other.sizes)):
            raise ConversionError(
                f"{assets}/{CONFIG_NAME} describes another model than {path}: {', '.join(differences)}",
                path=path,
                problems=differences,
            )
    return found


def sizes_in(family: ConfigFamily, config: Any, path: str) -> Described | None:
    """Read a config; None if there is none. Raises ConversionError if it describes another family, or lacks sizes."""
    if not isinstance(config, Mapping):
        return None
    text = config.get("text_config")
    inner = {**text} if isinstance(text, Mapping) else {**config}
    kind = config.get("model_type")
    if kind not in family.model_types and inner.get("model_type") not in family.model_types:
        other = config_family_of(config)
        hint = f"; --model {other.name} is that family" if other is not None else ""
        raise ConversionError(
            f"{path} describes another family: model_type is {kind!r:.100}, {family.name} is "
            f"{' or '.join(family.model_types)}{hint}",
            path=path,
        )
    for name in _OF_THE_LARGER:
        inner.pop(name, None)
    inner["model_type"] = family.model_types[0]
    return Described(family, read_sizes(family, inner, path), inner)


def _differences(found: Sizes, other: Sizes) -> list[str]:
    """List the differences between two models of one family, except the vocabulary."""
    pairs = [(name, found.named.get(name), other.named.get(name)) for name in found.named if name != "vocab"]
    pairs += [
        (name, getattr(found, name), getattr(other, name))
        for name in ("n_layers", "n_heads", "n_kv_heads", "tied_embeddings", "kinds", "features")
    ]
    return [f"{name} {one} instead of {two}" for name, one, two in pairs if one != two]
