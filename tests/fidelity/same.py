"""Equality to the last bit, types and order included, and a digest of everything that a run holds."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from milepost.tensors import parts


def assert_same(found: Any, expected: Any, what: str = "state") -> None:
    """Type, order and every bit (of NaNs and signed zeros too) are the same."""
    assert type(found) is type(expected), f"{what}: {type(found)} instead of {type(expected)}"
    if parts.comes_apart(expected):
        one, other = parts.take_apart("", found), parts.take_apart("", expected)
        assert one.form == other.form, what
        for (path, part), (_, wanted) in zip(parts.leaves(one), parts.leaves(other), strict=True):
            assert_same(getattr(part, "local", part), getattr(wanted, "local", wanted), f"{what}.{path}")
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device), what
        if isinstance(expected, DTensor):
            assert (found.placements, found.device_mesh) == (expected.placements, expected.device_mesh), what
        assert raw_bytes(found) == raw_bytes(expected), what
    elif isinstance(expected, np.ndarray | np.generic):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
        assert found.tobytes() == expected.tobytes(), what
    elif isinstance(expected, Mapping):
        assert getattr(found, "default_factory", None) == getattr(expected, "default_factory", None), what
        for (other, value), (key, wanted) in zip(found.items(), expected.items(), strict=True):
            assert_same(other, key, f"{what}, key")
            assert_same(value, wanted, f"{what}.{key}")
    elif isinstance(expected, list | tuple | deque):
        assert len(found) == len(expected), what
        assert getattr(found, "maxlen", None) == getattr(expected, "maxlen", None), what
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{what}.{number}")
    elif isinstance(expected, float):
        assert found.hex() == expected.hex(), what
    else:
        assert found == expected, what


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor in row-major order; of a DTensor, of this rank's part."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.is_quantized:
        return raw_bytes(tensor.int_repr()) + repr(tensor.qscheme()).encode()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce()
        return raw_bytes(tensor.indices()) + raw_bytes(tensor.values())
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def digest(value: Any) -> str:
    """A digest of all bytes of a nested state; of random generators too, where it holds their state."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    sha.update(f"<{type(value).__qualname__}>".encode())
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode() + raw_bytes(value))
    elif isinstance(value, np.ndarray):
        sha.update(str(value.dtype).encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _feed(sha, key)
            _feed(sha, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())
