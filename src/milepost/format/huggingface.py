"""A Hugging Face folder's files: names, and validated parsing of its JSON.

The content of a folder's JSON is copied into other files, printed and used for file names. So all text must be valid
Unicode, nesting is limited, and an index may only name plain safetensors files beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from milepost.errors import FormatError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
MAX_CONFIG_NBYTES = 16 << 20
MAX_INDEX_NBYTES = 128 << 20
"""Ten times the size of the largest public models' index."""
MAX_DEPTH = 64
MAX_NAME_LENGTH = 200

_SHARD_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def shard_file_name(index: int, count: int) -> str:
    """Return the name of file ``index`` (from 1) of ``count``."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def is_weights_name(name: str) -> bool:
    """Return True if ``name`` is valid for a file of weights: a plain name that no shell takes for an option."""
    return (
        name.endswith(".safetensors")
        and len(name) <= MAX_NAME_LENGTH
        and name[0] not in ".-"
        and name.isprintable()
        and not set(name) & set("/\\")
    )


def unindexed_files(names: Collection[str]) -> list[str]:
    """Return the weight files of a folder without an index; a numbered file determines their number."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if SINGLE_NAME in found:
        return [SINGLE_NAME]
    numbered = [match for name in found if (match := _SHARD_NAME.fullmatch(name))]
    if not numbered:
        return found
    count = int(numbered[0][2])
    return [shard_file_name(index, count) for index in range(1, count + 1)]


def parse_object(data: bytes, path: str) -> dict[str, Any]:
    """Parse the JSON object in ``data``. Raises FormatError for anything else; ``path`` is for the message."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: invalid JSON ({error!s:.200})", path=path) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found a {type(value).__name__}", path=path)
    _check_content(value, path)
    return value


def parse_weight_map(data: bytes, path: str) -> dict[str, str]:
    """Return key -> file name from the content of an index. Raises FormatError if it is malformed."""
    weight_map = parse_object(data, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map is missing", path=path)
    for name in weight_map.values():
        if not isinstance(name, str) or not is_weights_name(name):
            raise FormatError(f"{path} names {name!r:.200}: expected a safetensors file beside it", path=path)
    return weight_map


def _check_content(value: dict[str, Any], path: str) -> None:
    """Refuse nesting beyond Python's recursion limit, and text that can't be encoded."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                children += [*node, *node.values()]
            elif isinstance(node, list):
                children += node
            elif isinstance(node, str) and not _is_unicode(node):
                raise FormatError(f"{path}: a string in it is not valid Unicode ({node!a:.100})", path=path)
        if not children:
            return
        level = children
    raise FormatError(f"{path}: nested more than {MAX_DEPTH} levels deep", path=path)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
