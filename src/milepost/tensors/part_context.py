"""The data other than tensors that a composed tensor's class keeps: as plain data in a checkpoint, and rebuilt from it.

Plain data are tagged tuples of plain values. The tensor's shape and device become symbols, since both may change.
Rebuilding imports nothing, and calls nothing that the data names.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch

from milepost.errors import ConfigError
from milepost.tensors.registry import is_named_tuple, registered
from milepost.tensors.value_types import require

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.Size)
_SHAPE, _DEVICE = ("the shape",), ("the device",)


def to_plain(value: Any, tensor: torch.Tensor) -> Any:
    """Convert what ``tensor`` keeps to plain data.

    Raises:
        TypeError: a value has no such form; the text names it.
    """
    kind = type(value)
    if kind is torch.Size and tuple(value) == tuple(tensor.shape):
        return _SHAPE
    if kind is torch.device and value == tensor.device:
        return _DEVICE
    if kind in _PLAIN or registered(kind) is not None:
        return ("value", value)
    if kind in (list, tuple):
        return (kind.__name__, [to_plain(part, tensor) for part in value])
    if isinstance(value, Mapping):
        return ("dict", [(to_plain(name, tensor), to_plain(part, tensor)) for name, part in value.items()])
    name = f"{kind.__module__}:{kind.__qualname__}"
    if isinstance(value, enum.Enum):
        return ("enum", name, value.name)
    if is_named_tuple(kind):
        return ("named tuple", name, [to_plain(part, tensor) for part in value])
    if dataclasses.is_dataclass(kind):
        fields = [field.name for field in dataclasses.fields(kind)]
        return ("dataclass", name, [(field, to_plain(getattr(value, field), tensor)) for field in fields])
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return ("function", f"{value.__module__}:{value.__qualname__}")
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__}")


def from_plain(plain: Any, shape: tuple[int, ...], device: torch.device, package: str) -> Any:
    """Rebuild the data of a tensor of ``shape`` on ``device``, whose class is from ``package``.

    Raises:
        ConfigError: it keeps a function, or a value of a class that this program has not imported.
        FormatError: it is malformed; also TypeError, ValueError, LookupError or AttributeError.
    """

    def made(part: Any) -> Any:
        return from_plain(part, shape, device, package)

    if plain == _SHAPE:
        return torch.Size(shape)
    if plain == _DEVICE:
        return device
    require(isinstance(plain, tuple) and len(plain) in (2, 3), "what a tensor stores beside its parts is malformed")
    tag, first, *rest = plain
    if tag == "value":
        return first
    if tag in ("list", "tuple"):
        return (list if tag == "list" else tuple)(made(part) for part in first)
    if tag == "dict":
        return {made(name): made(part) for name, part in first}
    if tag == "function":
        raise ConfigError(
            f"a tensor of the checkpoint keeps the function {first!r:.200}, and no function is taken by a name in a "
            "checkpoint: prepare the model in the same way (quantize it) and load into it"
        )
    kind = _loaded_class(first, package)
    if tag == "enum" and issubclass(kind, enum.Enum) and rest[0] in kind.__members__:
        return kind[rest[0]]
    if tag == "named tuple" and is_named_tuple(kind):
        return tuple.__new__(kind, [made(part) for part in rest[0]])
    require(tag == "dataclass" and dataclasses.is_dataclass(kind), f"a {first!r:.200} of a tensor is malformed")
    value: Any = object.__new__(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    for name, part in rest[0]:
        require(name in names, f"a {first!r:.200} of a tensor is malformed")
        object.__setattr__(value, name, made(part))
    return value


def _loaded_class(name: object, package: str) -> type:
    """A class of the tensor's own package or of torch that this program has imported. Imports nothing."""
    module_name, _, path = str(name).partition(":")
    found: Any = sys.modules.get(module_name) if module_name.partition(".")[0] in (package, "torch") else None
    for part in path.split("."):
        found = vars(found).get(part) if found is not None and hasattr(found, "__dict__") else None
    if not isinstance(found, type):
        raise ConfigError(
            f"a tensor of the checkpoint keeps a value of class {name!r:.200}, which this program has not loaded: "
            f"import {module_name:.200} before it is loaded"
        )
    return found


def has_functions(plain: object) -> bool:
    """Return whether plain data names functions, which are never looked up by a name in a checkpoint."""
    pending = [plain]
    while pending:
        part = pending.pop()
        if isinstance(part, tuple) and part and part[0] == "function":
            return True
        if isinstance(part, tuple | list):
            pending.extend(part)
    return False
