"""Files beside the tensors of a Hugging Face folder: config, index, and the tokenizer's files of another folder.

That other folder (``--hf-assets``) may be untrusted. It is checked before anything is written: only files with known
names are copied, links may lead only into the hub's cache, and sizes are bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from milepost.errors import ConversionError, StorageError
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.huggingface import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_NBYTES,
    MAX_INDEX_NBYTES,
    SINGLE_NAME,
    parse_index,
    parse_object,
    shard_file_name,
)
from milepost.interop.hf.config import config_faults, make_config, with_dtype
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.options import DEFAULT_SHARD_NBYTES
from milepost.interop.weights.boxes import TensorInfo, total_nbytes
from milepost.interop.weights.dequantized import without_quantization
from milepost.storage import open_storage
from milepost.storage.base import join
from milepost.storage.links import open_linked, read_linked

_ASSETS = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|generation_config|preprocessor_config)"
    r"[A-Za-z0-9._-]*\.(json|txt|model|jinja)|(LICENSE|NOTICE|USE_POLICY)[A-Za-z0-9._-]*"
)
"""Files of an assets folder that are copied beside the weights."""
MAX_ASSET_NBYTES = 128 << 20
"""Three times the size of the largest published tokenizer."""
MAX_ASSETS = 64

_LIMITS = {CONFIG_NAME: MAX_CONFIG_NBYTES, INDEX_NAME: MAX_INDEX_NBYTES}


@dataclass(frozen=True, slots=True, kw_only=True)
class HfExtras:
    """Files beside the tensors of a Hugging Face folder."""

    config: Mapping[str, Any]
    folder: str = ""
    """A path or URL; empty: no assets folder."""
    assets: Sequence[str] = ()
    """Files of ``folder`` to copy unchanged."""
    made: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further files by name, as JSON; they override the folder's."""
    weight_map: Mapping[str, str] = field(default_factory=dict)
    """Key -> file, from an index; empty: split by size."""
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES

    def files(
        self, weights: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorInfo], *, has_index: bool = False
    ) -> Iterator[tuple[str, bytes]]:
        """Return name and content of all files except the tensors', which ``weights`` lists with their keys.

        ``has_index``: write an index even for a single file, if that has an unusual name.
        """
        if len(weights) > 1 or self.weight_map or has_index:
            yield INDEX_NAME, _json(_index(weights, tensors))
        yield CONFIG_NAME, _json(self.config)
        for name, value in self.made.items():
            yield name, _json(value)
        if self.folder:
            for name in (name for name in self.assets if name not in self.made):
                yield name, _read(self.folder, name)


def hf_extras(
    family: str,
    args: ModelArgs,
    tensors: Mapping[str, TensorInfo],
    folder: str,
    max_shard_nbytes: int | None,
) -> HfExtras:
    """Collect the files beside ``tensors``, from the assets in ``folder`` or created. A given size overrides its index.

    Raises:
        ConversionError: the config describes another model, or files of the folder can't be copied; with all faults.
        CheckpointDamagedError: its config or index is malformed.
    """
    dtype = main_dtype(tensors)
    assets = _assets_of(folder) if folder else []
    if CONFIG_NAME not in assets:
        config = make_config(family, args, dtype)
    else:
        # The output is not quantized, even if the folder's own weights are.
        config = without_quantization(parse_object(_read(folder, CONFIG_NAME), f"{folder}/{CONFIG_NAME}"))
        check_config(config, family, args, f"{folder}/{CONFIG_NAME}")
        config = with_dtype(config | {"vocab_size": args.vocab_size}, dtype)
    weight_map: Mapping[str, str] = {}
    if INDEX_NAME in assets and max_shard_nbytes is None:
        weight_map = parse_index(_read(folder, INDEX_NAME), f"{folder}/{INDEX_NAME}").weight_map
    return HfExtras(
        config=config,
        folder=folder,
        assets=[name for name in assets if name not in _LIMITS],
        weight_map=weight_map,
        max_shard_nbytes=max_shard_nbytes or DEFAULT_SHARD_NBYTES,
    )


def lent_extras(
    folder: str,
    dtype: str | None,
    max_shard_nbytes: int | None,
    *,
    lends_index: bool,
    config: Mapping[str, Any] | None = None,
) -> HfExtras:
    """Collect the files beside the tensors from ``folder``, for any model. ``dtype``: target of a cast.

    ``config`` replaces the folder's own, which then need not exist.

    Raises:
        ConversionError: there is no config, or files of the folder can't be copied; with all faults.
        CheckpointDamagedError: its config or index is malformed.
    """
    assets = _assets_of(folder)
    if config is None:
        if CONFIG_NAME not in assets:
            raise ConversionError(f"{folder} has no {CONFIG_NAME}: without it the model is unknown", path=folder)
        config = parse_object(_read(folder, CONFIG_NAME), f"{folder}/{CONFIG_NAME}")
    weight_map: Mapping[str, str] = {}
    if lends_index and INDEX_NAME in assets:
        weight_map = parse_index(_read(folder, INDEX_NAME), f"{folder}/{INDEX_NAME}").weight_map
    return HfExtras(
        config=config if dtype is None else with_dtype(config, dtype, with_parts=True),
        folder=folder,
        assets=[name for name in assets if name not in _LIMITS],
        weight_map=weight_map,
        max_shard_nbytes=max_shard_nbytes or DEFAULT_SHARD_NBYTES,
    )


def read_assets(folder: str) -> dict[str, bytes]:
    """Read the files of ``folder`` that belong beside weights, such as a tokenizer's, without config and index.

    Raises:
        ConversionError: files of the folder can't be copied; with all faults.
    """
    return {name: _read(folder, name) for name in _assets_of(folder) if name not in _LIMITS}


def lent_files(folder: str) -> list[str]:
    """Return the files of a folder to copy unchanged: a tokenizer's, licences.

    Raises:
        ConversionError: files can't be copied; with all faults.
    """
    return [name for name in _assets_of(folder) if name not in _LIMITS]


def _assets_of(folder: str) -> list[str]:
    """Check the files of a folder to be copied or read: each must exist, within its size limit, and not link elsewhere.

    Raises:
        ConversionError: with all invalid files.
    """
    storage, inside = open_storage(folder)
    names = [entry.name for entry in storage.list(inside) if not entry.is_folder]
    names = [name for name in names if name in _LIMITS or _ASSETS.fullmatch(name)]
    problems = [f"{len(names)} files named like a tokenizer's"] if len(names) > MAX_ASSETS else []
    for name in names[:MAX_ASSETS]:
        try:
            open_linked(storage, join(inside, name), _LIMITS.get(name, MAX_ASSET_NBYTES)).close()
        except StorageError as error:
            problems.append(error.message)
    if problems:
        raise ConversionError(
            f"the assets in {folder} are rejected, nothing was written:\n  " + "\n  ".join(problems),
            path=folder,
            problems=problems,
        )
    return names


def _read(folder: str, name: str) -> bytes:
    storage, inside = open_storage(folder)
    return read_linked(storage, join(inside, name), _LIMITS.get(name, MAX_ASSET_NBYTES))


def check_config(config: Mapping[str, Any], family: str, args: ModelArgs, path: str) -> None:
    """Refuse a ``config.json`` of another model. The vocabulary size is not compared: the weights determine it.

    Raises:
        ConversionError: with every difference.
    """
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int):
        args = replace(args, vocab_size=vocabulary)
    faults = config_faults(config, family, args)
    if faults:
        raise ConversionError(
            f"{path} describes another model than the given flavor:\n  " + "\n  ".join(faults),
            path=path,
            problems=faults,
        )


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the dtype of most of the bytes."""
    nbytes: dict[str, int] = {}
    for info in tensors.values():
        nbytes[info.dtype] = nbytes.get(info.dtype, 0) + total_nbytes([info])
    return max(nbytes, key=lambda dtype: nbytes[dtype])


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def split_into_files(
    tensors: Mapping[str, TensorInfo], weight_map: Mapping[str, str], max_nbytes: int
) -> dict[str, list[str]]:
    """Return file name -> keys: by ``weight_map``, else in order with at most ``max_nbytes`` per file (or one tensor).

    Raises:
        ConversionError: ``weight_map`` does not place every tensor.
    """
    if weight_map:
        missing = [key for key in tensors if key not in weight_map]
        if missing:
            raise ConversionError(
                f"the index of the assets folder does not place {len(missing)} of {len(tensors)} tensors, "
                f"first '{missing[0]}': is it another model's?"
            )
        files: dict[str, list[str]] = {}
        for key in tensors:
            files.setdefault(weight_map[key], []).append(key)
        return dict(sorted(files.items()))
    groups: list[list[str]] = [[]]
    room = max_nbytes
    for key, info in tensors.items():
        nbytes = Box.whole(info.shape).numel * itemsize(info.dtype)
        if groups[-1] and nbytes > room:
            groups.append([])
            room = max_nbytes
        groups[-1].append(key)
        room -= nbytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {shard_file_name(index, len(groups)): keys for index, keys in enumerate(groups, 1)}


def _index(files: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    weight_map = {key: name for name, keys in files.items() for key in keys}
    return {
        "metadata": {"total_size": total_nbytes(tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
