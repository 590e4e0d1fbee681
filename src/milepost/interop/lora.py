"""A base model with a LoRA adapter merged in, computed box by box as it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.errors import ConversionError, listed
from milepost.format.box import Box
from milepost.interop.weights.boxes import Array, Readable, TensorInfo, cast_into

PREFIX = "base_model.model."
"""Prefix of all keys in PEFT's files, and in a model wrapped by PEFT."""
_LORA = re.compile(r"(.*)\.lora_([AB])\.weight")
_OTHER_KINDS = ("use_dora", "lora_bias", "use_qalora", "trainable_token_indices", "target_parameters")
_KNOWN_OPTIONS = frozenset(
    re.findall(
        r"\w+",
        """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
        target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save
        init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core
        loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying""",
    )
)
"""Options of PEFT 0.21's LoRA that select modules, concern training, or are respected by merging."""
_UNSET = (None, False, "", "none", 0)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's tensors under the keys of PEFT's files, and its configuration."""

    name: str
    tensors: Readable
    config: Mapping[str, Any]


class LoraMerged:
    """The tensors of ``base`` plus, if ``adapter`` has matrices for them, their scaled product.

    Like PEFT's merge: W + B A * scale, in float32. Fully trained modules are taken from the adapter.
    """

    def __init__(self, base: Readable, adapter: Adapter, path: str):
        self._base = base
        self._adapter = adapter
        pairs: dict[str, dict[str, str]] = {}
        self._trained: dict[str, str] = {}
        faults = list(_unmergeable(adapter.config))
        for key in adapter.tensors.tensors:
            inner = key.removeprefix(PREFIX)
            match = _LORA.fullmatch(inner)
            if match is not None:
                pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = key
            elif "lora_" in inner:
                faults.append(f"{key}: not a matrix of plain LoRA")
            else:
                self._trained[inner] = key
        self._pairs = {target: (found["A"], found["B"]) for target, found in pairs.items() if len(found) == 2}
        faults += [f"{target}: a matrix of the pair is missing" for target in pairs if target not in self._pairs]
        for target in (*pairs, *self._trained):
            if target not in base.tensors:
                faults.append(f"{target}: not in the base model")
        faults += [fault for target in self._pairs if target in base.tensors for fault in self._misshapen(target)]
        for target, key in self._trained.items():
            shape = adapter.tensors.tensors[key].shape
            if target in base.tensors and shape != base.tensors[target].shape:
                faults.append(f"{target}: {list(shape)} in the adapter, {list(base.tensors[target].shape)} in the base")
        if faults:
            raise ConversionError(
                f"the adapter in {path} can't be merged, nothing was written:\n  " + "\n  ".join(listed(faults)),
                path=path,
                problems=faults,
            )
        self.tensors: Mapping[str, TensorInfo] = base.tensors
        self.notes = (f"{len(self._pairs)} of {len(base.tensors)} tensors were merged with the adapter",)

    def _misshapen(self, target: str) -> list[str]:
        a, b = (self._adapter.tensors.tensors[key].shape for key in self._pairs[target])
        shape = self._base.tensors[target].shape
        made = (a[1], b[0]) if self._adapter.config.get("fan_in_fan_out") else (b[0], a[1])
        return [] if made == shape and a[0] == b[1] else [f"{target}: {list(b)} x {list(a)} for {list(shape)}"]

    def unit_rows(self, key: str) -> int:
        """See ``weights.boxes.Readable``."""
        return self._base.unit_rows(key)

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See ``weights.boxes.Readable``."""
        if key in self._trained:
            self._adapter.tensors.read_into(self._trained[key], box, out)
        elif key not in self._pairs:
            self._base.read_into(key, box, out)
        else:
            values = np.empty(box.sizes, np.float32)
            self._base.read_into(key, box, values)
            values += self._difference(key, box)
            cast_into(out, values)

    def _difference(self, key: str, box: Box) -> Array:
        """Compute a box of the scaled product from the rows of B and the columns of A that it needs."""
        (rows, columns), (num_rows, num_columns) = box.offsets, box.sizes
        is_swapped = bool(self._adapter.config.get("fan_in_fan_out"))
        if is_swapped:
            rows, columns, num_rows, num_columns = columns, rows, num_columns, num_rows
        a_key, b_key = self._pairs[key]
        rank = self._adapter.tensors.tensors[a_key].shape[0]
        a, b = np.empty((rank, num_columns), np.float32), np.empty((num_rows, rank), np.float32)
        self._adapter.tensors.read_into(a_key, Box((0, columns), a.shape), a)
        self._adapter.tensors.read_into(b_key, Box((rows, 0), b.shape), b)
        product: Array = (b @ a) * np.float32(self._scale(key, rank))
        return product.T if is_swapped else product

    def _scale(self, key: str, rank: int) -> float:
        config = self._adapter.config
        module = key.removesuffix(".weight")
        patterns = config.get("alpha_pattern") or {}
        alpha = next(
            (value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)),
            config.get("lora_alpha", rank),
        )
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _unmergeable(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"{kind}: only LoRA is merged here; use merge_and_unload() of PEFT"]
    options = (*_OTHER_KINDS, *sorted(set(config) - _KNOWN_OPTIONS - set(_OTHER_KINDS)))
    is_set = [option for option in options if config.get(option) not in _UNSET and config[option] not in ([], {})]
    return [f"{option} is set: use merge_and_unload() of PEFT" for option in is_set] + _malformed(config)


def _malformed(config: Mapping[str, Any]) -> list[str]:
    """Report options for the scale that have a wrong type."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        return ["alpha_pattern: expected an object"]
    faults = []
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 1), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            faults.append(f"{name}: expected a number as its alpha, found {alpha!r:.50}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"alpha_pattern: {pattern!r:.50} is not a valid pattern: {error}")
    return faults
