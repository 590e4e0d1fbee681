"""Plain Python values to and from pickle, without :mod:`pickle`: the stored form of a state dict's plain leaves.

Plain values are None, bool, int, float, str, bytes, list, tuple, dict and OrderedDict, with str or int keys. They are
written in protocol 2 with the opcodes accepted by ``torch.load(weights_only=True)``, and read by ``pickle_reader``,
which runs no code.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable

from milepost.errors import FormatError
from milepost.format.pickle_dialect import Global
from milepost.format.pickle_reader import read_pickle

MAX_DEPTH = 100
MAX_NODES = 10_000_000
_MAX_INT_NBYTES = 255  # the limit of LONG1; weights_only supports no longer form

PROTO_2 = b"\x80\x02"
STOP = b"."
_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def dump_plain(value: object) -> bytes:
    """Return a protocol 2 pickle of a plain value.

    Raises TypeError for any other value, including subclasses of plain types (whose type would be lost), and for values
    nested deeper than 100 levels or containing themselves.
    """
    out = [PROTO_2]
    _emit(value, out.append, 0)
    out.append(STOP)
    return b"".join(out)


def int_opcodes(value: int) -> bytes:
    """Return the opcodes that push an int, chosen like CPython's pickler."""
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    nbytes = (value.bit_length() >> 3) + 1
    if nbytes > _MAX_INT_NBYTES:
        raise TypeError(f"an int of {value.bit_length()} bits is too large to store as a plain value")
    return b"\x8a%c" % nbytes + value.to_bytes(nbytes, "little", signed=True)


def str_opcodes(value: str) -> bytes:
    """Return the opcodes that push a str."""
    text = value.encode("utf-8", "surrogatepass")
    return b"X" + len(text).to_bytes(4, "little") + text


def _emit(value: object, put: Callable[[bytes], object], depth: int) -> None:
    emit = _EMITTERS.get(type(value))
    if emit is None:
        raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} is not a plain value")
    if depth > MAX_DEPTH:
        raise TypeError(f"a value nested deeper than {MAX_DEPTH} levels is not plain (does it contain itself?)")
    emit(value, put, depth + 1)


def _emit_bytes(value: bytes, put: Callable[[bytes], object], depth: int) -> None:
    # Protocol 2 has no bytes; CPython's pickler writes this call, which weights_only accepts.
    put(b"c_codecs\nencode\n" + str_opcodes(value.decode("latin-1")) + b"X\x06\x00\x00\x00latin1\x86R")


def _emit_list(value: list[object], put: Callable[[bytes], object], depth: int) -> None:
    put(b"](")
    for item in value:
        _emit(item, put, depth)
    put(b"e")


def _emit_tuple(value: tuple[object, ...], put: Callable[[bytes], object], depth: int) -> None:
    put(b"(")
    for item in value:
        _emit(item, put, depth)
    put(b"t")


def _emit_items(value: dict[object, object], put: Callable[[bytes], object], depth: int) -> None:
    put(b"(")
    for key, item in value.items():
        if type(key) is not str and type(key) is not int:
            raise TypeError(f"a dict with a key of type {type(key).__qualname__} is not a plain value")
        _emit(key, put, depth)
        _emit(item, put, depth)
    put(b"u")


def _emit_dict(value: dict[object, object], put: Callable[[bytes], object], depth: int) -> None:
    put(b"}")
    _emit_items(value, put, depth)


def _emit_ordered_dict(value: OrderedDict[object, object], put: Callable[[bytes], object], depth: int) -> None:
    put(_EMPTY_ORDERED_DICT)
    _emit_items(value, put, depth)


_EMITTERS: dict[type, Callable[..., None]] = {
    type(None): lambda value, put, depth: put(b"N"),
    bool: lambda value, put, depth: put(b"\x88" if value else b"\x89"),
    int: lambda value, put, depth: put(int_opcodes(value)),
    float: lambda value, put, depth: put(b"G" + struct.pack(">d", value)),
    str: lambda value, put, depth: put(str_opcodes(value)),
    bytes: _emit_bytes,
    list: _emit_list,
    tuple: _emit_tuple,
    dict: _emit_dict,
    OrderedDict: _emit_ordered_dict,
}


def encode_latin1(*args: object) -> bytes:
    """Stand in for ``_codecs.encode`` in a pickle of bytes: text whose code points are the bytes."""
    if not (len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1")):
        raise FormatError("_codecs.encode is not used for bytes")
    return args[0].encode("latin-1")


def ordered_dict(*args: object) -> OrderedDict[object, object]:
    """Stand in for ``collections.OrderedDict``: always created empty; its items follow."""
    if args:
        raise FormatError("collections.OrderedDict is called with arguments")
    return OrderedDict()


def empty_bytes(*args: object) -> bytes:
    """Stand in for ``bytes`` in protocol 2: CPython's pickler writes ``b""`` as a call without arguments."""
    if args:
        raise FormatError("bytes is called with arguments")
    return b""


PLAIN_GLOBALS = {
    "_codecs.encode": Global("_codecs.encode", call=encode_latin1),
    "collections.OrderedDict": Global("collections.OrderedDict", call=ordered_dict),
    "__builtin__.bytes": Global("__builtin__.bytes", call=empty_bytes),
    "builtins.bytes": Global("builtins.bytes", call=empty_bytes),
}


def load_plain(data: bytes) -> object:
    """Return the plain value in a pickle. Raises FormatError for any other content; runs no code from it.

    A value that would expand to more than ten million parts (by repeated references) is also refused.
    """
    value = read_pickle(data, PLAIN_GLOBALS)
    _check_plain(value)
    return value


def _check_plain(value: object) -> None:
    """Refuse values that are not plain, contain themselves, are nested too deep or expand too much."""
    sizes: dict[int, int] = {}  # id of a finished container -> number of its parts after expansion
    open_ids: set[int] = set()

    def measure(node: object, depth: int) -> int:
        if not isinstance(node, list | tuple | dict):
            if node is not None and not isinstance(node, bool | int | float | str | bytes):
                raise FormatError(f"expected a plain value, found a {type(node).__name__}")
            return 1
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in open_ids or depth > MAX_DEPTH:
            raise FormatError(f"a value contains itself or is nested deeper than {MAX_DEPTH} levels")
        open_ids.add(id(node))
        parts = node.values() if isinstance(node, dict) else node
        if isinstance(node, dict) and not all(isinstance(key, str | int) for key in node):
            raise FormatError("a dict key is neither text nor a number")
        total = 1 + sum(measure(part, depth + 1) for part in parts)
        if total > MAX_NODES:
            raise FormatError(f"a value expands to more than {MAX_NODES} parts")
        open_ids.remove(id(node))
        sizes[id(node)] = total
        return total

    measure(value, 0)
