"""The fuzzed readers: every reader of files that others may have written, with valid inputs to start from.

A target's ``parse`` gets one input. It may return anything or raise a ``MilepostError``; whatever else it raises is a
failure, and so are its asserts, which say what must hold of an accepted input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch.utils.serialization  # noqa: F401 - torch.load imports it at its first call, and nothing may be imported then
from format_1 import to_json_1
from fuzz_inputs import (
    BARE_CONFIG,
    FLAGS,
    HF_CONFIG,
    INDEX,
    LAYOUT,
    MARK,
    OBJECTS,
    OWNERS,
    PICKLES,
    RECORD_FILES,
    RECORDS,
    SHORT_TOML,
    SIZES,
    TOML,
    safetensors,
    sign_off,
    torch_file,
)
from fuzz_mutations import (
    Mutator,
    framed,
    mutate_bytes,
    mutate_json,
    mutate_pickle,
    mutate_toml,
    mutate_zip,
    with_crc,
)
from manifests import read_back, record_files
from public_shapes import CONFIGS, HOSTILE_PICKLES, INDEXES, SAFETENSORS_FILES, TORCH_FILES

from milepost.cli.main import main
from milepost.errors import RunLockedError
from milepost.format.columns import table_of, with_table
from milepost.format.columns_check import table_faults
from milepost.format.dcp_metadata import METADATA_GLOBALS, manifest_from_metadata, parse_metadata
from milepost.format.dcp_writer import dump_metadata
from milepost.format.digest import combine_blocks, crc32, dump_digests, parse_digests
from milepost.format.dtype import itemsize
from milepost.format.huggingface import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_NBYTES,
    MAX_INDEX_NBYTES,
    parse_index,
    parse_object,
)
from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME, SHARDS_NAME, Manifest
from milepost.format.manifest_check import manifest_faults
from milepost.format.manifest_json import from_json, parse_head, to_json
from milepost.format.pickle_reader import read_pickle
from milepost.format.plain_pickle import load_plain
from milepost.format.record_reader import TENSOR_GLOBALS, locate_tensor, read_object
from milepost.format.safetensors import read_header
from milepost.format.shards_file import dump_shards, parse_shards
from milepost.format.torch_file import locate_tensors
from milepost.interop.hf.config import config_faults
from milepost.interop.names.model_sizes import model_args
from milepost.run import marks
from milepost.run.assemble import SaveInfo, assemble
from milepost.run.lock import RunLock
from milepost.run.owner import is_alive, parse_owner
from milepost.run.signoff import parse_sign_off
from milepost.storage import LocalStorage
from milepost.storage.base import ReadHandle
from milepost.storage.links import read_linked
from milepost.tensors.value_reader import decode_object
from milepost.testing.sample import save_arrays
from milepost.train.options import load_config
from milepost.verification.extents import own_record, records_of


@dataclasses.dataclass(frozen=True)
class Target:
    """``parse(data, scratch)``: ``scratch`` is a folder of its own, the only place it may read files from.

    ``share`` is the part of all inputs that it gets, relative to the others. ``prepare(data, scratch)`` puts an input
    where ``parse`` looks for it. ``may`` are the audit events it may cause beside opening files in ``scratch`` to read;
    ``write`` among them stands for every change of what is in ``scratch``, ``identity`` for looking up who we are.
    ``make_seeds(scratch)`` makes the valid inputs that need a folder. ``shapes``, of public test suites, are tried as
    they are after the valid inputs, and are changed like those.
    """

    name: str
    seeds: Sequence[bytes]
    mutate: Mutator
    parse: Callable[[bytes, Path], object]
    share: int = 10
    prepare: Callable[[bytes, Path], None] | None = None
    may: frozenset[str] = frozenset()
    make_seeds: Callable[[Path], Sequence[bytes]] | None = None
    shapes: Sequence[bytes] = ()


# ---- readers ----


def read_metadata(data: bytes, scratch: Path) -> object:
    manifest = manifest_from_metadata(parse_metadata(data), SIZES)
    check_places(manifest)
    return manifest


def check_places(manifest: Manifest) -> None:
    """Nothing that a manifest leads to lies outside of its files."""
    assert not manifest_faults(manifest)
    for name, records in records_of(manifest).items():
        assert "/" not in name
        assert all(0 <= one.start < one.stop <= manifest.files[name].nbytes for one in records)


def read_record(data: bytes, scratch: Path) -> object:
    found = locate_tensor(lambda offset, nbytes: data[offset : offset + nbytes], len(data))
    assert 0 <= found.data_offset <= found.data_offset + found.data_nbytes <= len(data)
    return found.is_plain, found.dtype


def read_manifest_1(data: bytes, scratch: Path) -> object:
    manifest = from_json(data)
    check_places(manifest)
    again = from_json(to_json_1(manifest))
    assert again == manifest
    return manifest.kind


class NoFile(ReadHandle):
    """A file of which nothing is read."""

    path, nbytes = "fuzz", 0

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        raise AssertionError("a plan reads no data")

    def close(self) -> None:
        raise AssertionError("a plan closes no file")


def read_manifest(data: bytes, scratch: Path) -> object:
    head = parse_head(data)
    manifest = from_json(data, read_shards=lambda name, _: RECORD_FILES[name])
    assert head is not None
    assert head.manifest.save_id == manifest.save_id
    check_places(manifest)
    assert from_json(to_json(from_json(data))) == from_json(data)
    return manifest.kind


def read_shards(data: bytes, scratch: Path) -> object:
    table, _ = parse_shards(data, LAYOUT.manifest.save_id)
    if faults := table_faults(table, LAYOUT.manifest.files):
        return faults[0].message[-20:]
    manifest = with_table(LAYOUT.manifest, table)
    dict(manifest.paths)
    check_places(manifest)
    assert dump_shards(table, LAYOUT.manifest.save_id) == dump_shards(table_of(manifest), LAYOUT.manifest.save_id)
    dump_metadata(manifest)
    return len(table)


def read_digests(data: bytes, scratch: Path) -> object:
    digests = parse_digests(data, LAYOUT.manifest)
    for records in records_of(LAYOUT.manifest).values():
        for placed in records:
            list(own_record(NoFile(), placed, digests))
    for key, tensor in LAYOUT.manifest.tensors.items():
        for index, shard in enumerate(tensor.shards):
            combine_blocks(digests.of_shard(key, index), shard.data_nbytes, digests.block_nbytes)
    return digests.block_nbytes


class InMemory(ReadHandle):
    """A file that is bytes."""

    def __init__(self, data: bytes):
        self.path = "hostile.safetensors"
        self.nbytes = len(data)
        self._data = data

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            assert 0 <= offset <= offset + len(buffer) <= self.nbytes
            buffer[:] = self._data[offset : offset + len(buffer)]
            offset += len(buffer)

    def close(self) -> None:
        pass


def read_safetensors(data: bytes, scratch: Path) -> object:
    header = read_header(InMemory(data))
    for tensor in header.tensors.values():
        assert 8 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)
    return len(header.tensors)


def read_value(data: bytes, scratch: Path) -> object:
    """An object's record as a load takes it: what is not plain goes to torch's restricted unpickler."""
    return type(decode_object("key", data, "__0_0.distcp")).__name__


def read_plain(data: bytes, scratch: Path) -> object:
    return type(load_plain(data)).__name__


def read_object_record(data: bytes, scratch: Path) -> object:
    return type(read_object(data)).__name__


def read_torch_file(data: bytes, scratch: Path) -> object:
    found = locate_tensors(lambda offset, nbytes: data[offset : offset + nbytes], len(data))
    for tensor in found.values():
        assert 0 <= tensor.data_offset <= tensor.data_offset + tensor.data_nbytes <= len(data)
        if 0 not in tensor.sizes:
            last = sum((n - 1) * s for n, s in zip(tensor.sizes, tensor.strides, strict=True))
            assert (tensor.storage_offset + last + 1) * itemsize(tensor.dtype) <= tensor.data_nbytes
    return len(found)


def read_sign_off(data: bytes, scratch: Path) -> object:
    signed = parse_sign_off(data, "sign-off-0")
    if signed.error is not None:
        return signed.error[:10]
    manifest, crcs = assemble([signed], SaveInfo(step=1, kind="state"), now=1.0)
    check_places(manifest)
    assert read_back(record_files(manifest)).tensors == manifest.tensors
    return len(crcs)


def read_lock(data: bytes, scratch: Path) -> object:
    """A run that finds such a lock waits a lease for its holder, and then takes it or says who has it."""
    try:
        lock = RunLock(LocalStorage(scratch), "run", beat_s=1000, lease_s=2, sleep=lambda _: None)
    except RunLockedError as error:
        return error.message[:20]
    lock.release()
    return "taken"


def prepare_lock(data: bytes, scratch: Path) -> None:
    (scratch / "run").mkdir(exist_ok=True)
    (scratch / "run" / ".lock").write_bytes(data)


def read_owner(data: bytes, scratch: Path) -> object:
    owner = parse_owner(data, "owner-0")
    return is_alive(owner, 1e9), len(str(owner)) > 20


def prepare_mark(data: bytes, scratch: Path) -> None:
    (scratch / ".damaged-step-1.json").write_bytes(data)


def read_mark(data: bytes, scratch: Path) -> object:
    said = marks.read_mark(LocalStorage(scratch), "step-1", "5-00000000")
    return said is None


def prepare_index(data: bytes, scratch: Path) -> None:
    (scratch / INDEX_NAME).write_bytes(data)


def read_index(data: bytes, scratch: Path) -> object:
    found = parse_index(read_linked(LocalStorage(scratch), INDEX_NAME, MAX_INDEX_NBYTES), INDEX_NAME).weight_map
    assert not any("/" in name for name in found.values())
    return len(found)


def prepare_config(data: bytes, scratch: Path) -> None:
    (scratch / "config.json").write_bytes(data)


def read_config(data: bytes, scratch: Path) -> object:
    config = parse_object(read_linked(LocalStorage(scratch), CONFIG_NAME, MAX_CONFIG_NBYTES), CONFIG_NAME)
    return len(config_faults(config, "llama3", model_args("llama3", "debugmodel")))


def prepare_toml(data: bytes, scratch: Path) -> None:
    (scratch / "run.toml").write_bytes(data)


def read_toml(data: bytes, scratch: Path) -> object:
    return load_config(["--job.config_file", str(scratch / "run.toml")], 8).job.dump_folder[:5]


def read_flags(data: bytes, scratch: Path) -> object:
    """A line of flags, one to a line of the input."""
    flags = [flag for flag in data.decode("utf-8", "surrogateescape").split("\n") if flag not in ("-h", "--help")]
    flags = [flag for flag in flags if "config_file" not in flag.replace("-", "_")]
    return load_config(flags, 8).job.dump_folder[:5]


# ---- a whole folder, through the command line ----


def prepare_folder(data: bytes, scratch: Path) -> None:
    """Inputs name the file of the checkpoint that they replace in their first line."""
    step = scratch / "step-7"
    storage = LocalStorage(scratch)
    if not step.exists():
        arrays = {"w": np.arange(12, dtype="float32").reshape(4, 3), "v": np.ones(5, "float16")}
        objects = {"train_state.step": 7, "x": [1, {"a": b"b"}]}
        save_arrays(storage, "step-7", arrays, objects=objects, step=7, kind="full", num_ranks=2, now=1.7e9)
        (scratch / "intact").mkdir()
        for file in step.iterdir():
            (scratch / "intact" / file.name).write_bytes(file.read_bytes())
    for file in (scratch / "intact").iterdir():
        (step / file.name).write_bytes(file.read_bytes())
    name, _, content = data.partition(b"\n")
    text = name.decode("latin-1")
    if text == "external":
        (step / MANIFEST_NAME).unlink()
        (step / SHARDS_NAME).unlink()
        (step / DIGESTS_NAME).unlink()
        text = METADATA_NAME
    if text in (MANIFEST_NAME, METADATA_NAME, SHARDS_NAME, DIGESTS_NAME, "__0_0.distcp", "__1_0.distcp"):
        (step / text).write_bytes(content)


def folder_seeds(scratch: Path) -> list[bytes]:
    prepare_folder(b"\n", scratch)
    intact = scratch / "intact"
    found = [file.name.encode() + b"\n" + file.read_bytes() for file in sorted(intact.iterdir())]
    return [*found, b"external\n" + (intact / METADATA_NAME).read_bytes()]


def mutate_folder(rng, data: bytes, others: Sequence[bytes]) -> bytes:  # type: ignore[no-untyped-def]
    name, _, content = data.partition(b"\n")
    kinds: dict[bytes, Mutator] = {
        MANIFEST_NAME.encode(): MUTATE_MANIFEST_2,
        SHARDS_NAME.encode(): MUTATE_SHARDS,
        METADATA_NAME.encode(): mutate_pickle,
        b"external": mutate_pickle,
        DIGESTS_NAME.encode(): with_crc(mutate_bytes),
    }
    mates = [other.partition(b"\n")[2] for other in others if other.partition(b"\n")[0] == name] or [content]
    return name + b"\n" + kinds.get(name, mutate_bytes)(rng, content, mates)


def read_folder(data: bytes, scratch: Path) -> object:
    """Run the command line on it: its exit status is documented, its output has no terminal control sequences."""
    said = []
    for command in (["ls", str(scratch)], ["verify", str(scratch / "step-7")], ["inspect", str(scratch / "step-7")]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(command)
        # 11: an external step, which has no digests for verify to hold its bytes against.
        assert status in (0, 3, 5, 7) or (status == 11 and command[0] == "verify"), (command, status)
        text = out.getvalue() + err.getvalue()
        assert all(char.isprintable() or char == "\n" for char in text), (command, text)
        text.encode()
        said.append(status)
    return said


FOLDER_MAY = frozenset({"_thread.start_new_thread"})
LOCK_MAY = frozenset({"write", "identity", "_thread.start_new_thread"})

# ---- the table ----


def _json_body(data: bytes) -> bytes | None:
    """The manifest without its CRC, as JSON."""
    at = data.rfind(b'"crc32": "')
    return data[:at].rstrip().rstrip(b",") + b"}" if at > 0 else None


def _with_json_crc(content: bytes, _: bytes) -> bytes:
    body = content.rstrip().removesuffix(b"}") + b",\n"
    return body + b'"crc32": "%08x"\n}\n' % crc32(body)


def _with_json_crcs(content: bytes, data: bytes) -> bytes:
    """With the head's CRC too, where the changed document still has one."""
    lines = content.replace(b', "', b',\n"').replace(b"{", b"{\n", 1)
    head, mark, rest = lines.partition(b'"head_crc32": ')
    if mark:
        lines = head + mark + b'"%08x",\n' % crc32(head) + rest.partition(b"\n")[2]
    return _with_json_crc(lines, data)


def _shards_sealed(content: bytes, _: bytes) -> bytes:
    blank = content[:12] + bytes(4) + content[16:]
    return content[:12] + struct.pack("<I", crc32(blank)) + content[16:]


MUTATE_MANIFEST = framed(_json_body, _with_json_crc, mutate_json)
MUTATE_MANIFEST_2 = framed(_json_body, _with_json_crcs, mutate_json)
MUTATE_SHARDS = framed(lambda data: data, _shards_sealed, mutate_bytes)
MUTATE_SAFETENSORS = framed(
    lambda data: data[8 : 8 + int.from_bytes(data[:8], "little")] if len(data) > 8 else None,
    lambda content, data: (
        struct.pack("<Q", len(content)) + content + data[8 + int.from_bytes(data[:8], "little") :][:4096]
    ),
    mutate_json,
)


def _sign_off_json(data: bytes) -> bytes | None:
    return data[16 : 16 + int.from_bytes(data[8:16], "little")] if len(data) > 16 else None


def _with_sign_off(content: bytes, data: bytes) -> bytes:
    rest = data[16 + int.from_bytes(data[8:16], "little") : -4]
    body = data[:8] + struct.pack("<Q", len(content)) + content + rest
    return body + struct.pack("<I", crc32(body))


MUTATE_SIGN_OFF = framed(_sign_off_json, _with_sign_off, mutate_json)


def _tensor_pickle(data: bytes, scratch: Path) -> object:
    """The opcodes alone, without the zip around them."""
    return type(read_pickle(data, {**TENSOR_GLOBALS, **METADATA_GLOBALS})).__name__


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("metadata", PICKLES[:1], mutate_pickle, read_metadata, share=16, shapes=HOSTILE_PICKLES),
        Target("pickle", PICKLES, mutate_pickle, _tensor_pickle, shapes=HOSTILE_PICKLES),
        Target("plain", PICKLES[1:], mutate_pickle, read_plain, shapes=HOSTILE_PICKLES),
        Target("tensor record", RECORDS, mutate_zip(), read_record, share=14),
        Target("object record", OBJECTS, mutate_zip(), read_object_record, share=10, shapes=TORCH_FILES),
        Target("torch file", [torch_file()], mutate_zip(), read_torch_file, share=14, shapes=TORCH_FILES),
        Target("manifest 1", [to_json_1(LAYOUT.manifest)], MUTATE_MANIFEST, read_manifest_1, share=6),
        Target("manifest", [RECORD_FILES[MANIFEST_NAME]], MUTATE_MANIFEST_2, read_manifest, share=10),
        Target("shards", [RECORD_FILES[SHARDS_NAME]], MUTATE_SHARDS, read_shards, share=10),
        Target(
            "digests", [dump_digests(LAYOUT.manifest.save_id, LAYOUT.crcs)], with_crc(mutate_bytes), read_digests, 6
        ),
        Target(
            "safetensors",
            [safetensors(), safetensors("abcdefgh")],
            MUTATE_SAFETENSORS,
            read_safetensors,
            share=12,
            shapes=SAFETENSORS_FILES,
        ),
        Target("sign-off", [sign_off()], MUTATE_SIGN_OFF, read_sign_off, share=8),
        Target("owner", OWNERS, mutate_json, read_owner, 4, may=frozenset({"identity"})),
        Target("lock", OWNERS, mutate_json, read_lock, 2, prepare_lock, LOCK_MAY),
        Target("mark", [MARK], mutate_json, read_mark, 3, prepare_mark),
        Target("index", [INDEX], mutate_json, read_index, 3, prepare_index, shapes=INDEXES),
        Target("config.json", [HF_CONFIG, BARE_CONFIG], mutate_json, read_config, 3, prepare_config, shapes=CONFIGS),
        Target("toml", [TOML, SHORT_TOML], mutate_toml, read_toml, 10, prepare_toml),
        Target("flags", [FLAGS], mutate_toml, read_flags, 3),
        Target("folder", [], mutate_folder, read_folder, 3, prepare_folder, FOLDER_MAY, folder_seeds),
        Target("value", [*OBJECTS, torch_file()], mutate_zip(), read_value, 6, shapes=TORCH_FILES),
    )
}
