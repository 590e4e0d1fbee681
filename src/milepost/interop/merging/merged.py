"""A source whose tensors are merged when they are read, in parts of fixed size, in constant memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from milepost.format.box import Box, cut_into_slabs
from milepost.format.dtype import itemsize
from milepost.interop.merging.methods import Method
from milepost.interop.weights.boxes import Array, Readable, TensorInfo, as_bytes, cast_into

PART_NUMEL = 1 << 18
"""Number of elements merged at a time: those of a few sources fit in a core's caches."""
MAX_PART_NUMEL = 16 * PART_NUMEL
"""Parts with more elements are also split along the last dim: merging a part needs several times its memory."""


def is_floating(info: TensorInfo) -> bool:
    """Return whether a tensor's values can be merged; integers and booleans are taken from the first source."""
    return info.dtype in ("float64", "float32", "bfloat16", "float16")


def wide_dtype(key: str, inputs: Sequence[Readable]) -> np.dtype[Any]:
    """Return the dtype in which a tensor is merged: wider than any source's, so that equal values are preserved."""
    is_narrow = all(itemsize(tensors.tensors[key].dtype) < 4 for tensors in inputs)
    return np.dtype(np.float32 if is_narrow else np.float64)


def read_box(inputs: Sequence[Readable], number: int, key: str, box: Box, dtype: np.dtype[Any]) -> Array:
    """Read a part of one source's tensor in a dtype, into new memory."""
    values = np.empty(box.sizes, dtype)
    inputs[number].read_into(key, box, values)
    return values


def cut_box(key: str, box: Box, inputs: Sequence[Readable]) -> Iterator[Box]:
    """Split ``box`` into parts that are merged one after the other."""
    for slab in cut_into_slabs(box.sizes, 1, PART_NUMEL, common_unit(key, inputs)):
        yield from _columns(slab.box.shifted(box.offsets))


def _columns(part: Box) -> Iterator[Box]:
    """Split a part whose rows can't be separated (MXFP4 weights) along its last dim."""
    *lead, width = part.sizes or (1,)
    if part.numel <= MAX_PART_NUMEL:
        yield part
        return
    step = max(1, PART_NUMEL * width // part.numel)
    for start in range(0, width, step):
        offsets = (*part.offsets[:-1], part.offsets[-1] + start)
        yield Box(offsets, (*lead, min(step, width - start)))


def common_unit(key: str, inputs: Sequence[Readable]) -> int:
    """Return a number of rows that does not split any source's units."""
    return math.lcm(*(tensors.unit_rows(key) for tensors in inputs))


class Merged:
    """The tensors of ``inputs`` (all with the same keys and shapes) by a method, in ``dtypes``."""

    def __init__(self, inputs: Sequence[Readable], method: Method, dtypes: Mapping[str, str]):
        self._inputs = inputs
        self._method = method
        self._lock = threading.Lock()
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(dtypes[key], info.shape) for key, info in inputs[0].tensors.items()
        }
        self.not_finite: set[str] = set()
        """Keys of tensors with infinite or NaN values among those read."""
        self.differing: set[str] = set()
        """Keys of tensors that are not merged (integers) and differ between sources."""

    def unit_rows(self, key: str) -> int:
        """See ``weights.boxes.Readable``."""
        return common_unit(key, self._inputs)

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See ``weights.boxes.Readable``."""
        if not is_floating(self._inputs[0].tensors[key]):
            self._copy(key, box, out)
            return
        dtype = wide_dtype(key, self._inputs)
        for part in cut_box(key, box, self._inputs):
            with np.errstate(over="ignore", invalid="ignore"):  # reported below
                values = self._method.values(
                    key,
                    lambda number, part=part: read_box(self._inputs, number, key, part, dtype),  # type: ignore[misc]
                )
            target = out[part.relative_to(box).index()]
            cast_into(target, values)
            if not np.isfinite(target).all():
                self._note(self.not_finite, key)

    def _copy(self, key: str, box: Box, out: Array) -> None:
        self._inputs[0].read_into(key, box, out)
        for other in self._inputs[1:]:
            values = np.empty(box.sizes, out.dtype)
            other.read_into(key, box, values)
            if not np.array_equal(as_bytes(values), as_bytes(np.ascontiguousarray(out))):
                self._note(self.differing, key)

    def _note(self, keys: set[str], key: str) -> None:
        with self._lock:
            keys.add(key)
