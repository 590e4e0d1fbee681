"""The table of tensor dtypes that can be stored: all that ``torch.save`` writes as plain elements.

Quantized dtypes (``qint8``, ...) carry scales beside their elements, and sub-byte integers (``int4``, ...) have no
storage in torch; neither is included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from milepost.errors import FormatError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """The properties of a dtype that the formats need.

    ``storage_class`` is the class in ``torch`` that ``torch.save`` names in its pickle; None means that it writes an
    ``UntypedStorage`` and names the dtype itself (``_rebuild_tensor_v3``). ``numpy_name`` is a name of numpy or of
    ``ml_dtypes``; ``safetensors_name`` is the code in a safetensors header. Both are None where there is none.
    """

    name: str
    itemsize: int
    storage_class: str | None = None
    numpy_name: str | None = None
    safetensors_name: str | None = None


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            DType("bool", 1, "BoolStorage", "bool", "BOOL"),
            DType("uint8", 1, "ByteStorage", "uint8", "U8"),
            DType("int8", 1, "CharStorage", "int8", "I8"),
            DType("int16", 2, "ShortStorage", "int16", "I16"),
            DType("int32", 4, "IntStorage", "int32", "I32"),
            DType("int64", 8, "LongStorage", "int64", "I64"),
            DType("float16", 2, "HalfStorage", "float16", "F16"),
            DType("bfloat16", 2, "BFloat16Storage", "bfloat16", "BF16"),
            DType("float32", 4, "FloatStorage", "float32", "F32"),
            DType("float64", 8, "DoubleStorage", "float64", "F64"),
            DType("complex64", 8, "ComplexFloatStorage", "complex64", "C64"),
            DType("complex128", 16, "ComplexDoubleStorage", "complex128"),
            DType("complex32", 4),
            DType("bcomplex32", 4),  # since torch 2.14
            DType("uint16", 2, None, "uint16", "U16"),
            DType("uint32", 4, None, "uint32", "U32"),
            DType("uint64", 8, None, "uint64", "U64"),
            DType("float8_e4m3fn", 1, None, "float8_e4m3fn", "F8_E4M3"),
            DType("float8_e4m3fnuz", 1, None, "float8_e4m3fnuz", "F8_E4M3FNUZ"),
            DType("float8_e5m2", 1, None, "float8_e5m2", "F8_E5M2"),
            DType("float8_e5m2fnuz", 1, None, "float8_e5m2fnuz", "F8_E5M2FNUZ"),
            DType("float8_e8m0fnu", 1, None, "float8_e8m0fnu", "F8_E8M0"),
            # Two 4-bit floats per byte: numpy has no such dtype.
            DType("float4_e2m1fn_x2", 1),
            DType("bits8", 1),
            DType("bits16", 2),
            DType("bits1x8", 1),
            DType("bits2x4", 1),
            DType("bits4x2", 1),
        )
    }
)
"""The dtypes by torch's name without the ``torch.`` prefix. An older torch may lack some."""

SAFETENSORS_NAMES = {entry.safetensors_name: entry.name for entry in DTYPES.values() if entry.safetensors_name}
_BY_STORAGE_CLASS = {entry.storage_class: entry.name for entry in DTYPES.values() if entry.storage_class}


def lookup(name: str) -> DType:
    """Return the entry for torch's ``name``. Raises FormatError for an unknown name."""
    entry = DTYPES.get(name)
    if entry is None:
        raise FormatError(f"dtype {name!r:.100} can't be stored; supported are {', '.join(DTYPES)}")
    return entry


def itemsize(name: str) -> int:
    """Return the size of one element in bytes. Raises FormatError for an unknown name."""
    return lookup(name).itemsize


def numpy_dtype(name: str) -> np.dtype[np.generic] | None:
    """Return the numpy dtype (of ``ml_dtypes`` if numpy has none), or None for a dtype that only torch supports."""
    numpy_name = lookup(name).numpy_name
    if numpy_name is None:
        return None
    import numpy as np  # imported here: 100 ms that listing and planning do not need

    if hasattr(np, numpy_name):
        return np.dtype(numpy_name)
    import ml_dtypes  # imported here: 20 ms that only these dtypes need

    found: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, numpy_name))
    return found


def from_safetensors(code: str) -> str:
    """Return torch's name for a safetensors dtype code. Raises FormatError for an unknown code."""
    name = SAFETENSORS_NAMES.get(code)
    if name is None:
        raise FormatError(f"safetensors dtype {code!r:.100} is unknown; supported are {', '.join(SAFETENSORS_NAMES)}")
    return name


def from_storage_class(storage_class: str) -> str | None:
    """Return torch's name of the dtype of a typed storage class of ``torch.save``, or None."""
    return _BY_STORAGE_CLASS.get(storage_class)
