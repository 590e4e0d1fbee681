"""Translate another program's training checkpoint to our names, including optimizer state.

A load and ``milepost plan-resume`` both need the scheme of the stored keys, and the stored tensors that make up each of
ours. Model and optimizer may use different schemes: torchtitan 0.3 stores its fused projection split in the model, and
fused in the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from milepost.config import part_of
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.manifest import Manifest, ObjectEntry, ShardEntry, TensorEntry
from milepost.interop.names.families import family_of
from milepost.interop.names.match import with_stored_vocabulary
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.rules import OWN, Correspondence, Family, Op, Recipe, correspond, key_faults
from milepost.loading.names import Translation, longest_prefix, whole
from milepost.tensors.read_plan import Origin, overlaps, swapped

_KINDS = ("optimizer.state.", "optimizer.param_groups.")

Shape = tuple[int, ...]


def translate(manifest: Manifest, model: str, args: ModelArgs) -> Translation | None:
    """Return ``manifest`` under our names, for a run of ``model``; None if it already has them, or no scheme fits."""
    shapes = {key: entry.shape for key, entry in manifest.tensors.items() if part_of(key) == "model"}
    family = family_of(model, args)
    found = _of_model(family, args, shapes)
    if found is None:
        return None
    stepped = _Stepped.of(manifest, [found, *(known for known in _readable(family, args, shapes) if known != found)])
    are_ours = found.scheme.name == OWN and (stepped is None or stepped.names.scheme.name == OWN)
    if are_ours and (found.tied is None or found.tied[1] not in shapes):
        return None
    building = _Building(manifest)
    building.add_model(found)
    if stepped is not None:
        building.add_optimizer(stepped)
    return building.result(found)


def _readable(family: Family, args: ModelArgs, shapes: Mapping[str, Shape]) -> Iterator[Correspondence]:
    """Return the family's schemes whose tensors consist of boxes of stored ones, in the same order of elements."""
    for scheme in family.schemes:
        if all(row.op in (Op.SAME, Op.TRANSPOSED) and "{expert}" not in row.theirs for row in scheme.rows):
            yield correspond(family, scheme, with_stored_vocabulary(scheme, args, shapes))


def _of_model(family: Family, args: ModelArgs, shapes: Mapping[str, Shape]) -> Correspondence | None:
    return next((known for known in _readable(family, args, shapes) if not len(key_faults(known, shapes))), None)


@dataclass(frozen=True, slots=True)
class _Stepped:
    """The stored optimizer state, by the parameter names of ``names``."""

    names: Correspondence
    entries: Mapping[str, Mapping[str, str]]
    """Parameter -> rest of the key (``state.exp_avg``) -> key."""

    @classmethod
    def of(cls, manifest: Manifest, candidates: Iterable[Correspondence]) -> _Stepped | None:
        """Use the first names that fit all keys and shapes; None if there are none, or nothing is stored."""
        keys = [key for key in (*manifest.tensors, *manifest.objects) if key.startswith(_KINDS)]
        for names in candidates if keys else ():
            known = set(names.theirs) | ({names.tied[1]} if names.tied is not None else set())
            entries: dict[str, dict[str, str]] = {}
            for key in keys:
                kind, rest = key.removeprefix("optimizer.").split(".", 1)
                parameter = longest_prefix(rest, known)
                if parameter is None or not _fits(manifest.tensors.get(key), names.theirs.get(parameter)):
                    break
                entries.setdefault(parameter, {})[f"{kind}.{{}}{rest[len(parameter) :]}"] = key
            else:
                return cls(names, entries)
        return None


def _fits(stored: TensorEntry | None, shape: Shape | None) -> bool:
    """Return whether a stored value may be a parameter's state: state of another shape has other dims."""
    return stored is None or shape is None or stored.shape == shape or len(stored.shape) != len(shape)


class _Building:
    """Builds a manifest under our names, tensor by tensor."""

    def __init__(self, manifest: Manifest):
        self._stored = manifest
        self._tensors: dict[str, TensorEntry] = {}
        self._objects: dict[str, ObjectEntry] = {}
        self._paths: dict[str, tuple[str | int, ...]] = {}
        self._origins: dict[str, Sequence[Origin]] = {}
        self._used: set[str] = set()

    def add_model(self, found: Correspondence) -> None:
        """Add all of our parameters."""
        self._used |= {*found.theirs, *found.constants, *found.ignored}
        for key, recipe in found.into_ours().items():
            self._add_tensor(key, (key,), _origins(recipe), recipe.shape)

    def add_optimizer(self, stepped: _Stepped) -> None:
        """Add the stored state and options of all of our parameters."""
        for key, recipe in stepped.names.into_ours().items():
            origins = _origins(recipe)
            parameter = origins[0].key
            for name, stored in stepped.entries.get(parameter, {}).items():
                path = ("optimizer", name.format(key))
                self._used.add(stored)
                if stored in self._stored.objects:
                    self._objects[".".join(path)] = self._stored.objects[stored]
                    self._paths[".".join(path)] = path
                elif self._stored.tensors[stored].shape == stepped.names.theirs[parameter]:
                    state = [replace(origin, key=stored) for origin in origins]
                    self._add_tensor(".".join(path), path, state, recipe.shape)
                else:  # per parameter, such as the step count
                    shape = self._stored.tensors[stored].shape
                    self._add_tensor(".".join(path), path, [whole(stored, shape)], shape)

    def _add_tensor(self, key: str, path: tuple[str, ...], origins: Sequence[Origin], shape: Shape) -> None:
        entry = self._stored.tensors[origins[0].key]
        self._paths[key] = path
        if len(origins) == 1 and origins[0] == whole(origins[0].key, shape):
            self._tensors[key] = entry
            if origins[0].key != key:
                self._origins[key] = origins
            return
        shards = [shard for origin in origins for shard in _shards(self._stored.tensors[origin.key], origin)]
        self._tensors[key] = TensorEntry(entry.dtype, shape, shards)
        self._origins[key] = origins

    def result(self, found: Correspondence) -> Translation:
        """Return the translation, with all entries that need none."""
        tied = found.tied if found.tied is not None and found.tied[1] in self._stored.tensors else None
        self._used |= {tied[1]} if tied is not None else set()
        stored = self._stored
        tensors = {key: entry for key, entry in stored.tensors.items() if key not in self._used} | self._tensors
        objects = {key: entry for key, entry in stored.objects.items() if key not in self._used} | self._objects
        paths = {key: path for key, path in stored.paths.items() if key not in self._used} | self._paths
        notes = []
        if found.scheme.name != OWN:
            notes.append(f"it has the names of {found.scheme.name}: read under this run's")
        if tied is not None:
            notes.append(f"{tied[1]} is {tied[0]}, which is read once")
        if dropped := [key for key in found.constants if key in stored.tensors]:
            notes.append(f"skipped, as our models have no such tensor: {dropped[0]} and {len(dropped) - 1} like it")
        manifest = replace(stored, tensors=tensors, objects=objects, paths=paths)
        return Translation(manifest, self._origins, tied, tuple(notes))


def _origins(recipe: Recipe) -> list[Origin]:
    return [Origin(piece.target, piece.source_key, piece.source, piece.op is Op.TRANSPOSED) for piece in recipe.pieces]


def _shards(entry: TensorEntry, origin: Origin) -> Iterator[ShardEntry]:
    """Return the stored shards of an origin, in the coordinates of the composed tensor."""
    for overlap in overlaps(entry.shards, origin.stored):
        shard = entry.shards[overlap.shard]
        box: Box = swapped(overlap.dst) if origin.is_transposed else overlap.dst
        nbytes = box.numel * itemsize(entry.dtype)
        box = box.shifted(origin.box.offsets)
        yield replace(shard, box=box, data_nbytes=nbytes, crc32=None)
