"""The supported types of values: the form in which each is written, and the checked function that rebuilds it.

Tables map the globals that standard picklers write, so that stock PyTorch reads these values too, to our own functions,
which are all that Milepost calls when it reads.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import io
import pathlib
import re
import types
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch

from milepost.errors import FormatError
from milepost.format.pickle_dialect import Dialect, Global
from milepost.format.plain_pickle import PLAIN_GLOBALS
from milepost.tensors.registry import make_registered, register_reader, register_value

Reduced = tuple[Any, ...]

FACTORIES: tuple[type, ...] = (int, float, complex, str, bytes, bool, list, tuple, dict, set, frozenset, OrderedDict)
FACTORIES += (Counter, deque)
"""Factories allowed in a ``defaultdict``."""

_DTYPE_TEXT = re.compile(r"[<>|=]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SUV]\d{1,9}|[mM]8(\[\d{0,9}[A-Za-zμ]+\])?)")
_MAX_KEY_PARTS = 1000

MAX_DEPTH = 100
"""Values are nested no deeper."""
ATOMS = frozenset({type(None), bool, int, float, str, complex})
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
QUANTIZED = {
    torch.qint8: ("QInt8Storage", torch.int8),
    torch.quint8: ("QUInt8Storage", torch.uint8),
    torch.qint32: ("QInt32Storage", torch.int32),
}
"""dtype of quantized tensors: the storage that picklers name, and the dtype of its elements."""


# ---- writing ----


def _ordered(value: OrderedDict[Any, Any]) -> Reduced:
    """With the attribute that ``module.state_dict()`` sets: the versions of its modules."""
    state = {"_metadata": value._metadata} if hasattr(value, "_metadata") else None
    return OrderedDict, (), state, None, iter(value.items())


def _defaultdict(value: defaultdict[Any, Any]) -> Reduced:
    factory = value.default_factory
    if factory is not None and factory not in FACTORIES:
        names = ", ".join(kind.__name__ for kind in FACTORIES)
        raise TypeError(f"its default is made by {factory!r:.80}; known are {names}")
    return defaultdict, (factory, dict(value))


def _array(value: np.ndarray[Any, Any]) -> Reduced:
    if value.dtype.hasobject:
        raise TypeError("its elements are Python objects; use a list")
    if not value.dtype.isnative:  # numpy's pickles lose the byte order
        return make_registered, (_ARRAY, (value.dtype, value.shape, value.flags.fnc, value.tobytes("A")))
    return value.__reduce__()  # type: ignore[return-value]


_ARRAY, _ML_DTYPE = "numpy.ndarray", "ml_dtypes"


def _scalar(value: np.generic) -> Reduced:
    if value.dtype.hasobject:
        raise TypeError("it holds a Python object")
    return value.__reduce__()  # type: ignore[return-value]


def dtype_form(dtype: np.dtype[Any]) -> str | dict[str, Any] | tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the argument from which ``numpy.dtype()`` rebuilds the dtype."""
    if dtype.names is not None and dtype.fields is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        return {
            "names": list(dtype.names),
            "formats": [field[0] for field in fields],
            "offsets": [field[1] for field in fields],
            "itemsize": dtype.itemsize,
        }
    if dtype.subdtype is not None:
        return dtype.subdtype
    if _DTYPE_TEXT.fullmatch(dtype.str) is None or np.dtype(dtype.str) != dtype:
        raise TypeError(f"numpy's dtype {dtype} is not one that can be stored")
    return dtype.str


REDUCERS: dict[type, Callable[[Any], Reduced]] = {
    OrderedDict: _ordered,
    defaultdict: _defaultdict,
    Counter: lambda value: (Counter, (dict(value),)),
    deque: lambda value: (deque, (list(value), value.maxlen)),
    zoneinfo.ZoneInfo: lambda value: (zoneinfo.ZoneInfo, (value.key,)),
    decimal.Decimal: lambda value: (decimal.Decimal, (str(value),)),
    fractions.Fraction: lambda value: (fractions.Fraction, (value.numerator, value.denominator)),
    torch.torch_version.TorchVersion: lambda value: (torch.torch_version.TorchVersion, (str(value),)),
    torch.Size: lambda value: (torch.Size, (tuple(value),)),
}
"""By exact type: the conversion that the pickler writes."""

_SCHEMES = (
    "per_tensor_affine",
    "per_channel_affine",
    "per_tensor_symmetric",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)

NATIVE: tuple[type, ...] = (
    bytearray, complex, range, slice, datetime.datetime, datetime.date, datetime.time, datetime.timedelta,
    datetime.timezone, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath,
    torch.dtype, torch.device, torch.layout, torch.qscheme,
)  # fmt: skip
"""By exact type: types whose default pickles are accepted."""


def reduce_value(value: Any) -> Any:
    """Reduce, for a pickler, a value that is no plain container, number or text.

    Raises:
        TypeError: there is no form for it; the text has the reason, or is empty.
    """
    kind = type(value)
    if (reducer := REDUCERS.get(kind)) is not None:
        return reducer(value)
    if kind in NATIVE or (isinstance(value, type) and value in FACTORIES):
        return NotImplemented
    if kind is np.ndarray:
        return _array(value)
    if isinstance(value, np.generic):
        return _scalar(value)
    if isinstance(value, np.dtype):
        if value.type.__module__ == "ml_dtypes":
            return make_registered, (_ML_DTYPE, value.name)
        return np.dtype, (dtype_form(value),)
    raise TypeError


for simple, encode, decode in (
    (types.SimpleNamespace, vars, lambda plain: types.SimpleNamespace(**plain)),
    (argparse.Namespace, vars, lambda plain: argparse.Namespace(**plain)),
    (uuid.UUID, lambda value: value.hex, lambda plain: uuid.UUID(plain)),
    (io.BytesIO, lambda value: (value.getvalue(), value.tell()), lambda plain: _stream(*plain)),
    (torch.memory_format, lambda value: str(value).removeprefix("torch."), lambda plain: _memory_format(plain)),
):
    register_value(simple, encode=encode, decode=decode)


def _array_of(dtype: np.dtype[Any], shape: tuple[int, ...], is_fortran: bool, data: bytes) -> Any:
    require(isinstance(dtype, np.dtype) and not dtype.hasobject and isinstance(data, bytes), "an invalid numpy array")
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order="F" if is_fortran else "C")


def _ml_dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes  # takes 20 ms, and only values of these dtypes need it

    kind = vars(ml_dtypes).get(name)
    require(isinstance(kind, type) and issubclass(kind, np.generic), f"{name!r:.80} is not a supported dtype")
    return np.dtype(kind)


register_reader(_ARRAY, lambda plain: _array_of(*plain))
register_reader(_ML_DTYPE, _ml_dtype)


def _stream(content: bytes, position: int) -> io.BytesIO:
    stream = io.BytesIO(content)
    stream.seek(position)
    return stream


def _memory_format(name: str) -> torch.memory_format:
    names = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    require(name in names, f"{name!r:.80} is not a memory format")
    found: torch.memory_format = getattr(torch, name)
    return found


# ---- reading ----


def require(condition: object, problem: str) -> None:
    """Raise FormatError with the problem if a condition does not hold."""
    if not condition:
        raise FormatError(problem)


def check_key(key: object) -> None:
    """Refuse a dict key or set member that is mutable, or takes long to hash.

    Raises:
        FormatError: it is a mutable container, or expands to more than a thousand parts.
    """
    pending, count = [key], 0
    while pending:
        part = pending.pop()
        count += 1
        require(count <= _MAX_KEY_PARTS, "a dict key expands to too many parts")
        if isinstance(part, tuple | frozenset):
            pending.extend(part)
        elif isinstance(part, int):
            require(part.bit_length() <= 1 << 16, "a dict key is a huge number")
        require(type(part).__hash__ is not None and not isinstance(part, Global), "a dict key can't be hashed")


def _make_set(kind: Any) -> Callable[..., object]:
    def make(*args: object) -> object:
        require(len(args) == 1 and type(args[0]) is list, f"{kind.__name__} is called with unknown arguments")
        for member in args[0]:  # type: ignore[attr-defined]
            check_key(member)
        return kind(args[0])

    return make


def _checked(kind: Callable[..., Any], *forms: tuple[type | tuple[type, ...], ...]) -> Callable[..., object]:
    """Return a function that calls ``kind`` with arguments of exactly one of the forms."""

    def make(*args: object) -> object:
        fits = any(len(args) == len(form) and all(map(isinstance, args, form)) for form in forms)
        require(fits, f"{getattr(kind, '__name__', kind)} is called with unknown arguments")
        try:
            return kind(*args)
        except (ValueError, TypeError, OverflowError, ArithmeticError, KeyError, OSError, RuntimeError) as error:
            raise FormatError(f"{getattr(kind, '__name__', kind)}: {error}") from error

    return make


_NONE = type(None)


def _make_defaultdict(*args: object) -> object:
    require(1 <= len(args) <= 2, "defaultdict is called with unknown arguments")
    factory = args[0].value if isinstance(args[0], Global) else args[0]
    require(factory is None or factory in FACTORIES, "defaultdict is called with an unknown factory")
    items = args[1] if len(args) == 2 else {}
    require(type(items) is dict, "defaultdict is called with unknown arguments")
    return defaultdict(factory, items)  # type: ignore[call-overload]


def _make_deque(*args: object) -> object:
    items = args[0] if args else []
    limit: Any = args[1] if len(args) == 2 else None
    require(type(items) in (list, tuple) and len(args) <= 2, "deque is called with unknown arguments")
    require(limit is None or (type(limit) is int and limit >= 0), "deque is called with an unknown limit")
    return deque(cast("list[object]", items), limit)


def _make_dtype(*args: object) -> object:
    form = args[0] if args else None
    # numpy's pickles add two flags, and a state with the byte order.
    require(len(args) == 1 or args[1:] in ((False, True), (0, 1)), "numpy.dtype is called with unknown arguments")
    if isinstance(form, str):
        require(_DTYPE_TEXT.fullmatch(form) is not None, f"{form!r:.80} is not a supported dtype")
        return np.dtype(form)
    if isinstance(form, tuple):  # subarray dtypes
        require(len(form) == 2 and isinstance(form[0], np.dtype) and isinstance(form[1], tuple), "an invalid dtype")
        require(len(form[1]) <= 32 and all(type(n) is int and 0 <= n < 1 << 31 for n in form[1]), "an invalid dtype")
        return np.dtype(form)
    require(isinstance(form, dict) and set(form) == {"names", "formats", "offsets", "itemsize"}, "an invalid dtype")
    assert isinstance(form, dict)
    require(
        all(isinstance(value, list) for value in (form["names"], form["formats"], form["offsets"])), "an invalid dtype"
    )
    require(all(isinstance(field, np.dtype) for field in form["formats"]), "an invalid dtype")
    try:
        return np.dtype(form)  # type: ignore[call-overload]
    except (ValueError, TypeError) as error:
        raise FormatError(f"an invalid dtype: {error}") from error


def _make_scalar(*args: object) -> object:
    dtype, data = args if len(args) == 2 else (None, None)
    require(isinstance(dtype, np.dtype) and isinstance(data, bytes), "a numpy scalar with unknown arguments")
    assert isinstance(dtype, np.dtype)
    assert isinstance(data, bytes)
    require(not dtype.hasobject and len(data) == dtype.itemsize, "a numpy scalar of the wrong size")
    return np.frombuffer(data, dtype)[0] if data else dtype.type()


def _make_array(*args: object) -> object:
    require(len(args) == 3 and args[1:] == ((0,), b"b"), "a numpy array with unknown arguments")
    return np.empty(0, np.uint8)


def build(target: object, state: object) -> bool:
    """Set the state of an array (elements), a dtype (byte order, set already) or an ordered dict (attributes)."""
    if isinstance(target, np.dtype):
        require(isinstance(state, tuple) and len(state) in (8, 9) and state[1] in ("<", "|", "="), "an invalid dtype")
        assert isinstance(state, tuple)
        require(state[2:5] == (None, None, None), "an invalid dtype")
        return True
    if type(target) is OrderedDict and isinstance(state, Mapping) and set(state) == {"_metadata"}:
        target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        return True
    if type(target) is io.BytesIO:
        require(isinstance(state, tuple) and len(state) == 3, "a byte stream with an invalid state")
        assert isinstance(state, tuple)
        content, position, _ = state
        require(type(content) is bytes and type(position) is int and not state[2], "an invalid byte stream")
        require(0 <= position <= len(content), "a byte stream at an invalid position")
        target.write(content)
        target.seek(position)
        return True
    if type(target) is not np.ndarray:
        return False
    require(isinstance(state, tuple) and len(state) == 5, "a numpy array with an invalid state")
    assert isinstance(state, tuple)
    version, shape, dtype, is_fortran, data = state
    require(version == 1 and isinstance(shape, tuple) and isinstance(dtype, np.dtype), "an invalid numpy array")
    require(all(type(size) is int and 0 <= size < 1 << 62 for size in shape) and len(shape) <= 32, "an invalid shape")
    require(not dtype.hasobject and isinstance(data, bytes) and isinstance(is_fortran, bool), "an invalid numpy array")
    count = 1
    for size in shape:
        count *= size
    require(count * dtype.itemsize == len(data), f"a numpy array of {shape} has {len(data)} bytes")
    target.__setstate__((1, shape, dtype, is_fortran, data))
    return True


def _layout(*args: object) -> object:
    names = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
    known = {f"torch.{name}": getattr(torch, name) for name in names}
    require(len(args) == 1 and args[0] in known, "an unknown tensor layout")
    return known[args[0]]  # type: ignore[index]


def _path(kind: Any) -> Callable[..., object]:
    def make(*args: object) -> object:
        require(all(isinstance(part, str) for part in args), "a path that is not text")
        return kind(*args)

    return make


def _table() -> dict[str, Global]:
    calls: dict[str, Callable[..., object]] = {
        "builtins.set": _make_set(set),
        "builtins.frozenset": _make_set(frozenset),
        "builtins.bytearray": _checked(bytearray, (), (bytes,)),
        "builtins.complex": _checked(complex, (float, float)),
        "builtins.range": _checked(range, (int, int, int)),
        "builtins.slice": _checked(slice, ((int, _NONE), (int, _NONE), (int, _NONE))),
        "collections.Counter": _checked(Counter, (dict,)),
        "collections.deque": _make_deque,
        "collections.defaultdict": _make_defaultdict,
        "datetime.datetime": _checked(datetime.datetime, (bytes,), (bytes, datetime.tzinfo)),
        "datetime.date": _checked(datetime.date, (bytes,)),
        "datetime.time": _checked(datetime.time, (bytes,), (bytes, datetime.tzinfo)),
        "datetime.timedelta": _checked(datetime.timedelta, (int, int, int)),
        "datetime.timezone": _checked(datetime.timezone, (datetime.timedelta,), (datetime.timedelta, str)),
        "zoneinfo.ZoneInfo": _checked(zoneinfo.ZoneInfo, (str,)),
        "decimal.Decimal": _checked(decimal.Decimal, (str,)),
        "fractions.Fraction": _checked(fractions.Fraction, (int, int), (str,)),
        "numpy.dtype": _make_dtype,
        "numpy._core.multiarray.scalar": _make_scalar,
        "numpy.core.multiarray.scalar": _make_scalar,
        "numpy._core.multiarray._reconstruct": _make_array,
        "numpy.core.multiarray._reconstruct": _make_array,
        "torch.Size": _checked(torch.Size, (tuple,)),
        "torch.device": _checked(torch.device, (str,), (str, int)),
        "torch.serialization._get_layout": _layout,
        "torch.torch_version.TorchVersion": _checked(torch.torch_version.TorchVersion, (str,)),
        "milepost.make_registered": make_registered,
    }
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        kind = getattr(pathlib, name)
        is_ours = not issubclass(kind, pathlib.Path) or issubclass(type(pathlib.Path()), kind)
        make = _path(kind if is_ours else getattr(pathlib, f"Pure{name}"))
        calls[f"pathlib.{name}"] = calls[f"pathlib._local.{name}"] = make
    table = {name: Global(name, call=call) for name, call in calls.items()}
    table["_io.BytesIO"] = Global("_io.BytesIO", call=_checked(io.BytesIO, ()), new=True)
    table["numpy.ndarray"] = Global("numpy.ndarray", value=np.ndarray)
    for kind in FACTORIES:
        name = f"{kind.__module__}.{kind.__name__}"
        known = table.get(name) or PLAIN_GLOBALS.get(name)
        table[name] = Global(name, call=known.call if known is not None else None, value=kind)
    for new, old in {"set": "set", "frozenset": "frozenset", "bytearray": "bytearray", "complex": "complex"}.items():
        table[f"__builtin__.{old}"] = table[f"builtins.{new}"]
    for new, old in {"range": "xrange", "slice": "slice", "int": "long", "str": "unicode"}.items():
        table[f"__builtin__.{old}"] = table[f"builtins.{new}"]
    for name in ("float", "bool", "list", "tuple", "dict", "int"):
        table[f"__builtin__.{name}"] = table[f"builtins.{name}"]
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        table[str(dtype)] = Global(str(dtype), value=dtype, is_value=True)
    for name in _SCHEMES:
        table[f"torch.{name}"] = Global(f"torch.{name}", value=getattr(torch, name), is_value=True)
    return {**PLAIN_GLOBALS, **table}


VALUE_GLOBALS: Mapping[str, Global] = _table()
"""The globals allowed in the pickle of a value, except tensors."""

DIALECT = Dialect(
    check_key,
    lists=(list, deque),
    dicts=(dict, OrderedDict, defaultdict, Counter),
    build=build,
)
