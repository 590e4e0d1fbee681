"""Write weights: a DCP checkpoint, a Hugging Face folder or a ``.pt`` file, each invisible until complete.

All three use the commit protocol's attempt folder: the remains of a killed conversion are not mistaken for weights by
any reader, and are removed by a later save or conversion beside it.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from milepost.errors import ConversionError
from milepost.format import record
from milepost.format.box import Box
from milepost.format.digest import combine_blocks
from milepost.format.huggingface import CONFIG_NAME
from milepost.format.safetensors import SafetensorsLayout, plan_layout
from milepost.format.torch_file import plan_torch_file
from milepost.interop.hf.extras import HfExtras, split_into_files
from milepost.interop.weights.boxes import Source, TensorInfo
from milepost.interop.weights.open import (
    manifest_source,
    open_weights,
)
from milepost.interop.weights.stream import PassedBytes, PlacedTensor, SlabReader, write_image
from milepost.run import commit
from milepost.run.assemble import SaveInfo, assemble
from milepost.run.attempts import abort_attempt, begin_attempt, new_save_id
from milepost.run.beside import enclosing_checkpoint
from milepost.run.checkpoint_record import is_checkpoint
from milepost.run.place import Place
from milepost.run.signoff import SignOff, WrittenFile, WrittenTensor, segment_of
from milepost.run.step_names import step_of
from milepost.saving.writer import object_pieces, place_objects
from milepost.storage import open_storage
from milepost.storage.base import Entry, join, split
from milepost.tensors.plan import TensorSpec, WriteItem, lay_out_file


class Sink(ABC):
    """A target for weights. ``begin`` .. ``write`` .. (``reopen``) .. ``publish``, or ``abort`` at any time."""

    def __init__(self, path: str | os.PathLike[str]):
        self.storage, self.target = open_storage(path)
        self.path = join(self.storage.root, self.target) if self.target else self.storage.root
        self.save_id = new_save_id()
        self._attempt = ""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Begin; at the end of the block publish the output, or remove everything after an error."""
        try:
            self.begin()
            yield
            self.publish()
        except BaseException:
            self.abort()
            raise

    def begin(self) -> None:
        """Create the attempt's folder.

        Raises:
            ConversionError: the target already exists, or is inside a checkpoint's folder.
        """
        if not self.target:
            raise ConversionError(
                f"{self.path} is the root of a bucket or of a file system: give a name in it, such as "
                f"{self.path.rstrip('/')}/{self.usual_name}",
                path=self.path,
            )
        found = self.storage.stat(self.target)
        if found is not None and not (found.is_folder and not self.storage.list(self.target)):
            raise ConversionError(f"{self.path} {self._why_taken(found)}", path=self.path)
        if (checkpoint := enclosing_checkpoint(self.path, self.storage)) is not None:
            raise ConversionError(
                f"{self.path} is inside the checkpoint {checkpoint}, which retention may delete: give a destination "
                "outside of it",
                path=self.path,
            )
        self._attempt = begin_attempt(self.storage, self.target, self.save_id)

    def _why_taken(self, found: Entry) -> str:
        """Say what to do about what is at the target. A checkpoint, or a folder of others, is not to be removed."""
        if found.is_folder and is_checkpoint(self.storage, self.target):
            return "already exists, as a checkpoint: give another destination"
        if found.is_folder and any(entry.is_folder for entry in self.storage.list(self.target)):
            return f"already exists: give another destination, such as {join(self.path, self.usual_name)}"
        return "already exists: remove it or give another destination"

    usual_name = "model"
    """A name for the output, for messages."""

    @property
    def place(self) -> Place:
        """The location of the attempt's files.

        In a store, files other than a checkpoint's are written directly to their final location: the target is empty,
        and the file that readers open first is written last.
        """
        place = Place.of(self.storage, self._attempt, self.target, self.save_id)
        return place if self.has_manifest else replace(place, tag="")

    has_manifest = False
    """True if a manifest lists the file names, so that they may contain the save id."""

    @abstractmethod
    def write(self, reader: SlabReader, shared: Mapping[str, str]) -> None:
        """Write and sync all tensors of ``reader``. ``shared``: keys of tensors equal to another one.

        Raises:
            StorageError: the storage refused, for instance for lack of space.
        """

    @abstractmethod
    def reopen(self) -> Source:
        """Open the written tensors, to read them back from the storage."""

    @abstractmethod
    def publish(self) -> None:
        """Publish the output under its name atomically and durably."""

    def abort(self) -> None:
        """Remove everything."""
        if self._attempt:
            if not self.has_manifest and not self.storage.can_rename:
                self.storage.remove_tree(self.target)
            abort_attempt(self.storage, self._attempt)

    def _publish_by_rename(self, name: str) -> None:
        """Rename ``name`` within the attempt to the target, which is absent or an empty folder."""
        if not self.storage.can_rename:
            abort_attempt(self.storage, self._attempt)
            return
        folder = split(self.target)[0]
        self.storage.sync_folder(split(name)[0])
        if self.storage.stat(self.target) is not None:
            os.rmdir(self.path)
        self.storage.rename(name, self.target)
        self.storage.sync_folder(folder)
        abort_attempt(self.storage, self._attempt)


# ---- DCP ----


class DcpSink(Sink):
    """A checkpoint folder, committed like one saved by training. ``extra`` goes into its manifest.

    ``objects`` are the records of a training state's other values; ``paths`` are the paths of keys of several parts.
    """

    has_manifest = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        extra: Mapping[str, Any],
        *,
        objects: Mapping[str, bytes] | None = None,
        paths: Mapping[str, tuple[str | int, ...]] | None = None,
    ):
        super().__init__(path)
        self._extra = extra
        self._objects = objects or {}
        self._paths = paths or {}
        self._signed: tuple[SignOff, ...] = ()
        self._info = SaveInfo(step=step_of(self.target), kind="full" if self._objects else "model")

    def write(self, reader: SlabReader, shared: Mapping[str, str]) -> None:
        """See ``Sink``. Shared tensors are stored once per name: stock DCP does not support sharing."""
        tensors = reader.content.tensors
        boxes = [(_spec(key, info), Box.whole(info.shape)) for key, info in tensors.items()]
        plan = lay_out_file(0, boxes, tuple(self._objects))
        objects, nbytes = place_objects(plan, self._objects)
        with self.storage.open_write(self.place.path(plan.file), nbytes) as handle:
            # In ascending order if the storage requires it, else few large writes, and the bytes between the data last.
            groups = [(item,) for item in plan.items] if handle.is_sequential else [plan.items]
            frame, written = _Frame(), list[WrittenTensor]()
            for group in groups:
                if handle.is_sequential:
                    handle.write(*frame.before(group[0]))
                passed = write_image(handle, [PlacedTensor(item.key, item.data_offset) for item in group], reader)
                for item in group:
                    if not handle.is_sequential:
                        handle.write(*frame.before(item))
                    written.append(_written(item, passed[item.key]))
                    frame.passed(written[-1])
            handle.write(*frame.end(plan.objects_offset))
            if objects:
                pieces = list(object_pieces(plan.objects_offset, objects, self._objects))[:-1]  # no padding at the end
                handle.write(plan.objects_offset, pieces)
            handle.sync()
        self.storage.sync_folder(self.place.folder)
        file = WrittenFile(self.place.name(plan.file), nbytes, tuple(written), objects)
        self._signed = (SignOff(0, self.save_id, segment_of([file])),)
        self._info = replace(self._info, paths={**{key: (key,) for key in tensors}, **self._paths}, extra=self._extra)

    def reopen(self) -> Source:
        manifest, _ = assemble(self._signed, self._info, now=time.time())
        return manifest_source(self.storage, self.place.folder, manifest, None)

    def publish(self) -> None:
        commit.publish(self.storage, self._attempt, self.target, self._signed, self._info, now=time.time())


def _written(item: WriteItem, passed: PassedBytes) -> WrittenTensor:
    blocks = passed.blocks(item.data_nbytes)
    return WrittenTensor(item, combine_blocks(blocks, item.data_nbytes), tuple(blocks))


class _Frame:
    """Generates the bytes between the tensors' data, in order: footer, padding, and the next header."""

    def __init__(self) -> None:
        self._end, self._footer = 0, b""

    def before(self, item: WriteItem) -> tuple[int, list[bytes]]:
        """Return the bytes before a tensor's data, with their offset."""
        header = record.tensor_record(item.dtype, item.box.sizes).header
        return self._end, [self._footer, bytes(item.record_offset - self._end - len(self._footer)), header]

    def passed(self, tensor: WrittenTensor) -> None:
        """Record a tensor that was written."""
        item = tensor.item
        layout = record.tensor_record(item.dtype, item.box.sizes)
        self._end, self._footer = item.data_offset + item.data_nbytes, record.record_footer(layout, tensor.crc32)

    def end(self, nbytes: int) -> tuple[int, list[bytes]]:
        """Return the bytes after the last tensor of a file of ``nbytes``, with their offset."""
        return self._end, [self._footer, bytes(nbytes - self._end - len(self._footer))]


def _spec(key: str, info: TensorInfo) -> TensorSpec:
    return TensorSpec(key, info.dtype, info.shape, (Box.whole(info.shape),))


# ---- Hugging Face ----


class HfSink(Sink):
    """A folder for ``from_pretrained``."""

    def __init__(self, path: str | os.PathLike[str], extras: HfExtras):
        super().__init__(path)
        self._extras = extras

    def write(self, reader: SlabReader, shared: Mapping[str, str]) -> None:
        """See ``Sink``."""
        tensors = reader.content.tensors
        files = split_into_files(tensors, self._extras.weight_map, self._extras.max_shard_nbytes)
        for name, keys in files.items():
            layout = plan_layout({key: (tensors[key].dtype, tensors[key].shape) for key in keys})
            self._write_file(self.place.path(name), layout, reader)
        small = dict(self._extras.files(files, tensors))
        for name in sorted(small, key=lambda name: name == CONFIG_NAME):  # without it, not a model
            self.storage.write(self.place.path(name), small[name])

    def _write_file(self, name: str, layout: SafetensorsLayout, reader: SlabReader) -> None:
        placed = [PlacedTensor(key, tensor.offset) for key, tensor in layout.tensors.items()]
        with self.storage.open_write(name, layout.nbytes) as handle:
            handle.write(0, [layout.prefix])
            write_image(handle, placed, reader, digests=False)
            handle.sync()

    def reopen(self) -> Source:
        return open_weights(join(self.storage.root, self.place.folder)).source

    def publish(self) -> None:
        self._publish_by_rename(self.place.folder)


# ---- .pt ----


class TorchFileSink(Sink):
    """One file like ``torch.save``'s of a state dict."""

    usual_name = "model.pt"

    @property
    def _file(self) -> str:
        if not self.storage.can_rename:
            return self.target
        return self.place.path(split(self.target)[1])

    def write(self, reader: SlabReader, shared: Mapping[str, str]) -> None:
        """See ``Sink``. Shared tensors share one storage, like tied weights in ``torch.save``."""
        tensors = reader.content.tensors
        stored = {key: (info.dtype, info.shape) for key, info in tensors.items() if key not in shared}
        layout = plan_torch_file(stored, shared)
        placed = [PlacedTensor(key, offset) for key, offset in layout.data_offsets.items()]
        with self.storage.open_write(self._file, layout.nbytes) as handle:
            passed = write_image(handle, placed, reader)
            for offset, data in layout.frame({key: found.crc32() for key, found in passed.items()}):
                handle.write(offset, [data])
            handle.sync()

    def reopen(self) -> Source:
        return open_weights(join(self.storage.root, self._file)).source

    def publish(self) -> None:
        self._publish_by_rename(self._file)
