"""``.metadata`` written without torch: the pickle that stock ``torch.distributed.checkpoint`` reads.

Unpickled, it gives the same objects as DCP's own file: torch's classes with the same attributes. It is emitted opcode
by opcode, because to pickle instances of torch's classes one would have to import torch. Protocol 4, as CPython 3.11
writes by default; text, globals and sizes that come again are taken from the memo.
"""

from __future__ import annotations

from milepost.format.dcp_metadata import FILESYSTEM_MODULE, METADATA_MODULE
from milepost.format.manifest import Manifest, ObjectEntry, ShardEntry, TensorEntry
from milepost.format.plain_pickle import STOP, int_opcodes

DCP_VERSION = "1.0.0"
"""What torch writes as ``Metadata.version`` (``CURRENT_DCP_VERSION``)."""

_PROTO_4, _MEMOIZE, _NONE, _FALSE = b"\x80\x04", b"\x94", b"N", b"\x89"
_NEW_INSTANCE, _BUILD = b")\x81", b"b"


def dump_metadata(manifest: Manifest) -> bytes:
    """The bytes of ``.metadata`` for a manifest; the same manifest gives the same bytes.

    Keys without an entry in ``manifest.paths`` stand at the top level of the state dict.
    """
    writer = _Writer()
    keys = sorted([*manifest.tensors, *manifest.objects])
    writer.begin(METADATA_MODULE, "Metadata")
    writer.text("state_dict_metadata")
    writer.index_of_keys(manifest, keys)
    writer.text("planner_data")
    writer.index_of_paths(manifest, keys)
    writer.text("storage_data")
    writer.index_of_places(manifest, keys)
    writer.text("storage_meta")
    writer.storage_meta(manifest.save_id)
    writer.text("version")
    writer.text(DCP_VERSION)
    writer.end()
    return b"".join([_PROTO_4, *writer.out, STOP])


def _stored_shards(tensor: TensorEntry) -> tuple[ShardEntry, ...]:
    """The shards that hold something, or one that doesn't if there is no other.

    DCP finds a place by key and offsets, so an empty shard could hide a full one that begins where it does.
    """
    return tuple(shard for shard in tensor.shards if shard.box.numel) or tensor.shards[:1]


class _Writer:
    """Opcodes in ``out``, and which values are in the memo already, by the opcodes that fetch them."""

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.put = self.out.append
        self.memo_count = 0
        self.texts: dict[str, bytes] = {}
        self.globals: dict[tuple[str, str], bytes] = {}
        self.shapes: dict[tuple[int, ...], bytes] = {}

    # ---- values ----

    def memoize(self) -> bytes:
        """Put the top of the stack into the memo. Returns the opcodes that fetch it again."""
        index = self.memo_count
        self.memo_count += 1
        self.put(_MEMOIZE)
        return b"h%c" % index if index < 256 else b"j" + index.to_bytes(4, "little")

    def text(self, value: str) -> None:
        fetch = self.texts.get(value)
        if fetch is not None:
            self.put(fetch)
            return
        encoded = value.encode("utf-8", "surrogatepass")
        if len(encoded) < 256:
            self.put(b"\x8c%c" % len(encoded) + encoded)
        else:
            self.put(b"X" + len(encoded).to_bytes(4, "little") + encoded)
        self.texts[value] = self.memoize()

    def number(self, value: int) -> None:
        self.put(int_opcodes(value))

    def global_(self, module: str, name: str) -> None:
        fetch = self.globals.get((module, name))
        if fetch is not None:
            self.put(fetch)
            return
        self.text(module)
        self.text(name)
        self.put(b"\x93")
        self.globals[module, name] = self.memoize()

    def tuple_(self, values: tuple[str | int, ...]) -> None:
        if len(values) > 3:
            self.put(b"(")
        for value in values:
            if isinstance(value, str):
                self.text(value)
            else:
                self.number(value)
        self.put((b")", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) <= 3 else b"t")

    def size(self, values: tuple[int, ...]) -> None:
        """A ``torch.Size``."""
        fetch = self.shapes.get(values)
        if fetch is not None:
            self.put(fetch)
            return
        self.global_("torch", "Size")
        self.tuple_(values)
        self.put(b"\x85R")
        self.shapes[values] = self.memoize()

    def begin(self, module: str, name: str) -> None:
        """An instance; its attributes follow as pairs of text and value, until ``end``."""
        self.global_(module, name)
        self.put(_NEW_INSTANCE + b"}(")

    def end(self) -> None:
        self.put(b"u" + _BUILD)

    # ---- parts of the metadata ----

    def index_of_keys(self, manifest: Manifest, keys: list[str]) -> None:
        self.put(b"}(")
        for key in keys:
            self.text(key)
            tensor = manifest.tensors.get(key)
            if tensor is None:
                self.global_(METADATA_MODULE, "BytesStorageMetadata")
                self.put(_NEW_INSTANCE)
            else:
                self.tensor(tensor)
        self.put(b"u")

    def tensor(self, tensor: TensorEntry) -> None:
        self.begin(METADATA_MODULE, "TensorStorageMetadata")
        self.text("properties")
        self.properties(tensor.dtype)
        self.text("size")
        self.size(tensor.shape)
        self.text("chunks")
        self.put(b"](")
        for shard in _stored_shards(tensor):
            self.begin(METADATA_MODULE, "ChunkStorageMetadata")
            self.text("offsets")
            self.size(shard.box.offsets)
            self.text("sizes")
            self.size(shard.box.sizes)
            self.end()
        self.put(b"e")
        self.end()

    def properties(self, dtype: str) -> None:
        """``TensorProperties``, whose state is (dtype, layout, requires_grad, memory format, pin_memory)."""
        self.global_(METADATA_MODULE, "TensorProperties")
        self.put(_NEW_INSTANCE + b"(")
        self.global_("torch", dtype)
        self.global_("torch.serialization", "_get_layout")
        self.text("torch.strided")
        self.put(b"\x85R" + _FALSE)
        self.global_(METADATA_MODULE, "_MEM_FORMAT_ENCODING")
        self.put(b"K\x00\x85R" + _FALSE)
        self.put(b"t" + _BUILD)

    def index_of_paths(self, manifest: Manifest, keys: list[str]) -> None:
        self.put(b"}(")
        for key in keys:
            self.text(key)
            self.tuple_(manifest.paths.get(key, (key,)))
        self.put(b"u")

    def index_of_places(self, manifest: Manifest, keys: list[str]) -> None:
        self.put(b"}(")
        for key in keys:
            tensor = manifest.tensors.get(key)
            if tensor is None:
                self.place(key, None, None, manifest.objects[key])
                continue
            for number, shard in enumerate(_stored_shards(tensor)):
                self.place(key, shard.box.offsets, number, shard)
        self.put(b"u")

    def place(
        self, key: str, offsets: tuple[int, ...] | None, chunk: int | None, entry: ShardEntry | ObjectEntry
    ) -> None:
        """One item of ``storage_data``: a ``MetadataIndex`` and its ``_StorageInfo``."""
        self.begin(METADATA_MODULE, "MetadataIndex")
        self.text("fqn")
        self.text(key)
        self.text("index")
        if chunk is None:
            self.put(_NONE)
        else:
            self.number(chunk)
        if offsets is not None:
            self.text("offset")
            self.size(offsets)
        self.end()
        self.begin(FILESYSTEM_MODULE, "_StorageInfo")
        self.text("relative_path")
        self.text(entry.file)
        self.text("offset")
        self.number(entry.record_offset)
        self.text("length")
        self.number(entry.record_nbytes)
        self.end()

    def storage_meta(self, save_id: str) -> None:
        self.begin(METADATA_MODULE, "StorageMeta")
        self.text("checkpoint_id")
        self.put(_NONE)
        self.text("save_id")
        self.text(save_id)
        self.text("load_id")
        self.put(_NONE)
        self.text("modules")
        self.put(b"]")
        self.end()
