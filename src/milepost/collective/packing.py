"""Python objects as buffers for collectives: prefixed with their lengths, and with large arrays in place."""

from __future__ import annotations

import ctypes
import pickle
import struct
from typing import Any, cast

import numpy as np
import torch

_LARGE_NBYTES = 1 << 20
"""Minimum size of an array that is sent separately."""
_LENGTH = struct.Struct("<Q")


def message_of(data: bytes | memoryview, nbytes: int) -> torch.Tensor:
    """Return the length of ``data`` and its first ``nbytes``, padded with zeros."""
    memory = bytearray(_LENGTH.size + nbytes)
    _LENGTH.pack_into(memory, 0, len(data))
    start = data[:nbytes]
    memory[_LENGTH.size : _LENGTH.size + len(start)] = start
    return torch.frombuffer(memory, dtype=torch.uint8)


def length_of(message: torch.Tensor) -> int:
    """Return the length of the data in a message, of which the message may be only the first part."""
    length: int = _LENGTH.unpack_from(_bytes_of(message))[0]
    return length


def data_of(message: torch.Tensor) -> memoryview:
    """Return the data of a complete message."""
    return _bytes_of(message)[_LENGTH.size : _LENGTH.size + length_of(message)]


def _bytes_of(message: torch.Tensor) -> memoryview:
    return memoryview(cast("Any", message.numpy()))


def without_large(value: object, large: list[memoryview]) -> bytes:
    """Pickle ``value``, except for large arrays: their memory is appended to ``large``, their sizes come first.

    So their content is not copied here, and only once by the receiver: a record can be a gigabyte.
    """

    def stays(array: pickle.PickleBuffer) -> bool:
        memory = array.raw()
        if memory.nbytes < _LARGE_NBYTES:
            return True
        large.append(memory)
        return False

    pickled = pickle.dumps(value, protocol=5, buffer_callback=stays)
    sizes = [memory.nbytes for memory in large]
    return struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes) + pickled


def parted(data: bytes | memoryview) -> tuple[tuple[int, ...], memoryview]:
    """Split the output of :func:`without_large` into the sizes of the large arrays and the rest."""
    count = _LENGTH.unpack_from(data)[0]
    return struct.unpack_from(f"<{count}Q", data, _LENGTH.size), memoryview(data)[_LENGTH.size * (count + 1) :]


def tensor_on(memory: memoryview) -> torch.Tensor:
    """Return a tensor over this memory, which must outlive it. It may be read-only, since it is only sent."""
    flat = np.frombuffer(memory, np.uint8)
    if memory.readonly:  # for which torch would warn
        kind = ctypes.c_uint8 * len(flat)
        flat = np.ctypeslib.as_array(kind.from_address(flat.ctypes.data))
    return torch.from_numpy(flat)
