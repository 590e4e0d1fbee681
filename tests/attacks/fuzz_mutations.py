"""Changed copies of valid inputs: bytes, JSON, text, pickles and zip records, each damaged in the way it can be.

A mutator takes a random generator, an input and others of its kind, and gives a new input of at most ``MAX_NBYTES``.
Those that know a format undo its frame (lengths, CRC-32s), change what is inside, and make the frame right again, so
that what they make gets past the first check.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import random
import struct
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from milepost.format.digest import crc32

MAX_NBYTES = 256 << 10

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

EDGES = sorted(
    {
        sign * (1 << bits) + d
        for bits in (0, 7, 8, 15, 16, 31, 32, 53, 62, 63, 64)
        for d in (-1, 0, 1)
        for sign in (1, -1)
    }
)
"""Numbers at which something overflows."""


# ---- bytes ----


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to six edits of ``data`` as bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_BYTE_EDITS)(rng, changed, rng.choice(others))
    return bytes(changed[:MAX_NBYTES])


def _stretch(rng: random.Random, nbytes: int, longest: int = 64) -> slice:
    start = rng.randint(0, nbytes)
    return slice(start, min(nbytes, start + rng.randint(0, longest)))


def _flip(rng: random.Random, data: bytearray, other: bytes) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, other: bytes) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(rng: random.Random, data: bytearray, other: bytes) -> None:
    """A length field, whatever its width: an edge, or a little more or less than it was."""
    width = rng.choice((1, 2, 4, 8))
    at = rng.randint(0, max(0, len(data) - width))
    order = rng.choice(("little", "little", "big"))
    was = int.from_bytes(data[at : at + width], order)
    value = rng.choice((rng.choice(EDGES), was + rng.randint(-3, 3), was * 2, len(data)))
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)


def _delete(rng: random.Random, data: bytearray, other: bytes) -> None:
    del data[_stretch(rng, len(data))]


def _repeat(rng: random.Random, data: bytearray, other: bytes) -> None:
    where = _stretch(rng, len(data), 16)
    part = bytes(data[where])
    data[where] = part * rng.choice((2, 2, 3, 10, 1000))


def _insert(rng: random.Random, data: bytearray, other: bytes) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.randbytes(rng.randint(1, 12))


def _splice(rng: random.Random, data: bytearray, other: bytes) -> None:
    data[_stretch(rng, len(data))] = other[_stretch(rng, len(other))]


def _cut(rng: random.Random, data: bytearray, other: bytes) -> None:
    del data[rng.randint(0, len(data)) :]


def _zero(rng: random.Random, data: bytearray, other: bytes) -> None:
    where = _stretch(rng, len(data), 512)
    data[where] = bytes(where.stop - where.start)


_BYTE_EDITS = (_flip, _flip, _set, _number, _number, _delete, _repeat, _insert, _splice, _splice, _cut, _zero)


# ---- JSON ----

_DEEP = "@@deep@@"
_LONG = "@@long@@"
_TWICE = "@@twice@@"


def mutate_json(rng: random.Random, text: bytes, others: Sequence[bytes]) -> bytes:
    """One to four edits of a JSON document's tree, then perhaps one that no tree can hold."""
    try:
        tree = json.loads(text)
        other = json.loads(rng.choice(others))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            tree = _edit_tree(rng, tree, other)
        out = json.dumps(tree, separators=(", ", ": "))
    except (ValueError, RecursionError, OverflowError):  # no JSON, or as deep or large as what was made of it before
        return mutate_bytes(rng, text, others)
    depth = rng.choice((90, 900, 100_000))
    out = out.replace(f'"{_DEEP}"', "[" * depth + "]" * depth)
    out = out.replace(f'"{_LONG}"', rng.choice(("-", "", "1.")) + "9" * rng.choice((30, 400, 4400)))
    out = out.replace(f'"{_TWICE}": ', '"nbytes": 1, "nbytes": ')
    return out.encode("utf-8", "surrogatepass")[:MAX_NBYTES]


def _edit_tree(rng: random.Random, tree: Any, other: Any) -> Any:
    """``tree`` with one part of it changed; in place but for the top."""
    places = list(_places(tree))
    if not places or rng.random() < 0.01:
        return _any_value(rng)
    # Half of the time near the top, where less depends on the rest of the document.
    holder, key = places[int(len(places) * rng.random() ** rng.choice((1, 4)))]
    edit = rng.randrange(8)
    if edit == 0:
        del holder[key]
    elif edit == 1 and isinstance(holder, list):
        holder.insert(key, holder[rng.randrange(len(holder))])
    elif edit == 1:
        holder[rng.choice((_TWICE, "\ud800", "", "__metadata__", "step", "shape"))] = holder[key]
    elif edit == 2:
        from_holder, from_key = rng.choice(places)
        holder[key] = json.loads(json.dumps(from_holder[from_key]))  # a copy: the tree must stay one
    elif edit == 3 and (theirs := list(_places(other))):
        from_holder, from_key = rng.choice(theirs)
        holder[key] = json.loads(json.dumps(from_holder[from_key]))
    elif edit == 4 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((holder[key] + rng.choice((-1, 1)), -holder[key], holder[key] * 2, float(holder[key])))
    elif edit == 5 and isinstance(holder[key], list):
        holder[key] = holder[key] * (rng.choice((0, 2, 100)) if len(json.dumps(holder[key])) < 1000 else 0)
    elif edit == 6 and isinstance(holder[key], str):
        holder[key] = rng.choice((holder[key] + "x", holder[key][:-1], "../" + holder[key], holder[key].upper()))
    else:
        holder[key] = _any_value(rng)
    return tree


def _places(tree: Any) -> Iterable[tuple[Any, Any]]:
    """(container, key) of every part of a tree, level by level."""
    pending = deque([tree])
    while pending:
        node = pending.popleft()
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            yield node, key
            pending.append(node[key])


def _any_value(rng: random.Random) -> Any:
    plain = (None, True, False, "", "\ud800", "\x00", "a\nb", "../../x", "\x1b[2J", "é" * 300, [], {}, [[]], {"": None})
    numbers = (0.5, -0.0, 1e308, 1e400, float("nan"), _LONG, _LONG, _DEEP)
    return rng.choice((rng.choice(plain), rng.choice(EDGES), rng.choice(numbers)))


# ---- text ----


def mutate_toml(rng: random.Random, text: bytes, others: Sequence[bytes]) -> bytes:
    """One to four edits of lines: dropped, doubled, moved, with other values, or with what breaks a parser."""
    lines = text.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        edit = rng.randrange(6)
        if edit == 0:
            del lines[at]
        elif edit == 1:
            lines.insert(rng.randint(0, len(lines)), lines[at])
        elif edit == 2:
            lines.insert(at, rng.choice(rng.choice(others).split(b"\n")))
        elif edit == 3:
            lines[at] = mutate_bytes(rng, lines[at], others)
        else:
            lines[at] = lines[at].partition(b"=")[0] + b"= " + _toml_value(rng)
        lines = lines or [b""]
    return b"\n".join(lines)[:MAX_NBYTES]


def _toml_value(rng: random.Random) -> bytes:
    depth, digits = rng.choice((5, 200, 2000)), rng.choice((20, 400, 4400))
    return rng.choice(
        (
            str(rng.choice(EDGES)).encode(),
            b"9" * digits,
            b"-" + b"9" * digits,
            b"0x" + b"f" * digits,
            b"1" + b"_1" * digits,
            b"1e" + b"9" * 5,
            rng.choice(
                (b"nan", b"inf", b"-inf", b"0.5", b"-0.0", b"true", b'""', b"[]", b"{}", b"1979-05-27T07:32:00Z")
            ),
            b"[" * depth + b"]" * depth,
            b"{a = " * depth + b"1" + b"}" * depth,
            b'"' + b"a" * rng.choice((300, 5000, 50_000)) + b'"',
            b'"' + rng.choice((b"\\u0000", b"\\uD800", b"../../x", b"/dev/null", b"/proc/self/mem", b"\\e[2J")) + b'"',
            b"'''" + b"\n" * 50,
            b"a." * depth + b"b = 1",
        )
    )


# ---- pickles ----

_HOSTILE_OPCODES = (
    *(b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"csubprocess\nPopen\n", b"cbuiltins\ngetattr\n"),
    *(b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"cpathlib\nPosixPath\n", b"ctorch\nSize\n"),
    *(b"ctorch\nfloat32\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nbytearray\n"),
    *(b"ctorch\nFloatStorage\n", b"X\x09\0\0\0touch pwn", b"X\x02\0\0\0id", b"\x8c\x09os.system"),
    *(b"X\xff\xff\xff\xff", b"B\xff\xff\xff\x7f", b"\x8a\xff" + b"\x7f" * 255, b"G" + b"\x7f\xf8" * 4),
    *(
        code + struct.pack("<Q", 1 << bits)
        for code, bits in ((b"\x8d", 60), (b"\x8e", 62), (b"\x96", 40), (b"\x95", 60))
    ),
    *(b"\x8a\x09" + b"\xff" * 8 + b"\0", b"K\x00", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f"),
    *(bytes([code]) for code in b"N\x88]})(aesut\x85\x86\x87Rb\x81\x92Q\x93021\x94io\x90\x91\x97."),
    *(
        b"q\x00",
        b"q\xff",
        b"r\xff\xff\xff\x7f",
        b"j\xff\xff\xff\x7f",
        b"\x82\x01",
        b"h\x00h\x00\x86",
        b"h\x00h\x00\x86R",
    ),
    *(b"](h\x00h\x00e", b"}h\x00h\x00s", b"h\x01h\x02R\x94", b"h\x00)\x81}b"),
)


_WITH_VALUE = (b"K", b"M", b"J", b"X", b"\x8c", b"h")
"""Opcodes that end with a number or with text: another value leaves the pickle whole."""


def mutate_pickle(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to eight edits of a pickle's opcodes: dropped, doubled, moved, replaced by another's or by a hostile one."""
    mine, theirs = _opcodes(data), _opcodes(rng.choice(others))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(mine))
        edit = rng.randrange(10)
        if edit == 0:
            del mine[at : at + rng.choice((1, 1, 2, 5))]
        elif edit == 1:
            mine.insert(at, b"".join(mine[at : at + rng.randint(1, 4)])[:500] * rng.choice((1, 2, 40, 500)))
        elif edit == 2:
            mine.insert(rng.randint(0, len(mine)), mine[at])
        elif edit == 3:
            other = rng.randrange(len(theirs))
            mine[at : at + rng.randint(0, 3)] = theirs[other : other + rng.randint(1, 12)]
        elif edit == 4:
            mine[at] = mutate_bytes(rng, mine[at], theirs)
        elif edit == 5:
            mine[at] = b"h%c" % rng.randrange(256)
        elif edit >= 8 and mine[at]:
            at = rng.choice([at for at, opcode in enumerate(mine) if opcode[:1] in _WITH_VALUE] or [at])
            mine[at] = mine[at][:-1] + bytes([(mine[at][-1] + rng.choice((-1, 1, 128))) % 256])
        else:
            mine[at : at + rng.randint(0, 1)] = [rng.choice(_HOSTILE_OPCODES)]
        mine = mine or [b"N"]
    return b"".join(mine)[:MAX_NBYTES]


def _opcodes(data: bytes) -> list[bytes]:
    """``data`` cut before each of its opcodes; what follows a malformed one stays in one piece."""
    starts = [0]
    with contextlib.suppress(Exception):  # genops raises whatever its readers do
        for _, _, position in pickletools.genops(data):
            starts.append(position or 0)
    return [data[start:stop] for start, stop in pairwise([*starts, len(data)]) if stop > start] or [b"N"]


def mutate_zip(change_pickle: Mutator = mutate_pickle) -> Mutator:
    """For ``torch.save`` archives: the bytes as they are, or their pickle, the zip around it written again."""

    def mutate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(rng, data, others)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = {info.filename: archive.read(info) for info in archive.infolist()}
        except Exception:  # noqa: BLE001 - zipfile raises all kinds of errors for malformed archives
            return mutate_bytes(rng, data, others)
        for name in [name for name in entries if name.endswith("data.pkl")]:
            entries[name] = change_pickle(rng, entries[name], [*_pickles(others), entries[name]])
        if rng.random() < 0.2 and entries:
            name = rng.choice(sorted(entries))
            entries[rng.choice((name, name + "x", "../" + name, "archive/data/1"))] = entries.pop(name)
        return zip_of(entries, rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)))[:MAX_NBYTES]

    return mutate


def _pickles(archives: Sequence[bytes]) -> list[bytes]:
    found = []
    for data in archives[:8]:
        start = data.find(b"\x80\x02")
        stop = data.find(b".PK", start)
        if 0 <= start < stop:
            found.append(data[start : stop + 1])
    return found


def zip_of(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of ``entries``, with right CRC-32s."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return buffer.getvalue()


# ---- frames ----


def framed(
    unwrap: Callable[[bytes], bytes | None], wrap: Callable[[bytes, bytes], bytes], inner: Mutator, *, raw: float = 0.2
) -> Mutator:
    """Changes the content that ``unwrap`` takes out of an input; ``wrap(changed, input)`` puts a valid frame around it.

    Inputs without a frame, and a part ``raw`` of the others, are changed as bytes.
    """

    def mutate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
        content = unwrap(data)
        if content is None or rng.random() < raw:
            return mutate_bytes(rng, data, others)
        insides = [found for other in others[:8] if (found := unwrap(other)) is not None] or [content]
        return wrap(inner(rng, content, insides), data)[:MAX_NBYTES]

    return mutate


def with_crc(inner: Mutator) -> Mutator:
    """For files that end with the CRC-32 of all before it."""
    return framed(
        lambda data: data[:-4] if len(data) >= 4 else None,
        lambda content, _: content + struct.pack("<I", crc32(content)),
        inner,
    )
