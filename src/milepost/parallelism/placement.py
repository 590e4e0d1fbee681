"""The box of a parameter that each rank holds under given degrees: the trainer's rules, without torch.

The rules of ``milepost.train`` (and of torchtitan's Llama 3): tensor parallelism splits attention and feed-forward by
column and row (Shoeybi et al., arXiv 1909.08053) and the vocabulary by row; FSDP cuts what is left along dim 0; a
pipeline deals out consecutive layers. The trainer builds its plans from the tables and functions here, so that what
``plan-resume`` says is what the trainer does. Parameters of other names are taken to be cut by FSDP alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from milepost.format.box import Box
from milepost.parallelism.degrees import Degrees

LAYER_SPLITS: Mapping[str, int] = {
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
}
"""The linear modules of a layer that tensor parallelism splits, and the dim of the weight: 0 by column, 1 by row."""

VOCABULARY_SPLITS = ("tok_embeddings", "output")
"""The modules outside the layers whose weight tensor parallelism splits along dim 0, the vocabulary."""

STAGES_PER_RANK = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2}
"""Pipeline schedules, and the number of stages that each rank computes under them."""

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERTS = re.compile(r"layers\.\d+\.moe\.experts\.\w+")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The coordinates of a rank in the mesh of the dense weights."""

    pp: int
    replica: int
    shard: int
    """Among the ``num_weight_shards``."""
    tp: int

    @classmethod
    def of(cls, rank: int, degrees: Degrees) -> Coordinates:
        return cls(*_unravel(rank, degrees.dense_mesh))


def _unravel(rank: int, mesh: Sequence[int]) -> list[int]:
    """Coordinates of ``rank`` in a mesh whose ranks count row-major."""
    coordinates = []
    for size in reversed(mesh):
        rank, index = divmod(rank, size)
        coordinates.append(index)
    return coordinates[::-1]


def box_of(key: str, shape: tuple[int, ...], degrees: Degrees, rank: int) -> Box:
    """The part of parameter ``key`` that ``rank`` holds, if a stage of it has the parameter. May be empty."""
    if not shape:
        return Box.whole(shape)
    cut = [(0, size) for size in shape]
    if len(shape) == 3 and _is_of_experts(key):
        _, _, shard, expert = _unravel(rank, degrees.expert_mesh)
        cut[0] = _chunk(cut[0], degrees.expert_parallel_degree, expert)
        dim = expert_shard_dim(shape, degrees)
        cut[dim] = _chunk(cut[dim], degrees.expert_mesh[2], shard)
    else:
        here = Coordinates.of(rank, degrees)
        dim_or_none = tensor_split_dim(key)
        if dim_or_none is not None and dim_or_none < len(shape):
            cut[dim_or_none] = _chunk(cut[dim_or_none], degrees.tensor_parallel_degree, here.tp)
        cut[0] = _chunk(cut[0], degrees.num_weight_shards, here.shard)
    return Box(tuple(start for start, _ in cut), tuple(size for _, size in cut))


def cut_class(key: str) -> tuple[bool, int | None]:
    """Equal for parameters of which each rank holds the same part, if they have one shape."""
    return _is_of_experts(key), tensor_split_dim(key)


def _is_of_experts(key: str) -> bool:
    return _EXPERTS.fullmatch(key) is not None


def tensor_split_dim(key: str) -> int | None:
    """The dim along which tensor parallelism splits parameter ``key``; None where every rank holds all of it."""
    module = key.removesuffix(".weight")
    if module == key:
        return None
    if module in VOCABULARY_SPLITS:
        return 0
    layer = _LAYER.match(module)
    return LAYER_SPLITS.get(module[layer.end() :]) if layer else None


def expert_shard_dim(shape: Sequence[int], degrees: Degrees) -> int:
    """The dim along which FSDP shards experts ``[experts, in, out]``: 0, or 1 where ranks outnumber local experts."""
    num_shards = degrees.expert_mesh[2]
    outnumbered = num_shards > shape[0] // degrees.expert_parallel_degree
    return 1 if outnumbered and shape[1] % num_shards == 0 else 0


def _chunk(interval: tuple[int, int], count: int, index: int) -> tuple[int, int]:
    """Chunk ``index`` of ``count`` of an interval (start, size), as ``torch.chunk`` cuts: the last may be smaller."""
    start, size = interval
    step = -(-size // count)
    low, high = min(step * index, size), min(step * (index + 1), size)
    return start + low, high - low


def layer_of(key: str) -> int | None:
    """The layer that a parameter belongs to, or None for the embedding, the last norm and the output."""
    match = _LAYER.match(key)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stretch of consecutive layers of a pipeline of ``num_stages``; the whole model where that is 1."""

    index: int
    num_stages: int
    num_layers: int
    """Number of layers of the full model."""
    tied: bool
    """The last stage projects by the embedding matrix, and so holds it too."""

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    @property
    def layers(self) -> range:
        """Layers are dealt out evenly; the earlier stages take what is left over."""
        each, extra = divmod(self.num_layers, self.num_stages)
        start = self.index * each + min(self.index, extra)
        return range(start, start + each + (self.index < extra))

    def holds(self, key: str) -> bool:
        """Return whether parameter ``key`` is on this stage. The last has all outside layers but the embedding."""
        layer = layer_of(key)
        if layer is not None:
            return layer in self.layers
        if key.startswith("tok_embeddings."):
            return self.is_first or (self.is_last and self.tied)
        return self.is_last


def stages_of(
    pp_rank: int, degrees: Degrees, *, stages_per_rank: int, num_layers: int, tied: bool
) -> tuple[Stage, ...]:
    """The stages of a pipeline rank, first to last: stage ``i`` is that of pipeline rank ``i % pp``."""
    pp = degrees.pipeline_parallel_degree
    num_stages = pp * stages_per_rank if pp > 1 else 1
    return tuple(
        Stage(index=index, num_stages=num_stages, num_layers=num_layers, tied=tied)
        for index in range(pp_rank, num_stages, pp)
    )
