"""Writing weights: a DCP checkpoint, a Hugging Face folder or a ``.pt`` file, each invisible until it is whole.

All three use the attempt folder of the commit protocol: a killed conversion leaves what no reader takes for weights,
and what a later save or conversion beside it sweeps.
"""

from __future__ import annotations

import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from milepost.errors import ConversionError
from milepost.format import record
from milepost.format.box import Box
from milepost.format.digest import combine_blocks
from milepost.format.dtype import itemsize
from milepost.format.safetensors import SafetensorsLayout, plan_layout
from milepost.format.torch_file import plan_torch_file
from milepost.interop.hf.config import config_faults, make_config, with_dtype
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.options import DEFAULT_SHARD_NBYTES
from milepost.interop.weights.boxes import PassedBytes, Source, TensorInfo, total_nbytes
from milepost.interop.weights.open import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    manifest_source,
    open_linked,
    open_weights,
    read_json,
    read_weight_map,
    shard_file_name,
)
from milepost.interop.weights.stream import Placed, SlabReader, write_image
from milepost.run import catalog, commit
from milepost.run.assemble import SaveInfo, assemble
from milepost.run.signoff import SignOff, WrittenFile, WrittenTensor
from milepost.storage import open_storage
from milepost.storage.base import split
from milepost.tensors.plan import TensorSpec, WriteItem, lay_out_file

_ASSETS = re.compile(
    r"(tokenizer.*|vocab.*|merges.*|special_tokens_map|added_tokens|chat_template.*|generation_config"
    r"|preprocessor_config)\.(json|txt|model|jinja)|LICENSE.*|NOTICE.*|USE_POLICY.*"
)
"""Files of an assets folder that belong beside the weights."""


class Sink(ABC):
    """A place for weights. ``begin`` .. ``write`` .. (``reopen``) .. ``publish``, or ``abort`` at any time."""

    def __init__(self, path: str | os.PathLike[str]):
        self.storage, self.target = open_storage(path)
        self.path = f"{self.storage.root}/{self.target}"
        self.save_id = commit.new_save_id()
        self._attempt = ""

    def begin(self) -> None:
        """Make the place of the attempt.

        Raises:
            ConversionError: there is something at the target already.
        """
        found = self.storage.stat(self.target)
        if found is not None and not (found.is_folder and not self.storage.list(self.target)):
            raise ConversionError(f"{self.path} exists already: remove it or give another destination", path=self.path)
        folder = split(self.target)[0]
        commit.sweep_leftovers(self.storage, folder, now=time.time())
        self._attempt = commit.begin_attempt(self.storage, self.target, self.save_id)

    @property
    def data(self) -> str:
        """The folder of the attempt's files."""
        return commit.data_folder(self._attempt)

    @abstractmethod
    def write(self, reader: SlabReader, shared: Mapping[str, str]) -> None:
        """Write and sync all tensors of ``reader``. ``shared``: keys of tensors that equal another one.

        Raises:
            StorageError: the storage refused, for instance for lack of space.
        """

    @abstractmethod
    def reopen(self) -> Source:
        """What was written, read back from the storage."""

    @abstractmethod
    def publish(self) -> None:
        """Give what was written its name, in one atomic act, and make that durable."""

    def abort(self) -> None:
        """Take everything away."""
        if self._attempt:
            commit.abort_attempt(self.storage, self._attempt)

    def _publish_by_rename(self, name: str) -> None:
        """Rename ``name`` within the attempt to the target, which is nothing or an empty folder."""
        folder = split(self.target)[0]
        self.storage.sync_folder(split(name)[0])
        if self.storage.stat(self.target) is not None:
            os.rmdir(self.path)
        self.storage.rename(name, self.target)
        self.storage.sync_folder(folder)
        commit.abort_attempt(self.storage, self._attempt)


# ---- DCP ----


class DcpSink(Sink):
    """A checkpoint folder, committed as one that training saved. ``extra`` goes into its manifest."""

    def __init__(self, path: str | os.PathLike[str], extra: Mapping[str, Any]):
        super().__init__(path)
        self._extra = extra
        self._signed: tuple[SignOff, ...] = ()
        self._info = SaveInfo(step=catalog.step_of(self.target), kind="model")

    def write(self, reader: SlabReader, shared: Mapping[str, str]) -> None:
        """See ``Sink``. Shared tensors are stored as often as they have names: stock DCP knows no sharing."""
        tensors = reader.content.tensors
        plan = lay_out_file(0, [(_spec(key, info), Box.whole(info.shape)) for key, info in tensors.items()], ())
        nbytes = plan.objects_offset
        with self.storage.open_write(f"{self.data}/{plan.file}", nbytes) as handle:
            passed = write_image(handle, [Placed(item.key, item.data_offset) for item in plan.items], reader)
            written = tuple(_written(item, passed[item.key]) for item in plan.items)
            for offset, part in _frame(written, nbytes):
                handle.write(offset, [part])
            handle.sync()
        self.storage.sync_folder(self.data)
        self._signed = (SignOff(0, self.save_id, (WrittenFile(plan.file, nbytes, written, ()),)),)
        self._info = replace(self._info, paths={key: (key,) for key in tensors}, extra=self._extra)

    def reopen(self) -> Source:
        manifest, _ = assemble(self._signed, self._info, now=time.time())
        return manifest_source(self.storage, self.data, manifest, None)

    def publish(self) -> None:
        commit.publish(self.storage, self._attempt, self.target, self._signed, self._info, now=time.time())


def _written(item: WriteItem, passed: PassedBytes) -> WrittenTensor:
    blocks = passed.blocks(item.data_nbytes)
    return WrittenTensor(item, combine_blocks(blocks, item.data_nbytes), tuple(blocks))


def _frame(written: Sequence[WrittenTensor], nbytes: int) -> Iterator[tuple[int, bytes]]:
    """What stands between the tensors' data: each one's footer, padding, and the next one's header."""
    end, footer = 0, b""
    for tensor in written:
        item = tensor.item
        layout = record.tensor_record(item.dtype, item.box.sizes)
        yield end, footer + bytes(item.record_offset - end - len(footer)) + layout.header
        end, footer = item.data_offset + item.data_nbytes, record.record_footer(layout, tensor.crc32)
    yield end, footer + bytes(nbytes - end - len(footer))


def _spec(key: str, info: TensorInfo) -> TensorSpec:
    return TensorSpec(key, info.dtype, info.shape, (Box.whole(info.shape),))


# ---- Hugging Face ----


@dataclass(frozen=True, slots=True, kw_only=True)
class HfExtras:
    """What lies beside the tensors of a Hugging Face folder."""

    config: Mapping[str, Any]
    files: Sequence[Path] = ()
    """Files to copy."""
    weight_map: Mapping[str, str] = field(default_factory=dict)
    """How an index splits the model into files; empty: split by size."""
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES


def assets_of(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's and other small files of a Hugging Face folder that belong beside converted weights."""
    return tuple(sorted(path for path in folder.iterdir() if _ASSETS.fullmatch(path.name) and path.is_file()))


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
            self._write_file(f"{self.data}/{name}", layout, reader)
        for name, data in extras_files(self._extras, files, tensors):
            self.storage.write(f"{self.data}/{name}", data)

    def _write_file(self, name: str, layout: SafetensorsLayout, reader: SlabReader) -> None:
        placed = [Placed(key, tensor.offset) for key, tensor in layout.tensors.items()]
        with self.storage.open_write(name, layout.nbytes) as handle:
            write_image(handle, placed, reader, digests=False)
            handle.write(0, [layout.prefix])
            handle.sync()

    def reopen(self) -> Source:
        return open_weights(f"{self.storage.root}/{self.data}").source

    def publish(self) -> None:
        self._publish_by_rename(self.data)


def hf_extras(
    family: str,
    args: ModelArgs,
    tensors: Mapping[str, TensorInfo],
    assets: Path | None,
    max_shard_nbytes: int | None,
) -> HfExtras:
    """What goes beside ``tensors``: from the folder ``assets``, or made. A size given overrules its index.

    Raises:
        ConversionError: the config in ``assets`` is of another model.
    """
    dtype = _main_dtype(tensors)
    config = read_json(assets / CONFIG_NAME) if assets is not None else None
    if config is None:
        config = make_config(family, args, dtype)
    else:
        check_config(config, family, args, f"{assets}/{CONFIG_NAME}")
        config = with_dtype(config | {"vocab_size": args.vocab_size}, dtype)
    weight_map = {}
    if assets is not None and max_shard_nbytes is None and (assets / INDEX_NAME).exists():
        weight_map = read_weight_map(assets)
    return HfExtras(
        config=config,
        files=assets_of(assets) if assets is not None else (),
        weight_map=weight_map,
        max_shard_nbytes=max_shard_nbytes or DEFAULT_SHARD_NBYTES,
    )


def check_config(config: Mapping[str, Any], family: str, args: ModelArgs, path: str) -> None:
    """Refuse a ``config.json`` of another model. The size of the vocabulary is left to the weights to tell.

    Raises:
        ConversionError: with every difference.
    """
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int):
        args = replace(args, vocab_size=vocabulary)
    faults = config_faults(config, family, args)
    if faults:
        raise ConversionError(
            f"{path} is of another model than the flavor given:\n  " + "\n  ".join(faults), path=path, problems=faults
        )


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype that most of the bytes have."""
    nbytes: dict[str, int] = {}
    for info in tensors.values():
        nbytes[info.dtype] = nbytes.get(info.dtype, 0) + total_nbytes([info])
    return max(nbytes, key=lambda dtype: nbytes[dtype])


def extras_files(
    extras: HfExtras, files: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file beside those of the tensors; ``files`` are those and the keys in them."""
    if len(files) > 1 or extras.weight_map:
        yield INDEX_NAME, _json(_index(files, tensors))
    yield CONFIG_NAME, _json(extras.config)
    for path in extras.files:
        with open_linked(path) as handle:
            data = bytearray(handle.nbytes)
            handle.read_into(0, [memoryview(data)])
        yield path.name, bytes(data)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def split_into_files(
    tensors: Mapping[str, TensorInfo], weight_map: Mapping[str, str], max_nbytes: int
) -> dict[str, list[str]]:
    """File name: keys in it. As ``weight_map`` says, else in order, no file above ``max_nbytes`` (but for one tensor).

    Raises:
        ConversionError: ``weight_map`` does not place every tensor.
    """
    if weight_map:
        missing = [key for key in tensors if key not in weight_map]
        if missing:
            raise ConversionError(
                f"the index of the assets folder does not place {len(missing)} of {len(tensors)} tensors, "
                f"first '{missing[0]}': is it of another model?"
            )
        files: dict[str, list[str]] = {}
        for key in tensors:
            files.setdefault(weight_map[key], []).append(key)
        return dict(sorted(files.items()))
    groups: list[list[str]] = [[]]
    room = max_nbytes
    for key, info in tensors.items():
        nbytes = Box.whole(info.shape).numel * itemsize(info.dtype)
        if groups[-1] and nbytes > room:
            groups.append([])
            room = max_nbytes
        groups[-1].append(key)
        room -= nbytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {shard_file_name(index, len(groups)): keys for index, keys in enumerate(groups, 1)}


def _index(files: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    weight_map = {key: name for name, keys in files.items() for key in keys}
    return {
        "metadata": {"total_size": total_nbytes(tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }


# ---- .pt ----


class TorchFileSink(Sink):
    """One file, as ``torch.save`` writes a state dict."""

    @property
    def _file(self) -> str:
        return f"{self.data}/{split(self.target)[1]}"

    def write(self, reader: SlabReader, shared: Mapping[str, str]) -> None:
        """See ``Sink``. Shared tensors share one storage, as after ``torch.save`` of tied weights."""
        tensors = reader.content.tensors
        stored = {key: (info.dtype, info.shape) for key, info in tensors.items() if key not in shared}
        layout = plan_torch_file(stored, shared)
        placed = [Placed(key, offset) for key, offset in layout.data_offsets.items()]
        with self.storage.open_write(self._file, layout.nbytes) as handle:
            passed = write_image(handle, placed, reader)
            for offset, data in layout.frame({key: found.crc32() for key, found in passed.items()}):
                handle.write(offset, [data])
            handle.sync()

    def reopen(self) -> Source:
        return open_weights(f"{self.storage.root}/{self._file}").source

    def publish(self) -> None:
        self._publish_by_rename(self._file)
