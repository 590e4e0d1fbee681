"""Malicious files: whatever they hold, reading them raises FormatError, soon, and has no other effect."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from format_1 import to_json_1
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from manifests import StoredBox, lay_out, read_back, record_files

from milepost.errors import FormatError
from milepost.format.box import Box
from milepost.format.dcp_metadata import manifest_from_metadata, parse_metadata
from milepost.format.dcp_writer import dump_metadata
from milepost.format.digest import crc32, dump_digests, parse_digests
from milepost.format.manifest import MANIFEST_NAME, SHARDS_NAME
from milepost.format.manifest_json import from_json
from milepost.format.pickle_reader import read_pickle
from milepost.format.plain_pickle import load_plain
from milepost.format.record import object_record, record_footer, tensor_record
from milepost.format.record_reader import TENSOR_GLOBALS, locate_tensor, read_object
from milepost.format.shards_file import parse_shards

LAYOUT = lay_out(
    {
        "w": ("float32", (4, 2), [StoredBox(Box((i, 0), (1, 2)), b"12345678", f"__{i}_0.distcp") for i in range(4)]),
        "f8": ("float8_e4m3fn", (3,), [StoredBox(Box((0,), (3,)), b"abc")]),
    },
    {"optimizer.lr": 0.1, "deep": {"a": [1, (2, b"x"), {"b": None}], 3: "text"}},
)
SIZES = {name: len(content) for name, content in LAYOUT.files.items()}
METADATA = dump_metadata(LAYOUT.manifest)
MANIFEST = to_json_1(LAYOUT.manifest)
RECORD_FILES = record_files(LAYOUT.manifest)
SHARDS = RECORD_FILES[SHARDS_NAME]
DIGESTS = dump_digests(LAYOUT.manifest.save_id, LAYOUT.crcs)
OBJECT = object_record({"a": [1, 2.5, "x", b"y", None, True], "b": {"c": (1, 2)}})
TENSOR = tensor_record("float32", (4, 2))
RECORD = TENSOR.header + bytes(32) + record_footer(TENSOR, crc32(bytes(32)))


def zip_of(pickled: bytes, data: bytes = b"") -> bytes:
    """A record with any pickle in it, CRCs right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def locate(record: bytes) -> object:
    return locate_tensor(lambda offset, nbytes: record[offset : offset + nbytes], len(record))


READERS: dict[str, Callable[[bytes], object]] = {
    "metadata": parse_metadata,
    "object": lambda pickled: read_object(zip_of(pickled)),
    "tensor": lambda pickled: locate(zip_of(pickled)),
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


# ---- code ----


class Reduce:
    """An object whose pickle calls ``function(*args)``."""

    def __init__(self, function: Callable[..., object], *args: object):
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


COMMAND = "touch {marker}"
PROGRAMS: dict[str, bytes] = {
    "GLOBAL os.system": b"\x80\x02cos\nsystem\n" + text(COMMAND) + b"\x85R.",
    "GLOBAL posix.system": b"\x80\x02cposix\nsystem\n" + text(COMMAND) + b"\x85R.",
    "STACK_GLOBAL eval": b"\x80\x04" + text("builtins") + text("eval") + b"\x93" + text("1") + b"\x85R.",
    "STACK_GLOBAL with dots": b"\x80\x04" + text("torch") + text("os.system") + b"\x93" + text(COMMAND) + b"\x85R.",
    "GLOBAL of python 2": b"\x80\x02c__builtin__\nexec\n" + text("1") + b"\x85R.",
    "GLOBAL subprocess": b"\x80\x02csubprocess\nPopen\n" + text(COMMAND) + b"\x85R.",
    "GLOBAL torch loader": b"\x80\x02ctorch\nload\n" + text("x") + b"\x85R.",
    "GLOBAL torch hub": b"\x80\x02ctorch.hub\nload\n" + text("x") + b"\x85R.",
    "REDUCE of text": b"\x80\x02" + text("os.system") + text("x") + b"\x85R.",
    "REDUCE of dtype": b"\x80\x02ctorch\nfloat32\n" + text("x") + b"\x85R.",
    "REDUCE without tuple": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "INST": b"\x80\x02(" + text(COMMAND) + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + text(COMMAND) + b"o.",
    "NEWOBJ of os": b"\x80\x02csubprocess\nPopen\n" + text(COMMAND) + b"\x85\x81.",
    "NEWOBJ of function": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n)}\x92.",
    "BUILD on text": b"\x80\x02" + text("x") + b"}b.",
    "BUILD on dict": b"\x80\x02}}b.",
    "BUILD on dtype": b"\x80\x02ctorch\nfloat32\n}b.",
    "BUILD with text": b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81" + text("x") + b"b.",
    "getattr of anything": b"\x80\x02cbuiltins\ngetattr\nctorch\nfloat32\n" + text("__class__") + b"\x86R.",
    "codecs of anything": b"\x80\x02c_codecs\nencode\n" + text("x") + text("zlib") + b"\x86R.",
    "codecs beyond latin-1": b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xac" + text("latin1") + b"\x86R.",
    "PERSID": b"\x80\x02Pstorage\n.",
    "BINPERSID": b"\x80\x02" + text("storage") + b"Q.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "protocol 0": b"cos\nsystem\n(S'" + COMMAND.encode() + b"'\ntR.",
    "INT": b"\x80\x02I" + b"9" * 100_000 + b"\n.",
    "LONG": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "STRING": b"\x80\x02S'x'\n.",
    "FLOAT": b"\x80\x02F1.5\n.",
    "UNICODE": b"\x80\x02Vx\n.",
    "set": pickle.dumps({1, 2}, 4),
    "frozenset": pickle.dumps(frozenset({1}), 4),
    "bytearray": pickle.dumps(bytearray(b"x"), 5),
    "DUP": b"\x80\x02]2a.",
    "POP": b"\x80\x02]]0.",
    "buffer": b"\x80\x05\x97.",
}


@every_reader
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_are_refused_and_not_run(read: Callable[[bytes], object], program: bytes, tmp_path: Path):
    marker = tmp_path / "ran"
    program = program.replace(text(COMMAND), text(COMMAND.format(marker=marker)))
    with pytest.raises(FormatError):
        read(program)
    assert not marker.exists()


@every_reader
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pickle_itself_would_run_is_refused(read: Callable[[bytes], object], protocol: int, tmp_path: Path):
    marker = tmp_path / "ran"
    program = pickle.dumps({"w": Reduce(os.system, f"touch {marker}")}, protocol)
    pickle.loads(program)
    assert marker.exists(), "the attack itself must work, or this test shows nothing"
    marker.unlink()
    with pytest.raises(FormatError, match=r"posix\.system"):
        read(program)
    assert not marker.exists()


def test_a_refusal_names_what_was_asked_for():
    with pytest.raises(FormatError, match=r"'os\.system', which is not allowed; nothing was run"):
        parse_metadata(PROGRAMS["GLOBAL os.system"])


def test_an_attack_inside_honest_metadata_is_refused():
    """The program is in a place that a lenient reader would never examine."""
    honest = METADATA[:-1]
    for smuggled in (b"cos\nsystem\n" + text("x") + b"\x85R", b"\x82\x01"):
        with pytest.raises(FormatError):
            parse_metadata(honest + smuggled + b"0.")
        with pytest.raises(FormatError):
            parse_metadata(honest.replace(b"\x8c\x0cplanner_data\x94", b"\x8c\x0cplanner_data\x94" + smuggled + b"0"))


# ---- memory and time ----

BOMBS: dict[str, bytes] = {
    "LONG_BINPUT 2**31": b"\x80\x02]r\xff\xff\xff\x7f.",
    "LONG_BINGET 2**31": b"\x80\x02]j\xff\xff\xff\x7f.",
    "BINUNICODE 4 GiB": b"\x80\x02X\xff\xff\xff\xff.",
    "BINUNICODE8 2**60": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "BINBYTES8 2**60": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "BYTEARRAY8 2**60": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "FRAME 2**60": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b".",
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "nested lists": b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000 + b".",
    "nested lists without marks": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 800_000 + b".",
    "dicts": b"\x80\x02" + b"}" * 700_000 + b".",
    "no end": b"\x80\x02" + b"N" * 1_000_000,
    "nothing": b"",
    "only a mark": b"\x80\x02(.",
    "pop of nothing": b"\x80\x02a.",
    "marks of nothing": b"\x80\x02t.",
    "tuple of nothing": b"\x80\x02\x87.",
    "odd items": b"\x80\x02}(Nu.",
    "unhashable key": b"\x80\x02}]Ns.",
    "huge key": b"\x80\x02}\x8a\xff" + b"\x7f" * 255 + b"Ns.",
    "self": b"\x80\x02]q\x00h\x00a.",
}  # fmt: skip


@every_reader
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_in_little_time(read: Callable[[bytes], object], bomb: bytes):
    started = time.process_time()
    with pytest.raises(FormatError):
        read(bomb)
    assert time.process_time() - started < 10


def tower(kind: str, levels: int) -> bytes:
    """Lists, tuples or dicts that name the one below twice, 2**levels parts in a few bytes a level; within a tuple."""
    out = [b"\x80\x02(K\x01q\x00"]
    for level in range(levels):
        get, put = b"h%c" % level, b"q%c" % (level + 1)
        spelled = {
            "lists": b"](" + get + get + b"e",
            "tuples": get + get + b"\x86",
            "dicts": b"}(K\x00" + get + b"K\x01" + get + b"u",
        }
        out.append(spelled[kind] + put)
    return b"".join(out)


@pytest.mark.parametrize("kind", ["lists", "tuples", "dicts"])
def test_a_billion_laughs_are_refused_where_a_caller_would_unfold_them(kind: str):
    assert load_plain(tower(kind, 3) + b"t.")
    with pytest.raises(FormatError, match="expands to more than"):
        load_plain(tower(kind, 90) + b"t.")


def test_a_nested_tuple_is_never_hashed():
    """Hashing a tuple takes time exponential in its depth when each level names the next twice."""
    with pytest.raises(FormatError, match="dict key of type tuple"):
        read_pickle(tower("tuples", 60) + b"}h\x3cNst.", {})


def _limited(nbytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


@pytest.mark.parametrize("opcode", [b"}", b"]", b"\x81", b"\x94"])
def test_memory_stays_in_proportion_to_the_file(opcode: bytes, tmp_path: Path):
    """2 MB of one opcode, under an address space limit that honest parsing of such a file fits into."""
    prefix = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nq\x00" if opcode == b"\x81" else b"\x80\x02N"
    body = {b"\x81": b"h\x00)\x81"}.get(opcode, opcode)
    (tmp_path / "bomb").write_bytes(prefix + body * (2_000_000 // len(body)) + b".")
    code = (
        "import sys; from milepost.errors import FormatError; from milepost.format.dcp_metadata import parse_metadata\n"
        "try: parse_metadata(open(sys.argv[1], 'rb').read())\n"
        "except FormatError: sys.exit(55)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bomb")]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, preexec_fn=_limited(500 << 20), env=environment, timeout=100, check=False, capture_output=True
    )
    assert done.returncode == 55, done.stderr.decode()


@pytest.mark.parametrize(
    "sizes",
    [(1 << 62, 1 << 62), (1 << 61,), (-1,), (3, -3), (1,) * 65],
    ids=["product", "bytes", "negative", "two negatives", "dims"],
)
def test_absurd_sizes_in_metadata_are_refused(sizes: tuple[int, ...]):
    data = METADATA.replace(b"\x8c\x05Size\x94", b"\x8c\x05Size\x94")
    spelled = b"(" + b"".join(b"\x8a\x09" + size.to_bytes(9, "little", signed=True) for size in sizes) + b"t"
    changed = data.replace(b"K\x04K\x02\x86", spelled, 1)
    assert changed != data
    with pytest.raises(FormatError):
        manifest_from_metadata(parse_metadata(changed), SIZES)


# ---- records ----


def test_a_tensor_that_reaches_beyond_its_storage_is_refused():
    """Strides or an offset that would read a neighbour's bytes."""
    pickled = zipfile.ZipFile(io.BytesIO(RECORD)).read("archive/data.pkl")
    assert locate(zip_of(pickled, bytes(32)))
    for old, new in ((b"QK\x00K\x04K\x02\x86", b"QK\x01K\x04K\x02\x86"), (b"K\x02K\x01\x86", b"K\xffK\x01\x86")):
        assert old in pickled
        with pytest.raises(FormatError, match="does not fit"):
            locate(zip_of(pickled.replace(old, new), bytes(32)))
    with pytest.raises(FormatError, match="does not fit"):
        locate(zip_of(pickled, bytes(31)))


@pytest.mark.parametrize("key", ["../data.pkl", "1", "", "0/../0", "9" * 30, "²"])
def test_a_storage_by_another_name_is_refused(key: str):
    pickled = zipfile.ZipFile(io.BytesIO(RECORD)).read("archive/data.pkl")
    encoded = key.encode()
    renamed = pickled.replace(b"X\x01\x00\x00\x000q\x03", b"X" + struct.pack("<I", len(encoded)) + encoded + b"q\x03")
    assert renamed != pickled
    with pytest.raises(FormatError):
        locate(zip_of(renamed, bytes(32)))


def test_compressed_entries_are_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    with pytest.raises(FormatError, match="compressed"):
        locate(buffer.getvalue())


def test_a_directory_that_points_outside_or_elsewhere_is_refused():
    """Each 32-bit field of the directory in turn is set to a huge value: refused, or without effect."""
    start = RECORD.index(b"PK\x01\x02")
    wanted = locate(RECORD)
    for position in range(start, len(RECORD) - 3):
        for value in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"):
            damaged = RECORD[:position] + value + RECORD[position + 4 :]
            try:
                found: Any = locate(damaged)
            except FormatError:
                continue
            assert found.data_offset + found.data_nbytes <= len(RECORD)
            assert found.sizes == wanted.sizes  # type: ignore[attr-defined]


# ---- anything at all ----


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    """``data`` with a few stretches replaced, deleted, repeated or swapped for others of its own."""

    @st.composite
    def mutate(draw: st.DrawFn) -> bytes:
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(changed)))
            nbytes = draw(st.integers(0, 12))
            other = draw(st.integers(0, len(data)))
            patch = draw(st.one_of(st.binary(max_size=12), st.just(data[other : other + nbytes])))
            changed[at : at + draw(st.sampled_from([0, nbytes, len(patch)]))] = patch
        return bytes(changed)

    return mutate()


def only_format_errors(read: Callable[[], object]) -> None:
    with contextlib.suppress(FormatError):
        read()


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@fuzz
@given(st.one_of(mutations(METADATA), st.binary(max_size=200).map(lambda tail: b"\x80\x04" + tail)))
@example(METADATA)
def test_fuzzed_metadata_gives_metadata_or_a_format_error(data: bytes):
    only_format_errors(lambda: manifest_from_metadata(parse_metadata(data), SIZES))


@fuzz
@given(mutations(RECORD))
@example(RECORD)
def test_fuzzed_tensor_records_give_a_place_inside_or_a_format_error(data: bytes):
    def read() -> None:
        found: Any = locate(data)
        assert found.data_offset >= 0
        assert found.data_offset + found.data_nbytes <= len(data)

    only_format_errors(read)


@fuzz
@given(mutations(RECORD[TENSOR.header.index(b"\x80\x02") : TENSOR.header.index(b".PK") + 1]))
def test_fuzzed_tensor_pickles_give_a_tensor_or_a_format_error(pickled: bytes):
    only_format_errors(lambda: locate(zip_of(pickled, bytes(32))))
    only_format_errors(lambda: read_pickle(pickled, TENSOR_GLOBALS))


@fuzz
@given(mutations(OBJECT))
@example(OBJECT)
def test_fuzzed_object_records_give_a_value_or_a_format_error(data: bytes):
    only_format_errors(lambda: read_object(data))


@fuzz
@given(mutations(OBJECT[OBJECT.index(b"\x80\x02") : OBJECT.index(b".PK") + 1]))
def test_fuzzed_object_pickles_give_a_value_or_a_format_error(pickled: bytes):
    only_format_errors(lambda: load_plain(pickled))


@fuzz
@given(mutations(MANIFEST[: MANIFEST.rindex(b'"crc32"')]))
@example(MANIFEST[: MANIFEST.rindex(b'"crc32"')])
def test_fuzzed_manifests_with_a_right_crc_give_a_manifest_or_a_format_error(body: bytes):
    only_format_errors(lambda: from_json(body + b'"crc32": "%08x"\n}\n' % crc32(body)))


@fuzz
@given(mutations(RECORD_FILES[MANIFEST_NAME]))
@example(RECORD_FILES[MANIFEST_NAME])
def test_fuzzed_manifests_of_format_2_with_right_crcs_give_a_manifest_or_a_format_error(data: bytes):
    head, mark, rest = data.partition(b'"head_crc32": ')
    body = head + mark + b'"%08x"' % crc32(head) + rest[10:] if mark else data
    body = body[: body.rfind(b'"crc32"')]
    files = {**RECORD_FILES, MANIFEST_NAME: body + b'"crc32": "%08x"\n}\n' % crc32(body)}
    only_format_errors(lambda: read_back(files))


@fuzz
@given(mutations(SHARDS))
@example(SHARDS)
def test_fuzzed_shards_with_a_right_crc_give_a_table_or_a_format_error(data: bytes):
    sealed = data[:12] + struct.pack("<I", crc32(data[:12] + bytes(4) + data[16:])) + data[16:]
    only_format_errors(lambda: parse_shards(sealed, LAYOUT.manifest.save_id))


@fuzz
@given(mutations(DIGESTS[:-4]))
@example(DIGESTS[:-4])
def test_fuzzed_digests_with_a_right_crc_give_digests_or_a_format_error(body: bytes):
    only_format_errors(lambda: parse_digests(body + struct.pack("<I", crc32(body)), LAYOUT.manifest))
