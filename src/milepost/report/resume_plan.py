"""``plan_resume``: plan the reads of a resume under given degrees, rank by rank, from metadata only.

The boxes are the trainer's (``parallelism.placement``); the plan is then made as for a real load
(``tensors.read_plan.plan_load``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from milepost.config import NUM_IO_THREADS, PARTS, part_of
from milepost.format.box import Box
from milepost.format.columns import Ints, table_of
from milepost.format.dtype import itemsize
from milepost.format.manifest import BLOCK_NBYTES, DIGESTS_NAME, Manifest
from milepost.interop.names.match import with_stored_vocabulary
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.rules import OWN, correspond, key_faults
from milepost.interop.names.translate import translate
from milepost.interop.options import HUB
from milepost.interop.tabled import Tabled, model_as_asked, recorded_model
from milepost.loading.names import longest_prefix
from milepost.loading.policy import Policy
from milepost.parallelism.degrees import Degrees
from milepost.parallelism.fit import degree_problems, stage_problems
from milepost.parallelism.placement import Coordinates, box_of, cut_class, layer_of, stages_of
from milepost.tensors.plan import TensorSpec
from milepost.tensors.read_plan import ReadItem, plan_load

READ_BUFFER_NBYTES = NUM_IO_THREADS * BLOCK_NBYTES
"""Maximum size of the read buffers: one block per reading thread."""

_LOADER_OF_TORCHTITAN = "dataloader.dp_rank_"
OF_TORCHTITAN = (
    "the data loader's state is torchtitan's, which only torchtitan can read: to restart the data, set "
    "checkpoint.exclude_from_loading = dataloader"
)
_STATE = "optimizer.state."
_GROUPS = "optimizer.param_groups."
_RNG = re.compile(r"rng\.rank(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """The reads of one rank. Sizes are in bytes."""

    rank: int
    place: Coordinates
    num_tensors: int
    wanted_nbytes: int
    """Bytes loaded into its tensors: model and optimizer state."""
    read_nbytes: int
    """Bytes read for that: digests cover blocks of 4 MiB, and only complete blocks can be checked."""
    num_files: int
    buffer_nbytes: int
    """Read buffers, in addition to the tensors."""

    @property
    def memory_nbytes(self) -> int:
        """Peak memory of the load: the tensors and the buffers, without the memory of training."""
        return self.wanted_nbytes + self.buffer_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePlan:
    """The reads of a resume, and the problems that would make it fail."""

    degrees: Degrees
    stages_per_rank: int
    """Pipeline stages that each rank holds: 2 for an interleaved schedule."""
    ranks: tuple[RankPlan, ...]
    missing: tuple[str, ...]
    """Keys (or entire parts) that the run needs and the checkpoint lacks."""
    unexpected: tuple[str, ...]
    """Stored keys that the run does not have. In the model or the optimizer, they make a resume fail."""
    misshapen: tuple[str, ...]
    refused: tuple[str, ...]
    """Reasons why a model of these sizes can't be sharded under these degrees, in the trainer's words."""
    left_out: tuple[str, ...]
    """Stored keys that need not be read, such as other ranks' random state."""
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True if a resume would succeed, judging by metadata."""
        return not (self.missing or self.unexpected or self.misshapen or self.refused)


def plan_resume(
    manifest: Manifest,
    degrees: Degrees,
    *,
    stages_per_rank: int = 1,
    model: str | None = None,
    flavor: str | None = None,
    sizes: ModelArgs | None = None,
    hf_assets: str = "",
    policy: Policy | None = None,
    excluded: Collection[str] = (),
) -> ResumePlan:
    """Plan a resume of ``manifest`` under ``degrees``.

    With ``model`` and ``flavor`` (or ``sizes``, or the config in ``hf_assets``), or those that the step records, stored
    keys and shapes are compared with the model's, under the names by which a load would find them. Otherwise, and for
    ``hf``, they are compared with each other: all layers must have the same parameters, and all parameters the same
    optimizer state. Differences that ``policy`` allows are noted. ``excluded`` parts are not loaded.

    Raises:
        ConfigError: there is no such model, or its sizes are unknown.
        ConversionError: a config describes another model, or lacks sizes.
    """
    known = _model(manifest, model, flavor, sizes, hf_assets)
    manifest, notes = _under_our_names(manifest, known)
    manifest = _without(manifest, excluded)
    faults = _Faults(manifest, known, excluded)
    same_degrees = manifest.world_size == degrees.world_size and dict(manifest.layout) == degrees.as_dict()
    if not same_degrees and any(key.startswith("rng.") for key in manifest.tensors):
        notes.append("other degrees than the saved ones: random generators are reseeded from rank 0's")
    left_out = [key for key in (*manifest.tensors, *manifest.objects) if _is_left_out(key, same_degrees)]
    planner = _Planner(manifest, degrees, stages_per_rank, same_degrees=same_degrees)
    if known is not None:
        refused = degree_problems(known.sizes, degrees, stages_per_rank=stages_per_rank)
    else:
        refused = stage_problems(planner.num_layers, degrees, stages_per_rank=stages_per_rank)
    if any(key.startswith(_LOADER_OF_TORCHTITAN) for key in manifest.objects):
        refused = [*refused, OF_TORCHTITAN]
    policy = policy if policy is not None else Policy()
    notes += map(str, policy.let_pass(faults.missing, faults.unexpected))
    refused_keys = policy.refused_unexpected(faults.unexpected)
    return ResumePlan(
        degrees=degrees,
        stages_per_rank=stages_per_rank,
        ranks=tuple(planner.plan(rank) for rank in range(degrees.world_size)),
        missing=policy.refused_missing(faults.missing),
        unexpected=tuple(key for key in faults.unexpected if key in refused_keys),
        misshapen=tuple(faults.misshapen),
        refused=tuple(refused),
        left_out=tuple(sorted(left_out)),
        notes=tuple(notes),
    )


def _model(
    manifest: Manifest, model: str | None, flavor: str | None, sizes: ModelArgs | None, hf_assets: str
) -> Tabled | None:
    """The model with which the keys are compared; None for one without tables."""
    if model is not None and sizes is not None:
        return Tabled.of_ours(model, sizes)
    if model == HUB and flavor is None:
        return None
    recorded = recorded_model(manifest.extra, None, "the step")
    if model is None and flavor is None and sizes is None and not hf_assets:
        return recorded
    return model_as_asked(model, flavor, hf_assets, (recorded,))


def _under_our_names(manifest: Manifest, known: Tabled | None) -> tuple[Manifest, list[str]]:
    """Return the manifest under the names by which a load would find its tensors, and notes."""
    if known is None or known.args is None:
        return manifest, []
    translation = translate(manifest, known.name, known.args)
    return (translation.manifest, [*translation.notes]) if translation is not None else (manifest, [])


def _without(manifest: Manifest, excluded: Collection[str]) -> Manifest:
    """Return the manifest without some parts."""
    if not excluded:
        return manifest
    tensors = {key: entry for key, entry in manifest.tensors.items() if part_of(key) not in excluded}
    objects = {key: entry for key, entry in manifest.objects.items() if part_of(key) not in excluded}
    return replace(manifest, tensors=tensors, objects=objects)


def _is_left_out(key: str, same_degrees: bool) -> bool:
    return _RNG.match(key) is not None and not same_degrees and key != "rng.rank0.torch"


@dataclass(frozen=True, slots=True, eq=False)
class _Alike:
    """Tensors stored alike, of which a rank loads the same box, if any. Only one of them is planned."""

    key: str
    numbers: Ints
    """Indices of all of them in the table."""


class _Planner:
    """Plans rank after rank; replicas of the same shards share one plan."""

    def __init__(self, manifest: Manifest, degrees: Degrees, stages_per_rank: int, *, same_degrees: bool):
        self._manifest = manifest
        self._table = table_of(manifest, whole=False)
        self._degrees = degrees
        self._stages_per_rank = stages_per_rank
        self._same_degrees = same_degrees
        self._has_digests = manifest.file_named(DIGESTS_NAME) is not None
        model = [key for key in manifest.tensors if part_of(key) == "model"]
        self.num_layers = max((layer for key in model if (layer := layer_of(key)) is not None), default=-1) + 1
        self._tied = "output.weight" not in manifest.tensors
        self._alike = self._tensors_alike()
        self._held: dict[int, list[_Alike]] = {}
        self._planned: dict[Coordinates, RankPlan] = {}
        self._read_nbytes: dict[object, int] = {}

    def plan(self, rank: int) -> RankPlan:
        place = Coordinates.of(rank, self._degrees)
        known = self._planned.get(replace(place, replica=0))
        if known is None or self._same_degrees:  # then each rank has its own random state
            known = self._planned[replace(place, replica=0)] = self._plan(rank, place)
        return replace(known, rank=rank, place=place)

    def _tensors_alike(self) -> list[_Alike]:
        found: dict[object, list[int]] = defaultdict(list)
        for number, (key, tiling) in enumerate(zip(self._table.keys, self._table.tiling.tolist(), strict=True)):
            found[(tiling, self._kind(key))].append(number)
        return [_Alike(self._table.keys[numbers[0]], np.array(numbers)) for numbers in found.values()]

    def _kind(self, key: str) -> object:
        """Return a value that is equal for tensors of which a rank loads the same box, given equal shapes."""
        parameter = self._cut_as(key)
        return key if part_of(key) == "rng" else parameter and cut_class(parameter)

    def _cut_as(self, key: str) -> str | None:
        """Return the parameter whose sharding a tensor follows; None if it is not sharded, such as a scalar state."""
        parameter = parameter_of(key)
        owner = self._manifest.tensors.get(parameter or "")
        return parameter if owner is not None and owner.shape == self._manifest.tensors[key].shape else None

    def _on_stages(self, pp_rank: int) -> list[_Alike]:
        """Return the tensors of which a pipeline rank holds a part."""
        if pp_rank not in self._held:
            stages = stages_of(
                pp_rank,
                self._degrees,
                stages_per_rank=self._stages_per_rank,
                num_layers=self.num_layers,
                tied=self._tied,
            )
            owners = map(parameter_of, self._table.keys)
            holds = np.array([owner is None or any(stage.holds(owner) for stage in stages) for owner in owners], bool)
            here = [replace(alike, numbers=alike.numbers[holds[alike.numbers]]) for alike in self._alike]
            self._held[pp_rank] = [alike for alike in here if len(alike.numbers)]
        return self._held[pp_rank]

    def _plan(self, rank: int, place: Coordinates) -> RankPlan:
        num_tensors = wanted = read = 0
        direct, rows = True, [np.empty(0, np.int64)]
        for alike in self._on_stages(place.pp):
            spec = self._spec(alike.key, rank)
            if spec is None or not spec.boxes:
                continue
            items = plan_load(self._manifest, [spec])
            count = len(alike.numbers)
            num_tensors += count if any(box.numel for box in spec.boxes) else 0
            wanted += count * sum(box.numel * itemsize(spec.dtype) for box in spec.boxes)
            read += count * sum(map(self._nbytes_of, items))
            direct = direct and all(item.src == Box.whole(item.shard.box.sizes) for item in items)
            hits = np.array([item.shard_index for item in items], np.int64)
            rows.append((self._table.first[alike.numbers][:, None] + hits).ravel())
        return RankPlan(
            rank=rank,
            place=place,
            num_tensors=num_tensors,
            wanted_nbytes=wanted,
            read_nbytes=read,
            num_files=len(np.unique(self._table.file[np.concatenate(rows)])),
            buffer_nbytes=0 if direct else READ_BUFFER_NBYTES,
        )

    def _spec(self, key: str, rank: int) -> TensorSpec | None:
        """Return the part of a stored tensor that the rank needs for its stages; None if it needs none."""
        entry = self._manifest.tensors[key]
        whole = TensorSpec(key, entry.dtype, entry.shape, (Box.whole(entry.shape),))
        if part_of(key) == "rng":
            return whole if key.startswith(f"rng.rank{rank}." if self._same_degrees else "rng.rank0.torch") else None
        parameter = self._cut_as(key)
        if parameter is None:
            return whole
        box = box_of(parameter, entry.shape, self._degrees, rank)
        return replace(whole, boxes=(box,) if box.numel else ())

    def _nbytes_of(self, item: ReadItem) -> int:
        """Return the bytes read for an item: all blocks that overlap it, or its own bytes if there are no digests."""
        if not self._has_digests:
            return item.src.numel * itemsize(item.dtype)
        where = (item.src, item.shard.box.sizes, item.dtype)
        if where not in self._read_nbytes:
            self._read_nbytes[where] = sum(stop - start for start, stop in item.blocks(BLOCK_NBYTES))
        return self._read_nbytes[where]


def parameter_of(key: str) -> str | None:
    """Return the parameter to which a tensor of the model or the optimizer state belongs; None for any other key."""
    part = part_of(key)
    if part == "model":
        return key
    if part == "optimizer" and key.startswith(_STATE):
        return key.removeprefix(_STATE).rpartition(".")[0]
    return None


class _Faults:
    """Missing and unexpected keys."""

    def __init__(self, manifest: Manifest, model: Tabled | None, excluded: Collection[str]):
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        shapes = {key: entry.shape for key, entry in manifest.tensors.items() if part_of(key) == "model"}
        stored_parts = {part_of(key) for key in (*manifest.tensors, *manifest.objects)}
        for part in PARTS:
            is_asked = part not in ("rng", "dataloader", "lr_scheduler", "states", "attached", *excluded)
            if is_asked and part not in stored_parts:
                self.missing.append(f"{part}.*" if part != "model" else "the model")
        if "model" in excluded:
            return
        if model is None:
            self._compare_layers(shapes)
        else:
            self._compare_with_model(shapes, model)
        if "optimizer" in stored_parts:
            self._compare_optimizer(manifest, shapes)

    def _compare_with_model(self, shapes: Mapping[str, tuple[int, ...]], model: Tabled) -> None:
        """Compare the keys with the model's: for one that is not trained here, by the names that fit best."""
        found = []
        for scheme in model.tables.schemes if model.args is None else (model.tables.scheme(OWN),):
            sizes = with_stored_vocabulary(scheme, model.sizes, shapes)  # given by the tokenizer, not by the flavor
            found.append(key_faults(correspond(model.tables, scheme, sizes), shapes))
        faults = min(found, key=len)
        self.missing += faults.missing
        self.unexpected += faults.unexpected
        self.misshapen += faults.misshapen

    def _compare_layers(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Require the same parameters in every layer, and no gap between layers."""
        found: dict[int, set[str]] = defaultdict(set)
        for key in shapes:
            layer = layer_of(key)
            if layer is not None:
                found[layer].add(key.removeprefix(f"layers.{layer}."))
        names = set().union(*found.values())
        self.missing += [
            f"layers.{layer}.{name}"
            for layer in range(max(found, default=-1) + 1)
            for name in sorted(names - found.get(layer, set()))
        ]

    def _compare_optimizer(self, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
        states: dict[str, set[str]] = defaultdict(set)
        for key in (*manifest.tensors, *manifest.objects):
            if key.startswith(_STATE):
                leaf = key.removeprefix(_STATE)
                # A tensor composed of others has keys below its own.
                parameter = longest_prefix(leaf, shapes) or leaf.rpartition(".")[0]
                states[parameter].add(leaf[len(parameter) + 1 :].partition(".")[0])
        names = set().union(*states.values())
        self.missing += [
            f"{_STATE}{parameter}.{name}"
            for parameter in shapes
            if parameter in states or not _is_buffer(parameter, manifest)
            for name in sorted(names - states.get(parameter, set()))
        ]
        self.unexpected += [
            f"{_STATE}{parameter}.{name}"
            for parameter in states
            if parameter not in shapes
            for name in sorted(states[parameter])
        ]


def _is_buffer(key: str, manifest: Manifest) -> bool:
    """Return True if the optimizer does not hold the tensor: its options are not stored, but those of others are."""
    prefix = f"{_GROUPS}{key}."
    groups: Any = [name for name in manifest.objects if name.startswith(_GROUPS)]
    return bool(groups) and not any(name.startswith(prefix) for name in groups)
