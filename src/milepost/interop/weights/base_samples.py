"""Samples of the untrained weights that a step leaves out, to detect another base. Torch-free.

A step with only trained tensors is valid only on the weights that it was trained on, but its keys and shapes fit any
model of that size. So each such step records the dtype, the shape and some values of every tensor that it leaves out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from milepost.errors import FormatError, MilepostError
from milepost.format.box import Box
from milepost.interop.weights.boxes import Array, Readable, array_dtype, cast_into

NUM_VALUES = 8
"""Number of values per tensor; all of a smaller one."""
ONLY_TRAINABLE = "only_trainable"
"""Name of the record in a manifest's ``extra``: the step holds only the model's trained tensors."""
NAME = "base_samples"
"""Name of the record among the data attached to a step."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A tensor's dtype, shape and values at :func:`places`, each as bytes; None if unknown."""

    dtype: str
    shape: tuple[int, ...]
    values: tuple[bytes | None, ...]


def places(key: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the indices of a tensor's sampled values: spread over it, and always the same."""
    numel = math.prod(shape)
    count = min(numel, NUM_VALUES)
    step = numel // count if count else 0
    shift = crc32(key.encode()) % step if step else 0
    return [tuple(int(part) for part in np.unravel_index(n * step + shift, shape)) for n in range(count)]


def merged_samples(brought: Iterable[Mapping[str, Sample]]) -> dict[str, Sample]:
    """Merge the samples of all ranks, each with the values that it holds."""
    found: dict[str, Sample] = {}
    for samples in brought:
        for key, sample in samples.items():
            known = found.get(key)
            if known is None or known.shape != sample.shape:
                found[key] = known or sample
                continue
            pairs = zip(known.values, sample.values, strict=True)
            found[key] = Sample(known.dtype, known.shape, tuple(a if a is not None else b for a, b in pairs))
    return found


def dump(samples: Mapping[str, Sample]) -> bytes:
    """Return the record of ``samples``: JSON with dtype, shape and hex values of each key."""
    record = {
        key: [sample.dtype, list(sample.shape), [None if value is None else value.hex() for value in sample.values]]
        for key, sample in sorted(samples.items())
    }
    return json.dumps(record, separators=(",", ":")).encode()


def parse(record: object, path: str) -> dict[str, Sample]:
    """Parse the samples of a record.

    Raises:
        FormatError: it is malformed.
    """
    try:
        if not isinstance(record, bytes):
            raise TypeError(type(record))
        return {key: _parsed(key, *entry) for key, entry in json.loads(record).items()}
    except (MilepostError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: the record of the weights that are not trained is malformed", path=path) from error


def _parsed(key: str, dtype: str, sizes: list[int], values: list[str | None]) -> Sample:
    sample = Sample(dtype, tuple(map(int, sizes)), tuple(None if v is None else bytes.fromhex(v) for v in values))
    if min(sample.shape, default=0) < 0 or len(values) != min(math.prod(sample.shape), NUM_VALUES):
        raise ValueError(key)
    if any(value is not None and len(value) != array_dtype(dtype).itemsize for value in sample.values):
        raise ValueError(key)
    return sample


def differences(recorded: Mapping[str, Sample], found: Mapping[str, Sample]) -> Iterator[str]:
    """List differing tensors, one line each, among those in both.

    Values are compared in either dtype: a bfloat16 and a float32 value are equal if one is the other rounded.
    """
    for key, here in found.items():
        there = recorded.get(key)
        if there is None:
            continue
        if here.shape != there.shape:
            yield f"{key}: shape {list(there.shape)} in the step, {list(here.shape)} here"
        elif not _are_equal(here, there):
            yield f"{key}: different values"


def _are_equal(one: Sample, other: Sample) -> bool:
    pairs = [(a, b) for a, b in zip(one.values, other.values, strict=True) if a is not None and b is not None]
    if one.dtype == other.dtype:
        return all(a == b for a, b in pairs)
    a = np.frombuffer(b"".join(pair[0] for pair in pairs), array_dtype(one.dtype))
    b = np.frombuffer(b"".join(pair[1] for pair in pairs), array_dtype(other.dtype))
    return _is_rounded(a, b) or _is_rounded(b, a)


def _is_rounded(fine: Array, coarse: Array) -> bool:
    rounded = np.empty(len(fine), coarse.dtype)
    cast_into(rounded, fine)
    return rounded.tobytes() == coarse.tobytes()


def sample_of(source: Readable, names: Mapping[str, str]) -> dict[str, Sample]:
    """Sample stored tensors: ``names`` maps their keys in a record to those in ``source``."""
    found = {}
    for key, stored in names.items():
        info = source.tensors[stored]
        dtype = array_dtype(info.dtype)
        values = []
        for place in places(key, info.shape):
            value = np.empty((1,) * len(place), dtype)
            source.read_into(stored, Box(place, value.shape), value)
            values.append(value.tobytes())
        found[key] = Sample(info.dtype, info.shape, tuple(values))
    return found
