"""A step saved as Hugging Face files: its digests, and checks of its files against them.

Such a folder may have been uploaded to the hub and downloaded again: in the hub's cache its files are links.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from milepost.errors import FormatError, Problem, StorageError, listed
from milepost.format.digest import BlockDigests, combine_blocks, crc32, files_in_blocks, parse_digests
from milepost.format.huggingface import MAX_INDEX_NBYTES
from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME, Manifest
from milepost.format.manifest_json import MAX_MANIFEST_NBYTES, from_json
from milepost.format.tags import untagged
from milepost.run.hf_folder import holds_safetensors, is_hf_step
from milepost.storage.base import ReadHandle, Storage, join
from milepost.storage.links import open_linked, read_linked
from milepost.verification.block_reader import BlockReader

MAX_SMALL_NBYTES = MAX_INDEX_NBYTES
_MAX_DIGESTS_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class HfStep:
    """The commit record of a step of Hugging Face files."""

    storage: Storage
    folder: str
    manifest: Manifest
    digests: BlockDigests | None
    """None if an older Milepost wrote it, which stored no digests of the tensors' files."""

    @property
    def block_nbytes(self) -> int:
        """Number of bytes covered by each digest."""
        return self.digests.block_nbytes if self.digests is not None else 0

    def open_file(self, name: str) -> ReadHandle:
        """Open a file of tensors; if it has digests, each block read is checked.

        Raises:
            FormatError: it has another size.
            StorageError: it can't be opened.
        """
        handle = open_linked(self.storage, join(self.folder, name), anywhere=True)
        entry = self.manifest.files.get(name)
        if entry is None or self.digests is None:
            return handle
        if handle.nbytes != entry.nbytes:
            handle.close()
            raise FormatError(f"{handle.path}: expected {entry.nbytes} bytes, found {handle.nbytes}", path=handle.path)
        return CheckedFile(handle, self.digests.of_file(name), self.digests.block_nbytes)

    def small_faults(self, names: Collection[str] | None = None) -> list[Problem]:
        """Report the files without tensors that are missing, or differ from what was written.

        ``names`` restricts the check to these names, without save ids.
        """
        faults = []
        blocks = {*files_in_blocks(self.manifest)}
        for name, entry in sorted(self.manifest.files.items()):
            if name in blocks or entry.crc32 is None or (names is not None and untagged(name) not in names):
                continue
            try:
                data = read_linked(self.storage, join(self.folder, name), max(MAX_SMALL_NBYTES, entry.nbytes))
            except StorageError as error:
                faults.append(Problem(error.message, name))
                continue
            if (len(data), crc32(data)) != (entry.nbytes, entry.crc32):
                faults.append(Problem(f"it changed after it was written{_hint(name)}", name, byte_range=(0, len(data))))
        return faults

    def block_faults(self) -> list[Problem]:
        """Report files whose entries in the manifest and in ``milepost.digests`` differ."""
        if self.digests is None:
            return []
        faults = []
        for name in files_in_blocks(self.manifest):
            entry = self.manifest.files[name]
            if combine_blocks(self.digests.of_file(name), entry.nbytes, self.digests.block_nbytes) != entry.crc32:
                faults.append(Problem(f"its digests of {name} are not those of {MANIFEST_NAME}", DIGESTS_NAME))
        return faults

    def require(self, names: Collection[str]) -> None:
        """Raise FormatError if the small files ``names`` (or the digests themselves) differ from what was written."""
        problems = [*self.small_faults(names), *self.block_faults()]
        if problems:
            where = f"{self.storage.root}/{self.folder}".rstrip("/")
            lines = "\n  ".join(listed(problems))
            raise FormatError(f"{where} is damaged:\n  {lines}", path=f"{where}/{problems[0].file}")


def _hint(name: str) -> str:
    if untagged(name) == DIGESTS_NAME:
        return ""
    return (
        f" (if you changed it on purpose, delete {MANIFEST_NAME} and {DIGESTS_NAME}: the folder is then an external "
        f"checkpoint)"
    )


def read_hf_step(storage: Storage, folder: str, names: Collection[str]) -> HfStep | None:
    """Read the record of the step in ``folder`` with the files ``names``; None if it is not a step of such files.

    Raises:
        FormatError: the manifest or the digests are damaged, or one of them is missing.
        StorageError: they can't be read.
    """
    where = join(folder, MANIFEST_NAME)
    if MANIFEST_NAME not in names:
        if DIGESTS_NAME in names and holds_safetensors(names) and METADATA_NAME not in names:
            raise FormatError(
                f"{where}: missing, but {DIGESTS_NAME} exists (without it, the folder would be external)", path=where
            )
        return None
    manifest = from_json(_read_record(storage, where, MAX_MANIFEST_NBYTES), where)
    if not is_hf_step(manifest):
        return None
    digests = None
    name = manifest.file_named(DIGESTS_NAME)
    if name is not None:
        digests = parse_digests(
            _read_record(storage, join(folder, name), _MAX_DIGESTS_NBYTES), manifest, join(folder, name)
        )
    return HfStep(storage, folder, manifest, digests)


def _read_record(storage: Storage, where: str, limit_nbytes: int) -> bytes:
    try:
        return read_linked(storage, where, limit_nbytes)
    except StorageError as error:
        if error.errno not in (errno.ENOENT, errno.EISDIR, errno.ELOOP):
            raise
        raise FormatError(f"{where}: {error.message}", path=where) from error


class CheckedFile(ReadHandle):
    """An open file whose blocks are compared with their digests when read. Owns ``handle``."""

    def __init__(self, handle: ReadHandle, crcs: Sequence[int], block_nbytes: int):
        self.path = handle.path
        self.nbytes = handle.nbytes
        self._handle = handle
        self._block_nbytes = block_nbytes
        self.reader = BlockReader(handle, "", 0, handle.nbytes, None, crcs, block_nbytes)
        """The unchecked file, for callers that check later."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        if offset + sum(map(len, buffers)) > self.nbytes:
            self._handle.read_into(offset, buffers)  # which raises
        for view in buffers:
            self.reader.read(offset, view, self._spare)
            offset += len(view)

    def _spare(self) -> memoryview:
        return memoryview(bytearray(min(self._block_nbytes, self.nbytes)))

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._handle.will_read(ranges)

    def close(self) -> None:
        self._handle.close()
