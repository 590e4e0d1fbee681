"""A small run of the fuzzer, a check that it detects violations, and inputs that expand when read."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz import MEMORY_NBYTES, Outcome, fuzz, replay
from fuzz_inputs import RECORDS
from fuzz_mutations import mutate_bytes, zip_of
from fuzz_targets import TARGETS, Target

from milepost.errors import FormatError, MilepostError, StorageError
from milepost.format.record_reader import check_archive
from milepost.run import marks
from milepost.run.lock import RunLock
from milepost.storage import LocalStorage
from milepost.tensors.value_reader import decode_object

Tally = Callable[..., None]

SEED = 20_260
PARTS = [name for name in TARGETS if name not in ("folder", "value")], ["folder", "value"]


@pytest.mark.parametrize("names", PARTS, ids=["parsers", "folders and values"])
def test_hostile_inputs_are_taken_or_refused_and_nothing_else_happens(
    names: list[str], memory_path: Path, tally: Tally
) -> None:
    """``make fuzz`` does the same with many more."""
    inputs = 1900 if len(names) > 2 else 200
    found = list(fuzz(names, inputs=inputs, seed=SEED, save_to=memory_path, num_jobs=2))
    assert {outcome.target for outcome in found} == set(names)
    for outcome in found:
        assert not outcome.failures, outcome.failures[0].what
        assert outcome.accepted + outcome.refused == outcome.tried
        assert outcome.accepted, "the valid inputs at least must be taken"
    assert sum(outcome.refused for outcome in found) > inputs / 4
    tried = sum(outcome.tried for outcome in found)
    assert tried >= inputs
    tally("hostile input to every reader (parsers, a folder through the command line)", tried=tried, lost=0, seed=SEED)


# ---- the fuzzer itself ----


def spin(data: bytes) -> None:
    while True:
        pass


def hide(data: bytes) -> None:
    try:
        subprocess.run(["true"], check=False)
    except BaseException:  # noqa: BLE001 - a reader that swallows everything must not hide it
        return


PLANTED: dict[str, tuple[Callable[[bytes], object], str]] = {
    "another error": (lambda data: [][0], "IndexError"),
    "a crash": (lambda data: os.kill(os.getpid(), 11), "Forbidden|died: -11"),
    "an abort": (lambda data: os.abort(), "died: -6"),
    "an exit": (lambda data: sys.exit(0), "SystemExit"),
    "memory": (lambda data: bytes(2 * MEMORY_NBYTES), "MemoryError"),
    "a hang": (spin, "more than .* of CPU"),
    "a command": (lambda data: os.system("true"), "os.system"),
    "a command, hidden": (hide, "subprocess.Popen"),
    "a written file": (lambda data: Path("/tmp/planted").write_text("x"), "open"),
    "a read file": (lambda data: Path("/etc/passwd").read_text(), "open"),
    "a network": (lambda data: socket.socket(), "socket.__new__"),
    "code": (lambda data: exec("1"), "exec|compile"),
    "a removed file": (lambda data: os.remove("/tmp/planted"), "os.remove"),
    "an import": (lambda data: __import__("antigravity"), "import"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_fuzzer_finds_what_no_reader_may_do(name: str, memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.INPUT_S", 0.5)
    parse, what = PLANTED[name]
    target = Target("planted", [b"valid"], mutate_bytes, lambda data, _: data == b"valid" or parse(data))
    (outcome,) = fuzz(["planted"], inputs=3, seed=1, save_to=memory_path, targets={"planted": target})
    assert outcome.tried == 3
    assert len(outcome.failures) == 2, outcome
    for failure in outcome.failures:
        assert re.search(what, failure.what), failure.what
        assert Path(failure.file).read_bytes() == bytes.fromhex(failure.data)
    assert not Path("/tmp/planted").exists()


def test_a_saved_input_can_be_tried_again(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (memory_path / "tensor_record-0.bin").write_bytes(b"nothing like it")
    assert replay(memory_path / "tensor_record-0.bin") == 0
    assert "tensor record, 15 bytes: is handled" in capsys.readouterr().out


def test_a_seed_gives_the_same_inputs(memory_path: Path) -> None:
    def run() -> list[Outcome]:
        return list(fuzz(["manifest", "toml"], inputs=120, seed=5, save_to=memory_path, num_jobs=2))

    counts = [
        [(o.target, o.accepted, o.refused, o.outcomes) for o in sorted(run(), key=lambda o: o.target)] for _ in "ab"
    ]
    assert counts[0] == counts[1]


# ---- inputs that grow when they are read ----


def refused(name: str, data: bytes, why: str) -> None:
    """Within the fuzzer's limits of memory and time, with a Milepost error that says ``why``."""
    honest = TARGETS[name]

    def parse(data: bytes, scratch: Path) -> object:
        if data == b"warm":
            return None
        with pytest.raises(MilepostError, match=why):
            honest.parse(data, scratch)
        return "refused"

    only = Target(name, [b"warm"], lambda *_: data, parse, may=honest.may)
    (outcome,) = fuzz([name], inputs=2, seed=0, save_to=Path("/dev/shm"), targets={name: only})
    assert not outcome.failures, outcome.failures[0].what
    assert outcome.accepted == 2


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


HEAD = b"\x80\x02"
DCP = b"ctorch.distributed.checkpoint.metadata\n"
TENSOR = RECORDS[0][RECORDS[0].index(HEAD) + 2 : RECORDS[0].index(b".PK")]


def instance(name: bytes, fields: dict[str, bytes]) -> bytes:
    return DCP + name + b"\n)\x81}(" + b"".join(text(key) + value for key, value in fields.items()) + b"ub"


def metadata(entries: bytes, places: bytes = b"}") -> bytes:
    return HEAD + instance(b"Metadata", {"state_dict_metadata": entries, "storage_data": places}) + b"."


def many_times_the_same_chunks() -> bytes:
    """A tensor of 20,000 chunks (all of them one) that stands under 8,000 keys: 160 million boxes in 170 kB."""
    sizes = b"ctorch\nSize\n(K\x00\x85\x85R".replace(b"(", b"")
    chunk = instance(b"ChunkStorageMetadata", {"offsets": sizes, "sizes": sizes})
    chunks = b"](" + chunk + b"q\x00" + b"h\x00" * 20_000 + b"e"
    properties = DCP + b"TensorProperties\n)\x81}" + text("dtype") + b"ctorch\nfloat32\nsb"
    tensor = instance(b"TensorStorageMetadata", {"properties": properties, "size": sizes, "chunks": chunks})
    keys = b"".join(b"X\x04\0\0\0%04dh\x01" % n for n in range(8000))
    return metadata(b"}(" + text("first") + tensor + b"q\x01" + keys + b"u")


def many_times_the_same_transforms() -> bytes:
    transforms = b"](" + text("x") + b"q\x01" + b"h\x01" * 50_000 + b"e"
    place = b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n)\x81}("
    place += text("relative_path") + text("f") + text("offset") + b"K\x00" + text("length") + b"K\x01"
    place += text("transform_descriptors") + transforms + b"ub"
    index = DCP + b"MetadataIndex\nq\x00)\x81}" + text("fqn") + text("k") + b"sb"
    more = b"h\x00)\x81}X\x03\0\0\0fqnX\x01\0\0\0ksbh\x02" * 4000
    return metadata(b"}", b"}(" + index + place + b"q\x02" + more + b"u")


def a_path_that_doubles() -> bytes:
    levels = b"".join(b"h\x00h%ch%c\x86Rq%c" % (n, n, n + 1) for n in range(1, 60))
    return metadata(b"cpathlib\nPosixPath\nq\x00" + text("x" * 100) + b"q\x01" + levels)


def text_encoded_again_and_again() -> bytes:
    encode = b"c_codecs\nencode\nq\x00" + text("x" * 100_000) + text("latin1") + b"\x86q\x01R"
    return HEAD + b"(" + encode + b"h\x00h\x01R" * 30_000 + b"t."


def one_long_key_above_many_tensors() -> bytes:
    tensors = b"](" + TENSOR + b"q\x0c" + b"h\x0c" * 50_000 + b"e"
    state = HEAD + b"}" + text("k" * 100_000) + tensors + b"s."
    return zip_of({"a/data.pkl": state, "a/byteorder": b"little", "a/data/0": bytes(32)})


def one_name_twice_among_many() -> bytes:
    names = ",".join(f'"{n:x}":0' for n in range(25_000))
    header = ("{" + names + f',"{24_999:x}":0}}').encode()
    return struct.pack("<Q", len(header)) + header


BOMBS = {
    "chunks": ("metadata", many_times_the_same_chunks, "more chunks than a file of this size"),
    "transforms": ("metadata", many_times_the_same_transforms, "transforms, or a very long one"),
    "a path": ("metadata", a_path_that_doubles, "a path has more than"),
    "bytes": ("plain", text_encoded_again_and_again, "expands to far more memory"),
    "keys": ("torch file", one_long_key_above_many_tensors, "a path in a state dict has more than"),
    "names": ("safetensors", one_name_twice_among_many, "the name '61a7' occurs twice"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_inputs_that_grow_when_they_are_read_are_refused(name: str) -> None:
    target, make, why = BOMBS[name]
    refused(target, make(), why)


def test_compressed_values_are_not_unpacked() -> None:
    """torch's own reader would: 20 MB out of 20 kB."""
    data = io.BytesIO()
    torch.save([torch.zeros(5 << 20), 1j], data)
    with zipfile.ZipFile(data) as archive:
        packed = zip_of({info.filename: archive.read(info) for info in archive.infolist()}, zipfile.ZIP_DEFLATED)
    assert len(packed) < 30_000
    loaded = torch.load(io.BytesIO(packed), weights_only=True)
    assert loaded[0].numel() == 5 << 20, "the attack itself must work, or this shows nothing"
    with pytest.raises(FormatError, match="compressed"):
        decode_object("key", packed, "__0_0.distcp")


def test_a_value_that_is_no_archive_is_refused() -> None:
    """Files of torch before 1.6 are a row of pickles."""
    data = io.BytesIO()
    torch.save({1, 2}, data, _use_new_zipfile_serialization=False)
    assert torch.load(io.BytesIO(data.getvalue()), weights_only=True) == {1, 2}
    with pytest.raises(FormatError):
        decode_object("key", data.getvalue(), "__0_0.distcp")


def test_entries_that_share_bytes_are_refused() -> None:
    """A megabyte that each of a thousand names claims would be a gigabyte of tensors."""
    data = zip_of({f"archive/data/{n}": b"x" * 100 for n in range(3)} | {"archive/data.pkl": HEAD + b"N."})
    assert check_archive(data) is None
    first, second = (data.index(b"PK\x01\x02") + 42, data.index(b"PK\x01\x02", data.index(b"archive/data/1", 400)) + 42)
    with pytest.raises(FormatError, match=r"contradicts|overlaps"):
        check_archive(data[:second] + data[first : first + 4] + data[second + 4 :])


# ---- hostile files in a run's folder ----


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda lock: lock.symlink_to("/nowhere"), "symbolic link"),
        (lambda lock: lock.mkdir(), "not a regular file"),
        (lambda lock: os.mkfifo(lock), "not a regular file"),
        (lambda lock: (lock.touch(), os.truncate(lock, 1 << 30)), "at most"),
    ],
    ids=["link", "folder", "fifo", "huge"],
)
@pytest.mark.timeout(30)
def test_a_lock_that_is_none_is_an_error_and_not_waited_for(
    make: Callable[[Path], object], why: str, memory_path: Path
) -> None:
    make(memory_path / ".lock")
    with pytest.raises(StorageError, match=why):
        RunLock(LocalStorage(memory_path.parent), memory_path.name, lease_s=1)


def test_a_mark_that_is_nested_too_deep_is_none_of_ours(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    storage.write(".damaged-step-1.json", b"[" * 200_000)
    assert marks.read_mark(storage, "step-1", "any") is None
