"""The model family of a ``config.json``, by the transformers class that it names.

``classes.json`` is made by ``scripts/hf_classes.py`` from transformers' own tables, and is read only where a config
does not say its ``model_type`` itself.
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
    """The class of transformers that a ``config.json`` names."""
    named = config.get("architectures") if config is not None else None
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else None


def model_type(config: Mapping[str, Any] | None) -> str | None:
    """The family of models that a ``config.json`` is of, as transformers calls it; None if it names none.

    Of a class that the table does not have (a newer one, a repository's own) it is the name without what it ends in:
    ``acme`` of ``AcmeForCausalLM``.
    """
    said = config.get("model_type") if config is not None else None
    if isinstance(said, str) and said:
        return shortened(said, _MAX_NAME_LENGTH)
    named = architecture(config)
    if not named:
        return None
    return _families().get(named) or shortened(_HEAD.sub("", named) or named, _MAX_NAME_LENGTH).lower()


@cache
def _families() -> Mapping[str, str]:
    table = json.loads(files("milepost.interop.hf").joinpath("classes.json").read_text())
    return {name: family for family, names in table.items() for name in names}
