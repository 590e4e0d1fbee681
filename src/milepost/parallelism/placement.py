"""Which box of a parameter each rank holds under given degrees of parallelism: the trainer's rules, without torch.

The rules of ``milepost.train`` (and of torchtitan's Llama 3): tensor parallelism splits attention and feed-forward by
column and row (Shoeybi et al., arXiv 1909.08053) and the vocabulary by row; FSDP cuts what is left along dim 0; a
pipeline deals out consecutive layers. Parameters of other names are taken to be cut by FSDP alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from milepost.errors import ConfigError
from milepost.format.box import Box
from milepost.format.summary import SHORT_DEGREES

_BY_COLUMN = re.compile(
    r"(tok_embeddings|output|layers\.\d+\.attention\.w[qkv]|layers\.\d+\.feed_forward\.w[13])\.weight"
)
_BY_ROW = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")
_EXPERTS = re.compile(r"layers\.\d+\.moe\.experts\.\w+")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees of parallelism, each at least 1. All but ``ep`` multiply to the number of ranks."""

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    stages_per_rank: int = 1
    """Pipeline stages that each rank holds: 2 for an interleaved schedule."""

    @property
    def world_size(self) -> int:
        return self.pp * self.replicate * self.fsdp * self.cp * self.tp

    @property
    def num_weight_shards(self) -> int:
        """Ranks that FSDP shards dense weights over: those of context parallelism hold no weights of their own."""
        return self.fsdp * self.cp

    def as_degrees(self) -> dict[str, int]:
        """The degrees by the trainer's option names, as they are recorded with a checkpoint."""
        return {name: getattr(self, short) for name, short in SHORT_DEGREES.items()}

    @classmethod
    def of(cls, degrees: Mapping[str, int], world_size: int, stages_per_rank: int = 1) -> Layout:
        """The layout of ``world_size`` ranks; ``fsdp`` takes what the other degrees leave if it is not given.

        Raises:
            ConfigError: the degrees do not multiply to ``world_size``, or one is below 1.
        """
        problems = [f"{name} must be at least 1, not {degree}" for name, degree in degrees.items() if degree < 1]
        if world_size < 1:
            problems.append(f"--world-size must be at least 1, not {world_size}")
        if stages_per_rank < 1:
            problems.append(f"--stages-per-rank must be at least 1, not {stages_per_rank}")
        if problems:
            raise ConfigError(problems)
        rest = cls(**{**degrees, "fsdp": 1}).world_size
        if "fsdp" not in degrees and world_size % rest == 0:
            degrees = {**degrees, "fsdp": world_size // rest}
        layout = cls(**degrees, stages_per_rank=stages_per_rank)
        if layout.world_size != world_size:
            spelled = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if name != "ep") or "fsdp 1"
            raise ConfigError(
                f"the degrees multiply to {layout.world_size} ({spelled}), but --world-size is {world_size}"
            )
        num_expert_ranks = layout.num_weight_shards * layout.tp
        if num_expert_ranks % layout.ep:
            raise ConfigError(f"ep {layout.ep} must divide the {num_expert_ranks} ranks of fsdp x cp x tp")
        return layout


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in a layout. Pipeline outermost, tensor innermost, as the trainer's meshes are laid out."""

    pp: int
    replica: int
    shard: int
    """Among the ``num_weight_shards``."""
    tp: int

    @classmethod
    def of(cls, rank: int, layout: Layout) -> Place:
        rest, tp = divmod(rank, layout.tp)
        rest, shard = divmod(rest, layout.num_weight_shards)
        pp, replica = divmod(rest, layout.replicate)
        return cls(pp, replica, shard, tp)


def box_of(key: str, shape: tuple[int, ...], layout: Layout, place: Place) -> Box:
    """The part of parameter ``key`` that the rank at ``place`` holds, if its stage has the parameter. May be empty."""
    if not shape:
        return Box.whole(shape)
    cut = [(0, size) for size in shape]
    if len(shape) == 3 and _EXPERTS.fullmatch(key):
        index = place.shard * layout.tp + place.tp
        num_copies = layout.num_weight_shards * layout.tp // layout.ep
        cut[0] = _chunk(cut[0], layout.ep, index % layout.ep)
        by_rows = num_copies > shape[0] // layout.ep and shape[1] % num_copies == 0
        dim = 1 if by_rows else 0
        cut[dim] = _chunk(cut[dim], num_copies, index // layout.ep)
    else:
        tp_dim = 0 if _BY_COLUMN.fullmatch(key) else 1 if _BY_ROW.fullmatch(key) and len(shape) > 1 else None
        if tp_dim is not None:
            cut[tp_dim] = _chunk(cut[tp_dim], layout.tp, place.tp)
        cut[0] = _chunk(cut[0], layout.num_weight_shards, place.shard)
    return Box(tuple(start for start, _ in cut), tuple(size for _, size in cut))


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


def is_on_stage(key: str, num_layers: int, layout: Layout, place: Place, *, tied: bool) -> bool:
    """Whether a pipeline rank holds parameter ``key``. Stage ``i`` is that of pipeline rank ``i % pp``."""
    if layout.pp == 1:
        return True
    num_stages = layout.pp * layout.stages_per_rank
    layer = layer_of(key)
    if layer is not None:
        return _stage_of_layer(layer, num_layers, num_stages) % layout.pp == place.pp
    if key.startswith("tok_embeddings."):
        return place.pp == 0 or (tied and place.pp == layout.pp - 1)
    return place.pp == layout.pp - 1


def _stage_of_layer(layer: int, num_layers: int, num_stages: int) -> int:
    """Layers are dealt out evenly; the earlier stages take what is left over."""
    each, extra = divmod(num_layers, num_stages)
    in_larger = (each + 1) * extra
    return layer // (each + 1) if layer < in_larger else extra + (layer - in_larger) // max(each, 1)
