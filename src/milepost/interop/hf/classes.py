"""The model family of a ``config.json``, by the transformers class that it names.

``classes.json`` is made by ``scripts/hf_classes.py`` from transformers' own tables, and is read only if a config has no
``model_type``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from milepost.errors import shortened

_MAX_NAME_LENGTH = 80
_HEAD = re.compile(r"(For[A-Z]\w*|LMHead\w*|DoubleHeads\w*|Text|Vision|Pre[Tt]rained)?(Model)?(WithProjection)?$")


def architecture(config: Mapping[str, Any] | None) -> str | None:
    """Return the transformers class named by a ``config.json``."""
    named = config.get("architectures") if config is not None else None
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else None


def model_type(config: Mapping[str, Any] | None) -> str | None:
    """Return the model family of a ``config.json``, by transformers' name; None if it names none.

    For a class not in the table (a newer or custom one) it is the class name without its suffix: ``acme`` of
    ``AcmeForCausalLM``.
    """
    said = config.get("model_type") if config is not None else None
    if isinstance(said, str) and said:
        return shortened(said, _MAX_NAME_LENGTH)
    named = architecture(config)
    if not named:
        return None
    return _families().get(named) or shortened(_HEAD.sub("", named) or named, _MAX_NAME_LENGTH).lower()


def is_known(name: str | None) -> bool:
    """Return whether ``name`` is a class of transformers, by its tables."""
    return name in _families()


@cache
def _families() -> Mapping[str, str]:
    table = json.loads(files("milepost.interop.hf").joinpath("classes.json").read_text())
    return {name: family for family, names in table.items() for name in names}
