"""The names under which transformers stores a module, found by having it convert a state dict without data.

Since transformers 5 a module's tensors may differ from those in its files on the hub (a layer's experts as one), and
transformers reverts that at a save. On the meta device that costs nothing, and views show the destination of elements.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import resource
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from milepost.format.box import Box
from milepost.interop.hf.kept import KeptNames
from milepost.interop.hf.traced import Tracer
from milepost.interop.names.rules import Link, Op
from milepost.loading.names import without_wrappers

log = logging.getLogger("milepost")

_MAX_NBYTES = 8 << 30
"""Limit of the process that computes names: a config may claim a billion layers."""


def kept_names(model: Any) -> KeptNames:
    """Return the tensors of ``model`` (a ``PreTrainedModel``, sharded or not) and their form in ``save_pretrained``."""
    held = {without_wrappers(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    tensors = {name: tensor for name, tensor in held.items() if isinstance(tensor, torch.Tensor)}
    copies = _copies(model, tensors)
    ignored = frozenset(name for name in getattr(model, "_keys_to_ignore_on_save", None) or () if name in tensors)
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in copies and name not in ignored}
    dtypes = {name: tensors[name].dtype for name in ours}
    links = _links(model, ours, dtypes)
    if links is None:
        log.warning(
            "transformers stores tensors of %s in an unsupported way: the files get the module's own names",
            type(model).__name__,
        )
        links = [(Link(name, Box.whole(shape), name, Box.whole(shape), Op.SAME), shape) for name, shape in ours.items()]
    return KeptNames(
        ours=ours,
        theirs={link.theirs_key: shape for link, shape in links},
        links=tuple(link for link, _ in links),
        copies=copies,
        ignored=ignored,
    )


def _copies(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return for tensors with several names: name left out by ``save_pretrained`` -> name that it keeps."""
    declared = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    same: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        same.setdefault(id(tensor), []).append(name)
    copies: dict[str, str] = {}
    for names in same.values():
        kept = next((name for name in names if name not in declared), names[0])
        copies |= {name: kept for name in names if name != kept}
    return copies


def _links(
    model: Any, ours: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> list[tuple[Link, tuple[int, ...]]] | None:
    """Return the destination of each tensor's elements, with its shape; None if it can't be traced."""
    try:
        revert = importlib.import_module("transformers.core_model_loading").revert_weight_conversion
    except (ImportError, AttributeError):  # before transformers 5 a module had the names of its files
        revert = _as_they_are
    empty = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in ours.items()}
    tracer = Tracer(empty)
    try:
        with tracer:
            stored = revert(model, dict(empty))
    except Exception:  # noqa: BLE001 - any error of that library: this method does not work
        return None
    links = []
    for key, tensor in stored.items():
        moves = tracer.moves(tensor)
        if moves is None or sum(move.box.numel for move in moves) != tensor.numel():
            return None
        shape = tuple(tensor.shape)
        links += [(Link(move.key, move.original, key, move.box, move.op, move.head_dim), shape) for move in moves]
    covered: dict[str, int] = {}
    for link, _ in links:
        covered[link.ours_key] = covered.get(link.ours_key, 0) + link.ours.numel
    return links if covered == {name: math.prod(shape) for name, shape in ours.items()} else None


def _as_they_are(_: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state


def names_at_load(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Return the module's names of ``keys`` of files that ``from_pretrained`` would rename, and only rename.

    Hub folders that were saved by earlier versions have other names: ``LayerNorm.gamma``, no prefix, and so on.
    """
    try:
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping")
        transforms = mapping.get_model_conversion_mapping(model)
        renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
        held = model.state_dict()
        ordered = sorted(keys, key=loading.dot_natural_key)
        found = {
            key: loading.rename_source_key(key, renamings, converters, model.base_model_prefix, held) for key in ordered
        }
    except Exception as error:  # noqa: BLE001 - of that library, before version 5 or of another release: the keys stay
        log.debug("transformers does not rename keys: %s", error)
        return {}
    return {key: name for key, (name, converter) in found.items() if converter is None and name != key and name in held}


def config_of(text: str) -> Any:
    """Return the configuration in the text of a ``config.json``, as ``from_pretrained`` reads it."""
    import transformers

    content = json.loads(text, object_hook=_or_float)
    return transformers.CONFIG_MAPPING[content["model_type"]].from_dict(content)


def _or_float(value: dict[str, Any]) -> Any:
    """Return the float that transformers spells as an object, as JSON has no infinity."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def main(class_name: str) -> None:
    """Print the names of a class in the sizes of the config on standard input, as the last line."""
    import transformers

    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_DATA, (_MAX_NBYTES, _MAX_NBYTES))
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config_of(sys.stdin.read()))
    print(flush=True)
    sys.stdout.buffer.write(msgspec.json.encode(kept_names(model)))
