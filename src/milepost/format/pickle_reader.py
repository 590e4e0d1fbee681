"""A pickle virtual machine that can only build data.

A pickle is a program: reading an untrusted ``.metadata`` or ``data.pkl`` with :mod:`pickle` runs its code. This reader
imports nothing and calls nothing that the file names. A global becomes a :class:`Global` from the caller's table, or
the file is refused; ``REDUCE`` calls our function for it from the table; ``NEWOBJ`` creates an inert :class:`Instance`.
Opcodes that a regular pickler since protocol 2 never writes for such data (text opcodes, ``INST``, ``OBJ``, extension
codes, persistent ids by name, sets, ``DUP``) are refused as well.

Memory is bounded: lengths are checked against the available bytes, memo indices must be used in order (so an index of
2**31 reserves nothing), and every container is charged to an allowance proportional to the file's size.

The opcodes are documented in CPython's ``Lib/pickletools.py``.
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import cast

from milepost.errors import FormatError
from milepost.format.pickle_dialect import PLAIN, Dialect, Global, Instance, OverLimitError, Persistent

MAX_PICKLE_NBYTES = 512 << 20
_MAX_MARKS = 200
_MAX_NAME_NBYTES = 300
_BASE_ALLOWANCE_NBYTES = 16 << 20
_ALLOWANCE_PER_BYTE = 32
"""Regular metadata needs about 10 bytes of memory per byte of file."""

_DICT_NBYTES, _ITEM_NBYTES, _SMALL_NBYTES = 64, 100, 56


def read_pickle(
    data: bytes,
    globals_by_name: Mapping[str, Global],
    persistent: Persistent | None = None,
    *,
    dialect: Dialect | None = None,
    max_nbytes: int = MAX_PICKLE_NBYTES,
) -> object:
    """Read a pickle into plain values, Globals, Instances and the results of ``call``.

    ``persistent`` receives the id of each ``BINPERSID``; without it they are refused. ``dialect`` allows more than
    plain containers. Raises FormatError for anything not allowed, malformed, or in need of too much memory.
    """
    if len(data) > max_nbytes:
        raise OverLimitError(f"a pickle of {len(data)} bytes: at most {max_nbytes} are read")
    machine = _Machine(bytes(data), globals_by_name, persistent, dialect or PLAIN)
    try:
        return machine.run()
    except (IndexError, struct.error):
        raise FormatError(f"a pickle is truncated or malformed near byte {machine.pos}") from None
    except UnicodeError:
        raise FormatError(f"a pickle holds invalid text near byte {machine.pos}") from None


class _Machine:
    """One run over one pickle. Each method implements its opcode in ``_OPCODES``."""

    __slots__ = ("allowance", "data", "dialect", "globals", "marks", "memo", "persistent", "pos", "sizes", "stack")

    def __init__(
        self,
        data: bytes,
        globals_by_name: Mapping[str, Global],
        persistent: Callable[[object], object] | None,
        dialect: Dialect,
    ):
        self.data = data
        self.dialect = dialect
        self.pos = 0
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: list[object] = []
        self.sizes: dict[tuple[object, ...], tuple[object, ...]] = {}  # interned tuples of one to three numbers
        self.globals = globals_by_name
        self.persistent = persistent
        self.allowance = _BASE_ALLOWANCE_NBYTES + _ALLOWANCE_PER_BYTE * len(data)

    def run(self) -> object:
        data, opcodes = self.data, _OPCODES
        if data[0] != 0x80:
            raise FormatError("not a pickle of protocol 2 or later")
        while True:
            opcode = data[self.pos]
            self.pos += 1
            if opcode == 0x2E:  # STOP
                break
            opcodes[opcode](self)
        if self.marks or len(self.stack) != 1:
            raise FormatError("a pickle ends before its value is complete")
        return self.stack[0]

    def charge(self, nbytes: int) -> None:
        self.allowance -= nbytes
        if self.allowance < 0:
            raise OverLimitError(
                f"a pickle of {len(self.data)} bytes expands to far more memory than its size justifies"
            )

    def take(self, nbytes: int) -> bytes:
        start = self.pos
        self.pos = stop = start + nbytes
        if stop > len(self.data):
            raise FormatError(f"a pickle is truncated: expected {nbytes} bytes at byte {start}")
        return self.data[start:stop]

    def pop_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def refuse(self) -> None:
        raise FormatError(f"pickle opcode 0x{self.data[self.pos - 1]:02x} at byte {self.pos - 1} is not allowed")

    # ---- frame ----

    def proto(self) -> None:
        version = self.data[self.pos]
        self.pos += 1
        if not 2 <= version <= 5:
            raise FormatError(f"pickle protocol {version} is not supported")

    def frame(self) -> None:
        self.take(8)  # a hint for readers of streams

    # ---- scalars ----

    def none(self) -> None:
        self.stack.append(None)

    def true(self) -> None:
        self.stack.append(True)

    def false(self) -> None:
        self.stack.append(False)

    def binint1(self) -> None:
        self.stack.append(self.data[self.pos])
        self.pos += 1

    def binint2(self) -> None:
        self.stack.append(int.from_bytes(self.take(2), "little"))

    def binint(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def run_of_numbers(self) -> None:
        """Read many numbers of one form at once, as in a long list."""
        self.pos -= 1
        opcode = self.data[self.pos]
        found = _RUNS[opcode].match(self.data, self.pos)
        if found is None:
            self.pos += 1
            _ONE_NUMBER[opcode](self)
            return
        self.pos = found.end()
        code, nbytes = _NUMBERS[opcode]
        count = (found.end() - found.start()) // nbytes
        self.stack.extend(struct.unpack(f"{'>' if code == 'd' else '<'}{f'x{code}' * count}", found.group()))

    def long1(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.take(1)[0]), "little", signed=True))

    def long4(self) -> None:
        self.stack.append(int.from_bytes(self.take(int.from_bytes(self.take(4), "little")), "little", signed=True))

    def binfloat(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def text(self, nbytes: int) -> None:
        self.stack.append(self.take(nbytes).decode("utf-8", "surrogatepass"))

    def short_binunicode(self) -> None:
        self.text(self.take(1)[0])

    def binunicode(self) -> None:
        self.text(int.from_bytes(self.take(4), "little"))

    def binunicode8(self) -> None:
        self.text(int.from_bytes(self.take(8), "little"))

    def short_binbytes(self) -> None:
        self.stack.append(self.take(self.take(1)[0]))

    def binbytes(self) -> None:
        self.stack.append(self.take(int.from_bytes(self.take(4), "little")))

    def binbytes8(self) -> None:
        self.stack.append(self.take(int.from_bytes(self.take(8), "little")))

    # ---- containers ----

    def mark(self) -> None:
        if len(self.marks) >= _MAX_MARKS:
            raise OverLimitError(f"a pickle is nested deeper than {_MAX_MARKS} levels")
        self.charge(_SMALL_NBYTES)
        self.marks.append(self.stack)
        self.stack = []

    def empty_tuple(self) -> None:
        self.stack.append(())

    def tuple_of(self, count: int) -> None:
        stack = self.stack
        if len(stack) < count:
            raise IndexError
        self.charge(_SMALL_NBYTES)
        made = tuple(stack[-count:])
        if all(type(item) is int for item in made):
            made = self.sizes.setdefault(made, made)  # few sizes, and many tensors that have them
        stack[-count:] = [made]

    def tuple1(self) -> None:
        self.tuple_of(1)

    def tuple2(self) -> None:
        self.tuple_of(2)

    def tuple3(self) -> None:
        self.tuple_of(3)

    def tuple_(self) -> None:
        items = self.pop_mark()
        self.charge(_SMALL_NBYTES + 8 * len(items))
        self.stack.append(tuple(items))

    def empty_list(self) -> None:
        self.charge(_SMALL_NBYTES)
        self.stack.append([])

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) not in self.dialect.lists:
            raise FormatError(f"a pickle appends to a {type(target).__name__}")
        self.charge(8 * len(items))
        cast("list[object]", target).extend(items)

    def append(self) -> None:
        item = self.stack.pop()
        self.extend([item])

    def appends(self) -> None:
        self.extend(self.pop_mark())

    def empty_dict(self) -> None:
        self.charge(_DICT_NBYTES)
        self.stack.append({})

    def update(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) not in self.dialect.dicts:
            raise FormatError(f"a pickle sets items of a {type(target).__name__}")
        mapping = cast("dict[object, object]", target)
        if len(items) % 2:
            raise FormatError("a pickle sets a dict key without a value")
        self.charge(_ITEM_NBYTES * (len(items) // 2))
        for index in range(0, len(items), 2):
            key = items[index]
            # No nested value that is hashed by content: that can take time exponential in its depth.
            if type(key) is not str and type(key) is not Instance:
                self.dialect.check_key(key)
            mapping[key] = items[index + 1]

    def setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.update([key, value])

    def setitems(self) -> None:
        self.update(self.pop_mark())

    # ---- memo ----

    def memoize(self) -> None:
        self.memo.append(self.stack[-1])

    def put(self, index: int) -> None:
        memo = self.memo
        if index == len(memo):
            memo.append(self.stack[-1])
        elif index < len(memo):
            memo[index] = self.stack[-1]
        else:
            raise FormatError(f"a pickle writes memo entry {index} when it has {len(memo)}")

    def binput(self) -> None:
        self.put(self.take(1)[0])

    def long_binput(self) -> None:
        self.put(int.from_bytes(self.take(4), "little"))

    def binget(self) -> None:
        self.stack.append(self.memo[self.data[self.pos]])
        self.pos += 1

    def long_binget(self) -> None:
        self.stack.append(self.memo[int.from_bytes(self.take(4), "little")])

    # ---- globals and objects ----

    def find(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise FormatError("a pickle names a global by a value that is not text")
        found = self.globals.get(f"{module}.{name}")
        if found is None:
            raise FormatError(f"a pickle asks for {f'{module}.{name}'!r:.200}, which is not allowed; nothing was run")
        self.stack.append(found.value if found.is_value else found)

    def line(self) -> str:
        stop = self.data.find(b"\n", self.pos, self.pos + _MAX_NAME_NBYTES)
        if stop < 0:
            raise FormatError(f"a pickle has an unterminated global name at byte {self.pos}")
        text = self.data[self.pos : stop].decode("utf-8")
        self.pos = stop + 1
        return text

    def global_(self) -> None:
        module = self.line()
        self.find(module, self.line())

    def stack_global(self) -> None:
        name = self.stack.pop()
        self.find(self.stack.pop(), name)

    def reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack.pop()
        if not (isinstance(function, Global) and function.call is not None and type(args) is tuple):
            named = f"{function.name!r}" if isinstance(function, Global) else f"a {type(function).__name__}"
            raise FormatError(f"a pickle calls {named}, which is not allowed; nothing was run")
        self.charge(_SMALL_NBYTES)
        value = function.call(*args)
        if isinstance(value, str | bytes | tuple):  # its arguments may be referenced repeatedly
            self.charge(len(value) * (8 if isinstance(value, tuple) else 1))
        self.stack.append(value)

    def newobj(self) -> None:
        args = self.stack.pop()
        cls = self.stack.pop()
        if not (isinstance(cls, Global) and cls.new and args == ()):
            named = f"{cls.name!r}" if isinstance(cls, Global) else f"a {type(cls).__name__}"
            raise FormatError(f"a pickle makes an instance of {named}, which is not allowed; nothing was run")
        self.charge(_SMALL_NBYTES)
        self.stack.append(Instance(cls.name) if cls.call is None else cls.call())

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(state) is tuple:  # an object may copy its argument, repeatedly
            self.charge(sum(len(part) for part in state if type(part) is bytes))
        if self.dialect.build(target, state):
            return
        if type(target) is OrderedDict and type(state) is dict:
            return  # ``module.state_dict()`` attaches its modules' versions to the dict, which are not content
        if type(target) is not Instance or target.state is not None or type(state) not in (dict, tuple):
            raise FormatError(f"a pickle sets the state of a {type(target).__name__}, which is not allowed")
        target.state = state

    def binpersid(self) -> None:
        if self.persistent is None:
            raise FormatError("a pickle refers to data outside itself, which is not allowed here")
        self.stack.append(self.persistent(self.stack.pop()))


_NUMBERS = {0x4B: ("B", 2), 0x4D: ("H", 3), 0x4A: ("i", 5), 0x47: ("d", 9)}
_RUNS = {
    opcode: re.compile(b"(?:%c.{%d}){16,1024}" % (opcode, nbytes - 1), re.DOTALL)
    for opcode, (_, nbytes) in _NUMBERS.items()
}
_ONE_NUMBER = {0x4B: _Machine.binint1, 0x4D: _Machine.binint2, 0x4A: _Machine.binint, 0x47: _Machine.binfloat}


def _opcode_table() -> list[Callable[[_Machine], None]]:
    table: list[Callable[[_Machine], None]] = [_Machine.refuse] * 256
    for opcode, method in {
        b"\x80": _Machine.proto,
        b"\x95": _Machine.frame,
        b"N": _Machine.none,
        b"\x88": _Machine.true,
        b"\x89": _Machine.false,
        b"K": _Machine.run_of_numbers,
        b"M": _Machine.run_of_numbers,
        b"J": _Machine.run_of_numbers,
        b"\x8a": _Machine.long1,
        b"\x8b": _Machine.long4,
        b"G": _Machine.run_of_numbers,
        b"\x8c": _Machine.short_binunicode,
        b"X": _Machine.binunicode,
        b"\x8d": _Machine.binunicode8,
        b"C": _Machine.short_binbytes,
        b"B": _Machine.binbytes,
        b"\x8e": _Machine.binbytes8,
        b"(": _Machine.mark,
        b")": _Machine.empty_tuple,
        b"\x85": _Machine.tuple1,
        b"\x86": _Machine.tuple2,
        b"\x87": _Machine.tuple3,
        b"t": _Machine.tuple_,
        b"]": _Machine.empty_list,
        b"a": _Machine.append,
        b"e": _Machine.appends,
        b"}": _Machine.empty_dict,
        b"s": _Machine.setitem,
        b"u": _Machine.setitems,
        b"\x94": _Machine.memoize,
        b"q": _Machine.binput,
        b"r": _Machine.long_binput,
        b"h": _Machine.binget,
        b"j": _Machine.long_binget,
        b"c": _Machine.global_,
        b"\x93": _Machine.stack_global,
        b"R": _Machine.reduce,
        b"\x81": _Machine.newobj,
        b"b": _Machine.build,
        b"Q": _Machine.binpersid,
    }.items():
        table[opcode[0]] = method
    return table


_OPCODES = _opcode_table()
