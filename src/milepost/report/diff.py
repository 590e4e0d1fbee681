"""``diff``: compare two sets of stored tensors across formats, streaming, without torch.

Either side is a checkpoint folder (Milepost, torchtitan, stock DCP), a Hugging Face folder, a ``.pt`` or a safetensors
file. Keys are compared as stored or, if the model is given, by Milepost's names for its parameters, so that a
checkpoint can be compared with a Hugging Face folder.

Without values only metadata is read. For two checkpoints written by Milepost, its CRC-32s show which tensors have
different bytes, provided that both are cut into the same shards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, StorageError
from milepost.format.box import Box, cut_into_slabs
from milepost.format.dtype import itemsize
from milepost.format.manifest import MANIFEST_NAME, METADATA_NAME, Manifest
from milepost.format.torch_file import Inert
from milepost.interop.options import HUB
from milepost.interop.weights.boxes import Array, Readable, Source, TensorInfo, array_dtype
from milepost.interop.weights.open import manifest_source, open_weights
from milepost.interop.weights.stream import SLAB_NBYTES
from milepost.report.differences import Differences, ValueChange
from milepost.report.globs import matching_keys
from milepost.run import catalog, checkpoint_record
from milepost.run.hf_folder import is_hf_step
from milepost.run.values import Unreadable, read_values
from milepost.storage import is_url, open_storage
from milepost.storage.base import join
from milepost.verification.extent_reader import Progress
from milepost.verification.external import locate_manifest

OBJECT_TEXT_LENGTH = 100
"""Maximum number of characters shown of a value that is not a tensor."""


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A key on one side only: a tensor of ``dtype`` and ``shape``, or (both empty) another value."""

    key: str
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KindChange:
    """A key whose tensors differ in dtype or shape, or that is a tensor on one side and another value on the other."""

    a: Unmatched
    b: Unmatched

    @property
    def key(self) -> str:
        return self.a.key


@dataclass(frozen=True, slots=True)
class ObjectChange:
    """A value other than a tensor that differs: its ``repr`` in A and in B."""

    key: str
    a: str
    b: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """The differences between A and B. ``num_same`` counts keys in which no difference was found."""

    a: str
    b: str
    only_a: tuple[Unmatched, ...]
    only_b: tuple[Unmatched, ...]
    kinds: tuple[KindChange, ...]
    values: tuple[ValueChange, ...]
    """Tensors whose elements differ. Empty unless values were compared."""
    other_bytes: tuple[str, ...]
    """Keys whose CRC-32s differ, and whose values were not, or could not be, compared."""
    num_unknown: int
    """Number of keys with the same dtype and shape on both sides whose values were not compared."""
    num_same: int
    num_by_digest: int = 0
    """Number of these that are tensors whose recorded digests are equal: their data was not read."""
    num_within: int = 0
    """Number of these whose elements differ, by no more than the tolerance."""
    objects: tuple[ObjectChange, ...] = ()
    """Values other than tensors that differ. Empty unless values were compared."""

    @property
    def num_common(self) -> int:
        """Number of keys that both sides have."""
        different = {change.key for change in self.kinds} | {change.key for change in self.values}
        different |= {change.key for change in self.objects}
        return self.num_same + self.num_unknown + len(different | set(self.other_bytes))

    def within(self, tolerance: float) -> DiffReport:
        """Return the report with tensors of one dtype counted as the same if no element differs by more."""
        kinds = {change.key for change in self.kinds}
        kept = tuple(c for c in self.values if not c.max_abs <= tolerance or c.key in kinds)
        dropped = len(self.values) - len(kept)
        if not tolerance or not dropped:
            return self
        return replace(self, values=kept, num_same=self.num_same + dropped, num_within=self.num_within + dropped)

    def by_change(self) -> list[ValueChange]:
        """Sort the tensors that differ by the size of the change, largest first; NaN and infinity come before all."""

        def order(change: ValueChange) -> tuple[bool, bool, float, float]:
            largest = _or_infinite(change.max_abs)
            norm = _or_infinite(change.relative_norm)
            return not math.isnan(change.max_abs), math.isfinite(change.max_abs), -norm, -largest

        return sorted(self.values, key=order)

    @property
    def is_same(self) -> bool:
        """True if no difference was found."""
        return not (self.only_a or self.only_b or self.kinds or self.values or self.other_bytes or self.objects)


@dataclass(frozen=True, slots=True)
class _Side:
    """One side: its tensors, the CRCs of its other values and, where known, of its tensors' shards."""

    path: str
    tensors: Mapping[str, TensorInfo]
    objects: Mapping[str, int | None] = field(default_factory=dict)
    shard_crcs: Mapping[str, tuple[tuple[Box, int | None], ...]] = field(default_factory=dict)
    readable: Readable | None = None
    source: Source | None = None
    read_objects: Callable[[Sequence[str]], Mapping[str, object]] | None = None
    """Reads the values of ``objects``; one that can't be read becomes an ``Unreadable``."""

    def held(self, key: str) -> Unmatched:
        info = self.tensors.get(key)
        return Unmatched(key, info.dtype, info.shape) if info is not None else Unmatched(key)

    def crcs_of(self, key: str) -> list[tuple[Box | None, int | None]]:
        """Return regions and CRC-32s of the data stored under a key; empty if unknown."""
        if key in self.objects:
            return [(None, self.objects[key])]
        return sorted(self.shard_crcs.get(key, ()))

    @property
    def keys(self) -> set[str]:
        return {*self.tensors, *self.objects}

    def only(self, keys: Set[str]) -> _Side:
        """Return this side with only ``keys``."""
        return replace(
            self,
            tensors={key: info for key, info in self.tensors.items() if key in keys},
            objects={key: crc for key, crc in self.objects.items() if key in keys},
        )


def diff(
    path_a: str | os.PathLike[str],
    path_b: str | os.PathLike[str],
    *,
    values: bool = False,
    trust_digests: bool = False,
    keys: Sequence[str] = (),
    model: str | None = None,
    flavor: str | None = None,
    hf_assets: str | os.PathLike[str] = "",
    progress: Progress | None = None,
) -> DiffReport:
    """Compare what is stored at two paths; ``values`` compares every element.

    With ``trust_digests`` the elements of tensors whose stored bytes have the same CRC-32s on both sides are not read.
    If globs ``keys`` are given, only keys that match one of them are compared. Given a ``model``, only the models
    are compared, by Milepost's names for their parameters, or for ``hf`` by those of transformers without what wrappers
    have put into them. Its sizes come from ``flavor``, from the config in ``hf_assets``, or from one of the two.

    Raises:
        CheckpointNotFoundError, CheckpointDamagedError: there is nothing at a path, or nothing readable.
        ConversionError: a side is not the model given, or stored in a form that can't be read in parts.
        ConfigError: there is no such model, or nothing tells its sizes.
    """
    paths = os.fspath(path_a), os.fspath(path_b)
    with ExitStack() as stack, _replacement_reported(path_a, path_b):
        if model is None and flavor is None and not hf_assets:
            sides = [_open(path, with_values=values, stack=stack) for path in paths]
        else:
            sides = _models(paths, model, flavor, hf_assets, stack)
        if keys:
            chosen = set(matching_keys(sorted(sides[0].keys | sides[1].keys), keys, f"neither {path_a} nor {path_b}"))
            sides = [side.only(chosen) for side in sides]
        return _compare(sides[0], sides[1], values=values, trust_digests=trust_digests, progress=progress)


@contextmanager
def _replacement_reported(*paths: str | os.PathLike[str]) -> Iterator[None]:
    """Report a step that its run deleted or replaced while it was being read as such, not as damage."""
    before = [_record_id(path) for path in paths]
    try:
        yield
    except (CheckpointDamagedError, CheckpointNotFoundError, StorageError, FileNotFoundError) as error:
        for path, record_id in zip(paths, before, strict=True):
            if record_id and _record_id(path) != record_id:
                message = f"{os.fspath(path)} was deleted or replaced while it was being read"
                raise CheckpointNotFoundError(message, path=os.fspath(path)) from error
        raise


def _record_id(path: str | os.PathLike[str]) -> str:
    """Identify the checkpoint at ``path``, to distinguish it from a later one; empty if there is none."""
    if not is_url(path) and not os.path.isdir(path):
        return ""
    storage, folder = open_storage(path)
    info = catalog.examine(storage, folder)
    return info.record_id if info is not None else ""


def _is_checkpoint(path: str) -> bool:
    """Return whether a commit record is there, ours or DCP's."""
    storage, folder = open_storage(path)
    return any(storage.stat(join(folder, name)) is not None for name in (MANIFEST_NAME, METADATA_NAME))


def _open(path: str, *, with_values: bool, stack: ExitStack) -> _Side:
    if not _is_checkpoint(path):
        weights = open_weights(path, whole=True)
        source = stack.enter_context(weights.source)
        beside: dict[str, int | None] = {key: None for key in weights.values if key not in source.tensors}
        return _Side(
            path, source.tensors, beside, readable=source, source=source, read_objects=_objects_of(weights.values)
        )
    storage, folder = open_storage(path)
    manifest = checkpoint_record.read_manifest(storage, folder)
    if is_hf_step(manifest):
        source = stack.enter_context(open_weights(path).source)
        return _Side(path, source.tensors, readable=source, source=source)
    side = _metadata_side(path, manifest)
    if not with_values:
        return side
    if storage.stat(join(folder, MANIFEST_NAME)) is None:
        manifest = locate_manifest(storage, folder, manifest)
    source = stack.enter_context(manifest_source(storage, folder, manifest, None))
    return replace(
        side, readable=source, source=source, read_objects=lambda keys: read_values(storage, folder, manifest, keys)
    )


def _objects_of(values: Mapping[str, object]) -> Callable[[Sequence[str]], Mapping[str, object]]:
    """Return a reader of ``values``; those that are not plain data become ``Unreadable``."""

    def read(keys: Sequence[str]) -> Mapping[str, object]:
        found = {key: values[key] for key in keys}
        return {key: Unreadable(value.name) if isinstance(value, Inert) else value for key, value in found.items()}

    return read


def _metadata_side(path: str, manifest: Manifest) -> _Side:
    tensors = {key: TensorInfo(entry.dtype, entry.shape) for key, entry in manifest.tensors.items()}
    crcs = {key: tuple((s.box, s.crc32) for s in entry.shards) for key, entry in manifest.tensors.items()}
    return _Side(path, tensors, {key: entry.crc32 for key, entry in manifest.objects.items()}, crcs)


def _models(
    paths: Sequence[str], model: str | None, flavor: str | None, assets: str | os.PathLike[str], stack: ExitStack
) -> list[_Side]:
    """Select the models only, under common names and dequantized."""
    opened = []
    for path in paths:
        weights = open_weights(path)
        stack.callback(weights.source.close)
        opened.append(weights)
    # Imported here: tables of names, which a comparison under the stored names does not need.
    from milepost.interop.common_names import by_names_of_hub, by_our_names

    if model == HUB and flavor is None:
        views = by_names_of_hub(opened)
    else:
        views = by_our_names(opened, model, flavor, assets)
    return [_Side(one.path, one.tensors.tensors, readable=one.tensors, source=one.source) for one in views]


def _compare(a: _Side, b: _Side, *, values: bool, trust_digests: bool, progress: Progress | None) -> DiffReport:
    common = sorted(a.keys & b.keys)
    kinds = tuple(KindChange(a.held(key), b.held(key)) for key in common if a.held(key) != b.held(key))
    changed = {change.key for change in kinds}
    unlike_values: list[ValueChange] = []
    objects: list[ObjectChange] = []
    same: dict[str, bool | None] = {key: _same_bytes(a, b, key) for key in common if key not in changed}
    if values:
        comparable = [key for key in common if key in a.tensors and key in b.tensors]
        comparable = [key for key in comparable if a.tensors[key].shape == b.tensors[key].shape]
        comparable = [key for key in comparable if not (trust_digests and same.get(key))]
        unlike_values = _compare_values(a, b, comparable, progress)
        read = set(comparable)
        same = {key: answer for key, answer in same.items() if key not in read}
        objects = _compare_objects(a, b, same)
    by_digest = [key for key, answer in same.items() if answer and key in a.tensors]
    other_bytes = [key for key, answer in same.items() if answer is False]
    num_unknown = sum(answer is None for answer in same.values())
    different = {*changed, *other_bytes, *(change.key for change in unlike_values)}
    different |= {change.key for change in objects}
    return DiffReport(
        a=a.path,
        b=b.path,
        only_a=tuple(a.held(key) for key in sorted(a.keys - b.keys)),
        only_b=tuple(b.held(key) for key in sorted(b.keys - a.keys)),
        kinds=kinds,
        values=tuple(unlike_values),
        other_bytes=tuple(sorted(other_bytes)),
        num_unknown=num_unknown,
        num_same=len(common) - len(different) - num_unknown,
        objects=tuple(objects),
        num_by_digest=len(by_digest),
    )


def _compare_objects(a: _Side, b: _Side, same: dict[str, bool | None]) -> list[ObjectChange]:
    """Compare the values in ``same`` that are not known to be equal; updates ``same``, returns the changes."""
    if a.read_objects is None or b.read_objects is None:
        return []
    wanted = [key for key, answer in same.items() if not answer and key in a.objects and key in b.objects]
    found_a, found_b = a.read_objects(wanted), b.read_objects(wanted)
    changes = []
    for key in wanted:
        value_a, value_b = found_a[key], found_b[key]
        if isinstance(value_a, Unreadable) or isinstance(value_b, Unreadable):
            continue
        text_a, text_b = repr(value_a), repr(value_b)  # compare repr, not values: 1 is not True, and NaN is NaN
        same[key] = True
        if text_a != text_b:
            del same[key]
            changes.append(ObjectChange(key, *_where_unlike(text_a, text_b)))
    return changes


def _where_unlike(a: str, b: str) -> tuple[str, str]:
    """Shorten two different texts, each to some characters around the first difference."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, at - OBJECT_TEXT_LENGTH // 2) if max(len(a), len(b)) > OBJECT_TEXT_LENGTH else 0

    def cut(text: str) -> str:
        end = start + OBJECT_TEXT_LENGTH
        return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")

    return cut(a), cut(b)


def _same_bytes(a: _Side, b: _Side, key: str) -> bool | None:
    """Return whether the stored bytes are the same, by CRC-32; None if only reading them can tell."""
    crcs_a, crcs_b = a.crcs_of(key), b.crcs_of(key)
    if [box for box, _ in crcs_a] != [box for box, _ in crcs_b]:
        return None
    if not crcs_a or any(crc is None for _, crc in (*crcs_a, *crcs_b)):
        return None
    return crcs_a == crcs_b


# ---- values ----


def _compare_values(a: _Side, b: _Side, keys: list[str], progress: Progress | None) -> list[ValueChange]:
    total = sum(Box.whole(a.tensors[key].shape).numel * itemsize(a.tensors[key].dtype) for key in keys)
    done = 0
    changes = []
    for key in keys:
        info = a.tensors[key]
        found = Differences(info.shape)
        for slab in cut_into_slabs(info.shape, itemsize(info.dtype), SLAB_NBYTES):
            found.add(slab.box, _read(a, key, slab.box), _read(b, key, slab.box))
            done += slab.nbytes
            if progress is not None:
                progress(done, total)
        if found.num_different:
            changes.append(found.change(key))
    for side in (a, b):
        if side.source is not None:
            side.source.check_digests()
    return changes


def _read(side: _Side, key: str, box: Box) -> Array:
    assert side.readable is not None
    out: Array = np.empty(box.sizes, array_dtype(side.tensors[key].dtype))
    side.readable.read_into(key, box, out)
    return out


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
