"""Python objects as memory that collectives move: with their lengths, and large arrays apart, where they are."""

from __future__ import annotations

import ctypes
import pickle
import struct
from typing import Any, cast

import numpy as np
import torch

_LARGE_NBYTES = 1 << 20
"""Size from which an array is moved by itself."""
_LENGTH = struct.Struct("<Q")


def message_of(data: bytes | memoryview, nbytes: int) -> torch.Tensor:
    """The length of ``data``, and its first ``nbytes``, with zeros after them if it is shorter."""
    memory = bytearray(_LENGTH.size + nbytes)
    _LENGTH.pack_into(memory, 0, len(data))
    start = data[:nbytes]
    memory[_LENGTH.size : _LENGTH.size + len(start)] = start
    return torch.frombuffer(memory, dtype=torch.uint8)


def length_of(message: torch.Tensor) -> int:
    """The length of all the data that a message begins with, or is."""
    length: int = _LENGTH.unpack_from(_bytes_of(message))[0]
    return length


def data_of(message: torch.Tensor) -> memoryview:
    """The data of a message that holds all of it."""
    return _bytes_of(message)[_LENGTH.size : _LENGTH.size + length_of(message)]


def _bytes_of(message: torch.Tensor) -> memoryview:
    return memoryview(cast("Any", message.numpy()))


def without_large(value: object, large: list[memoryview]) -> bytes:
    """Pickle ``value``, except for large arrays: their memory is appended to ``large``, their sizes come first.

    So what is in them is not copied here, and only once where it arrives: a record can be a gigabyte.
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
    """The sizes of the large arrays, and the rest, of what :func:`without_large` returned."""
    count = _LENGTH.unpack_from(data)[0]
    return struct.unpack_from(f"<{count}Q", data, _LENGTH.size), memoryview(data)[_LENGTH.size * (count + 1) :]


def tensor_on(memory: memoryview) -> torch.Tensor:
    """A tensor on this memory, which must outlive it. It may be read-only: nothing is written to what is sent."""
    flat = np.frombuffer(memory, np.uint8)
    if memory.readonly:  # of which torch makes none without a warning
        kind = ctypes.c_uint8 * len(flat)
        flat = np.ctypeslib.as_array(kind.from_address(flat.ctypes.data))
    return torch.from_numpy(flat)
