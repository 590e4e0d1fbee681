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
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from milepost.format.box import Box
from milepost.interop.hf.kept import KeptNames
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
    owners = {_memory(tensor): name for name, tensor in empty.items()}
    try:
        with _WithoutCopies():  # type: ignore[no-untyped-call]
            stored = revert(model, dict(empty))
    except Exception:  # noqa: BLE001 - any error of that library: this method does not work
        return None
    links = []
    for key, view in stored.items():
        owner = owners.get(_memory(view))
        link = _link(owner, ours[owner], key, view) if owner is not None else None
        if link is None:
            return None
        links.append((link, tuple(view.shape)))
    covered = dict.fromkeys(ours, 0)
    for link, _ in links:
        covered[link.ours_key] += link.ours.numel
    return links if all(covered[name] == math.prod(shape) for name, shape in ours.items()) else None


def _as_they_are(_: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _WithoutCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces copies by views, so that the memory still identifies the copied elements."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias(args[0])
        return func(*args, **(kwargs or {}))


def _link(owner: str, shape: tuple[int, ...], key: str, view: torch.Tensor) -> Link | None:
    """Return the box of a row-major tensor of ``shape`` shown by ``view``, perhaps with the last two dims exchanged."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    sizes, order = [1] * len(shape), list[int]()
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            continue
        dims = [d for d, own in enumerate(strides) if own == stride and shape[d] > 1 and d not in order]
        if not dims:
            return None
        order.append(dims[0])
        sizes[dims[0]] = size
    offsets, rest = list[int](), int(view.storage_offset())
    for stride in strides:
        offset, rest = divmod(rest, stride)
        offsets.append(offset)
    op = Op.SAME
    if order != sorted(order):
        sizes_there = [*sizes[:-2], sizes[-1], sizes[-2]]
        op = Op.TRANSPOSED
    else:
        sizes_there = sizes
    box = Box(tuple(offsets), tuple(sizes))
    if not box.inside(shape) or _without_leading_ones(sizes_there) != _without_leading_ones(view.shape):
        return None
    return Link(owner, box, key, Box.whole(tuple(view.shape)), op)


def _without_leading_ones(sizes: Sequence[int]) -> tuple[int, ...]:
    first = next((number for number, size in enumerate(sizes) if size != 1), len(sizes))
    return tuple(sizes[first:])


def main(class_name: str) -> None:
    """Print the names of a class in the sizes of the config on standard input, as the last line."""
    import transformers

    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_DATA, (_MAX_NBYTES, _MAX_NBYTES))
    config = transformers.AutoConfig.for_model(**json.load(sys.stdin))
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    print(flush=True)
    sys.stdout.buffer.write(msgspec.json.encode(kept_names(model)))
