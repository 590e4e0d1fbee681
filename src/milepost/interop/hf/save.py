"""Save a model in training as Hugging Face files: every rank writes its own ranges of the final files.

There is no second pass and no gathering: names, dtypes and shapes determine every file's layout, so each rank knows the
file and offset of its boxes' elements. Torch-free, because a background process may write.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from milepost.collective.threads import map_in_threads
from milepost.errors import ConversionError, SaveError, listed
from milepost.format.box import Box, Slab, contiguous_runs, cut_into_slabs
from milepost.format.dtype import itemsize
from milepost.format.manifest import HF_FORMAT, Manifest
from milepost.format.safetensors import SafetensorsLayout, plan_layout
from milepost.format.shares import FileDigests, Share, ShareCount, joined
from milepost.interop.hf.extras import HfExtras, hf_extras, split_into_files
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.rules import Correspondence, Link, Op, Recipe, correspond
from milepost.interop.options import DEFAULT_SHARD_NBYTES
from milepost.interop.weights.boxes import Array, TensorInfo, array_dtype, raw_bytes
from milepost.interop.weights.stream import BUFFER_NBYTES, SLAB_NBYTES, ImageStream
from milepost.run.assemble import SaveInfo
from milepost.saving.writer import BlockSource, FileImage
from milepost.storage.base import Storage, WriteHandle, join
from milepost.tensors.plan import WriteItem
from milepost.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class HfContent:
    """The content of the files, with the source of each element."""

    tensors: Mapping[str, TensorInfo]
    """Tensors by the names in the files."""
    links: Mapping[str, tuple[Link, ...]]
    """Our key -> destinations of its elements; none if it repeats another key."""
    recipes: Mapping[str, Recipe]
    """The same links by their keys."""
    extras: HfExtras
    max_shard_nbytes: int


class AnyHfTarget(Protocol):
    """A model to be saved as Hugging Face files. Plain data, the same on every rank; must pickle."""

    def content(self) -> HfContent:
        """Compute the content of the files. Pure, and equal on every rank.

        Raises:
            ConversionError: the model's tensors do not match its tables, or the assets belong to another model.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HfTarget:
    """A model with a table."""

    model: str
    """``llama3`` or ``qwen3``."""
    args: ModelArgs
    dtypes: Mapping[str, str]
    """Our key -> stored dtype."""
    assets: str = ""
    """A Hugging Face folder that provides config, tokenizer files and file index; empty: they are created or left
    out."""
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES

    def content(self) -> HfContent:
        """See :class:`AnyHfTarget`."""
        family = family_of(self.model, self.args)
        found = correspond(family, family.scheme("hf"), self.args)
        _check_keys(found, self)
        tensors = _foreign_tensors(found, self)
        return HfContent(
            tensors=tensors,
            links=by_our_key(found.links),
            recipes=found.into_theirs(),
            extras=hf_extras(family.name, self.args, tensors, self.assets, None),
            max_shard_nbytes=self.max_shard_nbytes,
        )


def by_our_key(links: Sequence[Link]) -> dict[str, tuple[Link, ...]]:
    """Return the links of each of our keys."""
    found: dict[str, list[Link]] = {}
    for link in links:
        found.setdefault(link.ours_key, []).append(link)
    return {key: tuple(group) for key, group in found.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    file: str
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class HfImage:
    """The final files: their layouts, and the links from our boxes to them."""

    content: HfContent
    files: Mapping[str, SafetensorsLayout]
    places: Mapping[str, _Place]


def plan_image(target: AnyHfTarget) -> HfImage:
    """Plan the files. Pure, and equal on every rank.

    Raises:
        ConversionError: the model's tensors do not match its tables, or the assets belong to another model.
    """
    content = target.content()
    tensors = content.tensors
    files = {
        name: plan_layout({key: (tensors[key].dtype, tensors[key].shape) for key in keys})
        for name, keys in split_into_files(tensors, content.extras.weight_map, content.max_shard_nbytes).items()
    }
    places = {
        key: _Place(name, stored.offset, stored.shape)
        for name, layout in files.items()
        for key, stored in layout.tensors.items()
    }
    return HfImage(content, files, places)


def _check_keys(found: Correspondence, target: HfTarget) -> None:
    missing = [key for key in found.ours if key not in target.dtypes]
    unknown = [key for key in target.dtypes if key not in found.ours]
    if missing or unknown:
        lines = [*(f"missing: {key}" for key in missing), *(f"unknown: {key}" for key in unknown)]
        raise ConversionError(
            f"the model that is trained is not a {target.model} as Hugging Face defines it:\n  "
            + "\n  ".join(listed(lines)),
            problems=lines,
        )


def _foreign_tensors(found: Correspondence, target: HfTarget) -> dict[str, TensorInfo]:
    dtypes: dict[str, set[str]] = {}
    for link in found.links:
        dtypes.setdefault(link.theirs_key, set()).add(target.dtypes[link.ours_key])
    mixed = [key for key, several in dtypes.items() if len(several) > 1]
    if mixed:
        raise ConversionError(f"'{mixed[0]}' would be of several dtypes ({', '.join(sorted(dtypes[mixed[0]]))})")
    return {key: TensorInfo(next(iter(dtypes[key])), shape) for key, shape in found.theirs.items()}


def write_extras(storage: Storage, folder: str, image: HfImage) -> dict[str, Share]:
    """Write the files beside the weights: index, config and assets. Called by one rank; returns its shares.

    Raises:
        StorageError: the storage refused.
    """
    keys = {name: tuple(layout.tensors) for name, layout in image.files.items()}
    files = dict(image.content.extras.files(keys, image.content.tensors))
    storage.write_all({join(folder, name): data for name, data in files.items()})
    return {name: _share_of(data, len(data)) for name, data in files.items()}


def _share_of(beginning: bytes, file_nbytes: int) -> Share:
    count = ShareCount(file_nbytes)
    count.add(0, memoryview(beginning))
    return count.share()


def write_part(
    storage: Storage,
    folder: str,
    image: HfImage,
    items: Sequence[WriteItem],
    source: BlockSource | FileImage,
    *,
    with_headers: bool = False,
    num_threads: int = 2,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Share]:
    """Write and sync this rank's boxes (``items``) into the final files; returns its shares of them.

    One rank also writes the headers (``with_headers``). The first rank to open a file creates it. Memory besides the
    source: two slabs and a buffer per thread.

    Raises:
        StorageError: the first failure on any thread.
    """
    names = {image.places[link.theirs_key].file for item in items for link in image.content.links[item.key]}
    names.update(image.files if with_headers else ())
    counts = {name: ShareCount(image.files[name].nbytes) for name in names}
    with ExitStack() as stack:
        handles = {
            name: stack.enter_context(storage.open_write(join(folder, name), image.files[name].nbytes, shared=True))
            for name in sorted(names)
        }
        for name in names if with_headers else ():
            prefix = memoryview(image.files[name].prefix)
            counts[name].add(0, prefix)
            handles[name].write(0, [prefix])
        local = threading.local()

        def work(item: WriteItem) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = mmap.mmap(-1, BUFFER_NBYTES)
            _write_item(image, handles, counts, item, source, local.buffer)
            if on_progress is not None:
                on_progress(item.data_nbytes)

        map_in_threads(work, items, num_threads, name="milepost-write")
        for handle in handles.values():
            handle.sync()
    return {name: count.share() for name, count in counts.items()}


def _write_item(
    image: HfImage,
    handles: Mapping[str, WriteHandle],
    counts: Mapping[str, ShareCount],
    item: WriteItem,
    source: BlockSource | FileImage,
    buffer: mmap.mmap,
) -> None:
    links = image.content.links[item.key]
    if not links:
        return
    size = itemsize(item.dtype)
    streams: tuple[str, ImageStream] | None = None
    for slab, values in _slabs(item, links, source):
        box = slab.box.shifted(item.box.offsets)
        for link in links:
            for theirs, part in parts(link, box, values):
                place = image.places[link.theirs_key]
                data, position = raw_bytes(np.ascontiguousarray(part)), 0
                for start, stop in contiguous_runs(theirs, place.shape):
                    offset = place.offset + start * size
                    if streams is None or streams[0] != place.file:
                        if streams is not None:
                            streams[1].flush()
                        note = counts[place.file].add
                        streams = place.file, ImageStream(handles[place.file], buffer, on_write=note)
                    streams[1].put_at(offset, data[position : position + (stop - start) * size])
                    position += (stop - start) * size
    if streams is not None:
        streams[1].flush()


def _slabs(item: WriteItem, links: Sequence[Link], source: BlockSource | FileImage) -> Iterator[tuple[Slab, Array]]:
    """Yield the item's data as arrays, slab by slab; each is valid until the next."""
    unit = 1
    if any(link.op is Op.TRANSPOSED for link in links):
        unit = item.box.sizes[-2]
    else:
        unit = math.lcm(*(link.head_dim for link in links if link.op is not Op.SAME))
    dtype = array_dtype(item.dtype)
    slabs = cut_into_slabs(item.box.sizes, itemsize(item.dtype), SLAB_NBYTES, unit)
    if isinstance(source, FileImage):
        memory = source.memory[item.data_offset : item.data_offset + item.data_nbytes]
        for slab in slabs:
            raw = np.frombuffer(memory[slab.start : slab.start + slab.nbytes], np.uint8)
            yield slab, raw.view(dtype).reshape(slab.box.sizes)
        return
    rest = memoryview(b"")
    blocks = source.blocks(item)
    for slab in slabs:
        if not len(rest):
            rest = next(blocks)
        if len(rest) >= slab.nbytes:  # as it is in memory
            yield slab, np.frombuffer(rest[: slab.nbytes], np.uint8).view(dtype).reshape(slab.box.sizes)
            rest = rest[slab.nbytes :]
            continue
        raw, fill = np.empty(slab.nbytes, np.uint8), 0
        while fill < slab.nbytes:
            if not len(rest):
                rest = next(blocks)
            count = min(len(rest), slab.nbytes - fill)
            np.copyto(raw[fill : fill + count], np.frombuffer(rest[:count], np.uint8))
            rest, fill = rest[count:], fill + count
        yield slab, raw.view(dtype).reshape(slab.box.sizes)


def parts(link: Link, box: Box, values: Array) -> Iterator[tuple[Box, Array]]:
    """Apply ``link`` to ``values`` (box ``box`` of our tensor); yield boxes of theirs with their values."""
    common = link.ours.intersect(box)
    if common is None:
        return
    values = values[common.relative_to(box).index()]
    part = common.relative_to(link.ours)
    # The two sides differ at most in leading dims of size 1.
    lead = len(part.sizes) - len(link.theirs.sizes)
    offsets = (0,) * -lead + part.offsets[max(lead, 0) :]
    sizes = (1,) * -lead + part.sizes[max(lead, 0) :]
    values = values.reshape(sizes)
    if link.op is Op.SAME:
        yield Box(offsets, sizes).shifted(link.theirs.offsets), values
    elif link.op is Op.TRANSPOSED:
        yield Box(_swapped(offsets), _swapped(sizes)).shifted(link.theirs.offsets), values.swapaxes(-1, -2)
    else:
        lead = next(dim for dim, size in enumerate(link.theirs.sizes) if size != 1)  # heads are along the first other
        exchange = _rows_as_halves if link.op is Op.TO_PAIRS else _rows_as_pairs
        for first, rows in exchange(offsets[lead], values.reshape(sizes[lead:]), link.head_dim):
            part = Box((*offsets[:lead], first, *offsets[lead + 1 :]), (*sizes[:lead], *rows.shape))
            yield part.shifted(link.theirs.offsets), rows


def _rows_as_pairs(start: int, rows: Array, head_dim: int) -> Iterator[tuple[int, Array]]:
    """Convert rows ``[start, start + len(rows))`` of halves to (first row, rows) of pairs.

    Complete heads stay together; each row of a partial head has its own place.
    """
    half, position = head_dim // 2, 0
    while position < len(rows):
        head, row = divmod(start + position, head_dim)
        if row == 0 and len(rows) - position >= head_dim:
            pairs = rows[position : position + head_dim].reshape(2, half, *rows.shape[1:]).swapaxes(0, 1)
            yield head * head_dim, pairs.reshape(head_dim, *rows.shape[1:])
            position += head_dim
        else:
            yield head * head_dim + row % half * 2 + row // half, rows[position : position + 1]
            position += 1


def _rows_as_halves(start: int, rows: Array, head_dim: int) -> Iterator[tuple[int, Array]]:
    """Convert rows ``[start, start + len(rows))`` in Meta's order to (first row, rows) in Hugging Face's.

    Complete heads stay together; of a partial head, the rows of each half are consecutive.
    """
    stop = start + len(rows)
    low, high = -(-start // head_dim) * head_dim, stop // head_dim * head_dim
    if low < high:
        heads = rows[low - start : high - start]
        halves = heads.reshape(-1, head_dim // 2, 2, *heads.shape[1:]).swapaxes(1, 2)
        yield low, halves.reshape(heads.shape)
    cuts = [(start, min(low, stop)), (max(high, start), stop)] if low <= high else [(start, stop)]
    for begin, end in cuts:
        head = begin // head_dim * head_dim
        for half in (0, 1):
            first = begin + (begin - head + half) % 2
            if first < end:
                yield head + half * head_dim // 2 + (first - head) // 2, rows[first - start : end - start : 2]


def _swapped(values: tuple[int, ...]) -> tuple[int, ...]:
    return (*values[:-2], values[-1], values[-2])


def join_shares(image: HfImage, shares: Sequence[Mapping[str, Share]]) -> dict[str, FileDigests]:
    """Combine all ranks' shares into the digests of all files.

    Raises:
        SaveError: bytes of a file were written by no rank, or by several.
    """
    names = sorted({*image.files, *(name for share in shares for name in share)})
    found, faults = {}, []
    for name in names:
        parts = [share[name] for share in shares if name in share]
        nbytes = image.files[name].nbytes if name in image.files else parts[0].nbytes
        try:
            found[name] = joined(nbytes, parts)
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise SaveError(f"the save is incomplete, nothing was committed: {'; '.join(listed(faults))}")
    return found


def commit_record(info: SaveInfo, *, save_id: str, world_size: int, now: float) -> Manifest:
    """Return the manifest of a save in this format: it lists no tensors, because they are not records."""
    return Manifest(
        step=info.step,
        save_id=save_id,
        created_s=now,
        kind="model",
        world_size=world_size,
        layout=info.layout,
        producer={"milepost": __version__, **info.producer},
        tensors={},
        objects={},
        files={},
        extra={**info.extra, "format": HF_FORMAT},
        lineage=info.lineage,
        metrics=info.metrics,
    )
