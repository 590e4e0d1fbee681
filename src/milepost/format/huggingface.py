"""A Hugging Face folder's files: names, and validated parsing of its JSON.

The content of a folder's JSON is copied into other files, printed and used for file names. So all text must be valid
Unicode, nesting is limited, and an index may only name plain files of weights beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from milepost.errors import FormatError
from milepost.format.tags import untagged

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


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The names of files of weights in one format."""

    suffix: str
    single: str
    """The file of a model that is not split."""
    index: str
    shard: re.Pattern[str]
    """One of several files: its number and their count."""
    adapter: str

    def are_in(self, names: Collection[str]) -> bool:
        """Return whether a folder has such files of a whole model, by name."""
        known = (self.single, self.index)
        return any(name in known or self.shard.fullmatch(name) is not None for name in map(untagged, names))

    def unindexed(self, names: Collection[str]) -> list[str]:
        """Return the files of weights of a folder without an index; a numbered file determines their number."""
        found = sorted(name for name in names if name.endswith(self.suffix))
        if self.single in found:
            return [self.single]
        count = next(iter(self.numbered(found).values()), 0)
        if count:
            return [self._shard_name(index, count) for index in range(1, count + 1)]
        if self is SAFETENSORS:
            return found
        return [name for name in found if name == self.adapter]  # anything may be called .bin

    def numbered(self, names: Collection[str]) -> dict[str, int]:
        """Return the parts of split models among ``names``, each with the count of its model's files."""
        matches = {name: self.shard.fullmatch(name) for name in sorted(names)}
        return {name: int(match[2]) for name, match in matches.items() if match is not None}

    def is_valid(self, name: str) -> bool:
        """Return whether ``name`` is valid for a file of weights: a plain name that no shell takes for an option."""
        return (
            name.endswith(self.suffix)
            and len(name) <= MAX_NAME_LENGTH
            and name[0] not in ".-"
            and name.isprintable()
            and not set(name) & set("/\\")
        )

    def _shard_name(self, index: int, count: int) -> str:
        return f"{self.single.removesuffix(self.suffix)}-{index:05d}-of-{count:05d}{self.suffix}"


SAFETENSORS = WeightFiles(
    suffix=".safetensors",
    single=SINGLE_NAME,
    index=INDEX_NAME,
    shard=re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors"),
    adapter=ADAPTER_NAME,
)
TORCH_FILES = WeightFiles(
    suffix=".bin",
    single="pytorch_model.bin",
    index="pytorch_model.bin.index.json",
    shard=re.compile(r"pytorch_model-(\d{5})-of-(\d{5})\.bin"),
    adapter="adapter_model.bin",
)
"""Files of ``torch.save``, which transformers wrote before it knew safetensors."""


def weight_files(names: Collection[str]) -> WeightFiles:
    """Return the format of a folder's weights: like transformers, safetensors if there are any."""
    if not SAFETENSORS.are_in(names):
        is_adapter = TORCH_FILES.adapter in names and not any(name.endswith(SAFETENSORS.suffix) for name in names)
        if is_adapter or TORCH_FILES.are_in(names):
            return TORCH_FILES
    return SAFETENSORS


def shard_file_name(index: int, count: int) -> str:
    """Return the name of file ``index`` (from 1) of ``count``."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"


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


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """The content of an index."""

    weight_map: Mapping[str, str]
    """Key -> file name."""
    total_nbytes: int | None
    """The size of all tensors, if it is stated; published ones are wrong at times."""


def parse_index(data: bytes, path: str, files: WeightFiles = SAFETENSORS) -> WeightIndex:
    """Parse an index of ``files``. Raises FormatError if it is malformed."""
    content = parse_object(data, path)
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map is missing", path=path)
    for name in weight_map.values():
        if not isinstance(name, str) or not files.is_valid(name):
            kind = files.suffix.removeprefix(".")
            raise FormatError(f"{path} names {name!r:.200}: expected a {kind} file beside it", path=path)
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    is_number = isinstance(total, int | float) and not isinstance(total, bool) and math.isfinite(total)
    return WeightIndex(weight_map, int(total) if is_number and total is not None else None)


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
