"""Verify weights outside a run: a Hugging Face folder, a safetensors or a ``torch.save`` file.

Safetensors have no digests, except in a step that Milepost saved in this form. Otherwise the checks are: headers and
sizes are consistent, no two tensors overlap, and no value is NaN. The zip entries of a ``torch.save`` file have
CRC-32s.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby

from milepost.errors import FormatError, MilepostError, Problem, StorageError, listed
from milepost.format.digest import files_in_blocks
from milepost.format.huggingface import ADAPTER_CONFIG_NAME, CONFIG_NAME, MAX_CONFIG_NBYTES, TORCH_FILES, parse_object
from milepost.format.kinds import refuse_other_kind
from milepost.format.manifest import TensorEntry
from milepost.format.torch_file import MAX_ENTRIES, inert_values, locate_tensors
from milepost.run.hf_folder import HfFolder, is_adapter, plain_or_tagged, read_headers, read_hf_folder
from milepost.storage.base import ReadHandle, Storage, join, split
from milepost.storage.links import open_linked, read_linked
from milepost.verification.extent_reader import ExtentReader, Findings
from milepost.verification.extents import SAMPLE_RECORDS, Data, Extent, Level, unknown, values, zip_extents
from milepost.verification.hf_step import CheckedFile, HfStep

WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
"""Suffixes of files that are verified as weights by themselves."""


def may_be_weights(path: str) -> bool:
    """Return True for a file to verify as weights: by its suffix, or without one, like the hub cache's blobs."""
    return path.endswith(WEIGHTS_SUFFIXES) or "." not in path.rpartition("/")[2]


class WeightsCheck:
    """Checks weights and adds problems to ``findings``. Only level ``full`` reads every byte, not only headers."""

    def __init__(self, storage: Storage, findings: Findings, *, num_threads: int, level: Level):
        self._storage = storage
        self._findings = findings
        self._level = level
        self._reader = ExtentReader(findings, num_threads)
        self.num_items = 0
        self.nbytes = 0
        self.notes: list[str] = []

    def hf_folder(self, folder: str, names: Collection[str], step: HfStep | None = None) -> None:
        """Check the weights and the configs among the files ``names`` of a folder, against the digests of ``step``."""
        if step is not None:
            for problem in (*step.small_faults(), *step.block_faults()):
                self._findings.add(problem)
        config = plain_or_tagged(CONFIG_NAME, names)
        for name in (config, ADAPTER_CONFIG_NAME):
            if name in names and name is not None:
                self._config(folder, name)
        if is_adapter(names):
            self.notes.append("an adapter, not a full model")
        elif config is None:
            self.notes.append(f"{CONFIG_NAME} is missing: the model is unknown")
        found = read_hf_folder(self._storage, folder, names)
        self.notes += found.notes
        if found.kind is TORCH_FILES:
            self._torch_files(folder, found)
        else:
            self._safetensors(folder, found, step)

    def file(self, path: str) -> None:
        """Check one file of weights."""
        folder, name = split(path)
        if name.endswith(".safetensors") or self._is_safetensors_blob(path):
            self._safetensors(folder, read_headers(self._storage, folder, [name]))
            return
        with open_linked(self._storage, path, anywhere=True) as handle:
            self.nbytes = self._findings.total_nbytes = handle.nbytes
            refuse_other_kind(handle.read, handle.nbytes, handle.path, name)
            try:
                self._torch_file(handle, name)
            except (FormatError, StorageError) as error:
                self._add(error, handle.path, name)

    def _is_safetensors_blob(self, path: str) -> bool:
        if path.endswith(WEIGHTS_SUFFIXES):
            return False
        with open_linked(self._storage, path, anywhere=True) as handle:
            return handle.nbytes > 8 and handle.read(8, 1) == b"{"

    def _config(self, folder: str, name: str) -> None:
        where = join(folder, name)
        try:
            parse_object(read_linked(self._storage, where, MAX_CONFIG_NBYTES), where)
        except MilepostError as error:
            self._add(error, where, name)

    def _safetensors(self, folder: str, found: HfFolder, step: HfStep | None = None) -> None:
        for problem in found.problems:
            self._findings.add(problem)
        self.num_items = len(found.tensors)
        self.nbytes = sum(entry.nbytes for entry in found.files.values())
        held: dict[str, list[tuple[int, str]]] = {name: [] for name in found.files}
        for key, entry in found.tensors.items():
            held[entry.shards[0].file].append((entry.shards[0].record_offset, key))
        if step is not None and step.digests is not None:
            self._blocks(step, {name: sorted(places) for name, places in held.items()})
            return
        if found.files:
            self.notes.append("safetensors files hold no digests: changed values can't be detected")
        if self._level != "full":
            self._findings.count_read(0, unchecked_nbytes=self.nbytes)
            return
        self._findings.total_nbytes += self.nbytes
        for name, places in held.items():
            extents = _extents(sorted(places), found.files[name].nbytes, found.tensors)
            with open_linked(self._storage, join(folder, name), anywhere=True) as handle:
                self._reader.check(handle, name, extents)

    def _torch_files(self, folder: str, found: HfFolder) -> None:
        """Check the files of a folder of a model from before safetensors."""
        for problem in found.problems:
            self._findings.add(problem)
        self.nbytes = self._findings.total_nbytes = sum(entry.nbytes for entry in found.files.values())
        for name in found.files:
            with open_linked(self._storage, join(folder, name), anywhere=True) as handle:
                try:
                    self._torch_file(handle, name)
                except (FormatError, StorageError) as error:
                    self._add(error, handle.path, name)

    def _blocks(self, step: HfStep, held: Mapping[str, Sequence[tuple[int, str]]]) -> None:
        """Compare all blocks of the step's files, or a sample, with their digests."""
        if self._level not in ("sample", "full"):
            return
        blocks = [
            (name, start)
            for name in files_in_blocks(step.manifest)
            for start in range(0, step.manifest.files[name].nbytes, step.block_nbytes)
        ]
        if self._level == "sample":
            blocks = sorted(random.Random().sample(blocks, min(SAMPLE_RECORDS, len(blocks))))
        self._findings.total_nbytes += step.block_nbytes * len(blocks)
        for name, group in groupby(blocks, key=lambda block: block[0]):
            try:
                handle = step.open_file(name)
            except (FormatError, StorageError) as error:
                self._add(error, join(step.folder, name), name)
                continue
            with handle:
                assert isinstance(handle, CheckedFile), "it has digests"
                reader = handle.reader
                stops = ((start, min(start + step.block_nbytes, reader.nbytes)) for _, start in group)
                extents = (Data(*range_, reader, _what(held.get(name, ()), *range_)) for range_ in stops)
                self._reader.check(reader.handle, name, extents)

    def _torch_file(self, handle: ReadHandle, name: str) -> None:
        values: dict[str, object] = {}
        self.num_items += len(locate_tensors(handle.read, handle.nbytes, handle.path, values=values))
        if inert := inert_values(values):
            self.notes.append(f"values other than tensors: {', '.join(listed(inert))}")
        if self._level != "full":
            self._findings.count_read(0, unchecked_nbytes=handle.nbytes)
            return
        self._reader.check(handle, name, zip_extents(handle, 0, handle.nbytes, max_entries=MAX_ENTRIES))

    def _add(self, error: MilepostError, path: str, name: str) -> None:
        self._findings.add(Problem(error.message.removeprefix(f"{path}: "), name))


def _what(places: Sequence[tuple[int, str]], start: int, stop: int) -> str:
    """Name the tensors at ``places`` in a file that overlap ``[start, stop)``."""
    first = max(bisect_right(places, start, key=lambda place: place[0]) - 1, 0)
    last = bisect_left(places, stop, key=lambda place: place[0])
    keys = [key for _, key in places[first:last]]
    whose = f"data of {', '.join(listed(keys, 3))}"
    return whose if start else f"the header, or {whose}"


def _extents(places: Sequence[tuple[int, str]], nbytes: int, tensors: Mapping[str, TensorEntry]) -> Iterator[Extent]:
    """Yield the extents of a safetensors file of ``nbytes`` with their offsets: its header, then its tensors."""
    position = 0
    for start, key in places:
        if start > position:
            yield from unknown(position, start)
        position = start + tensors[key].shards[0].data_nbytes
        if position > start:
            yield from values(start, position, tensors[key].dtype, key)
    if nbytes > position:
        yield from unknown(position, nbytes)
