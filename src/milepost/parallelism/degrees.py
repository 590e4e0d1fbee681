"""``Degrees``: the number of ranks of each kind of parallelism, and the numbering of ranks in the meshes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from milepost.errors import ConfigError

SHORT_DEGREES = {
    "data_parallel_replicate_degree": "replicate",
    "data_parallel_shard_degree": "fsdp",
    "tensor_parallel_degree": "tp",
    "pipeline_parallel_degree": "pp",
    "context_parallel_degree": "cp",
    "expert_parallel_degree": "ep",
}
"""The degrees by the trainer's option names, and what they are called for short."""

ALL_DEGREES = tuple(SHORT_DEGREES)

DENSE_DEGREES = tuple(name for name in ALL_DEGREES if name != "expert_parallel_degree")
"""The degrees whose product is the world size. Expert parallelism re-divides ranks of these; it adds none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """The six degrees, each at least 1. All but ``expert_parallel_degree`` multiply to the world size."""

    data_parallel_replicate_degree: int = 1
    data_parallel_shard_degree: int = 1
    tensor_parallel_degree: int = 1
    pipeline_parallel_degree: int = 1
    context_parallel_degree: int = 1
    expert_parallel_degree: int = 1

    @classmethod
    def resolve(cls, given: Mapping[str, int], world_size: int) -> Degrees:
        """Fit degrees, by option name, to ``world_size`` ranks; those not given are 1.

        ``data_parallel_shard_degree = -1``, or none, takes the ranks that the others leave.

        Raises:
            ConfigError: with every problem and its numbers.
        """
        degrees = {name: given.get(name, 1) for name in ALL_DEGREES}
        degrees["data_parallel_shard_degree"] = given.get("data_parallel_shard_degree", -1)
        problems = _range_problems(degrees)
        if problems:
            raise ConfigError(problems)
        if degrees["data_parallel_shard_degree"] == -1:
            rest = _product({**degrees, "data_parallel_shard_degree": 1})
            if world_size % rest:
                raise ConfigError(
                    f"parallelism: {world_size} {_ranks(world_size)} can't be divided by {rest} ({_spelled(degrees)}); "
                    "data_parallel_shard_degree takes the ranks that the other degrees leave"
                )
            degrees["data_parallel_shard_degree"] = world_size // rest
        elif _product(degrees) != world_size:
            raise ConfigError(
                f"parallelism: the degrees multiply to {_product(degrees)} but the world has {world_size} "
                f"{_ranks(world_size)} ({_spelled(degrees)})"
            )
        resolved = cls(**degrees)
        if resolved.num_expert_ranks % resolved.expert_parallel_degree:
            raise ConfigError(
                f"parallelism.expert_parallel_degree = {resolved.expert_parallel_degree} must divide the "
                f"{resolved.num_expert_ranks} ranks of data_parallel_shard x context_parallel x tensor_parallel, over "
                "which experts are spread"
            )
        return resolved

    @property
    def data_parallel_degree(self) -> int:
        """Number of parts that each batch is split into."""
        return self.data_parallel_replicate_degree * self.data_parallel_shard_degree

    @property
    def num_weight_shards(self) -> int:
        """Ranks that FSDP shards dense weights over: those of context parallelism hold no weights of their own."""
        return self.data_parallel_shard_degree * self.context_parallel_degree

    @property
    def num_expert_ranks(self) -> int:
        """Number of ranks over which one copy of the experts of a pipeline stage may be spread."""
        return self.num_weight_shards * self.tensor_parallel_degree

    @property
    def dense_mesh(self) -> tuple[int, int, int, int]:
        """Sizes of the mesh of the dense weights: pipeline, replicas, weight shards, tensor. Ranks count row-major.

        Tensor parallelism, which communicates most, is innermost and so stays inside a node.
        """
        return (
            self.pipeline_parallel_degree,
            self.data_parallel_replicate_degree,
            self.num_weight_shards,
            self.tensor_parallel_degree,
        )

    @property
    def expert_mesh(self) -> tuple[int, int, int, int]:
        """Sizes of the experts' mesh over the same ranks: pipeline, replicas, shards of each expert group, experts."""
        num_shards = self.num_expert_ranks // self.expert_parallel_degree
        return (
            self.pipeline_parallel_degree,
            self.data_parallel_replicate_degree,
            num_shards,
            self.expert_parallel_degree,
        )

    @property
    def world_size(self) -> int:
        return _product(self.as_dict())

    def as_dict(self) -> dict[str, int]:
        """The degrees by option name, as they are recorded with a checkpoint."""
        return asdict(self)


def degrees_text(degrees: Mapping[str, int]) -> str:
    """The degrees above 1, such as ``fsdp 2, tp 2``; ``one rank`` if there are none, empty if nothing is known."""
    above = [f"{SHORT_DEGREES.get(name, name)} {degree}" for name, degree in degrees.items() if degree != 1]
    return ", ".join(above) or ("one rank" if degrees else "")


def _range_problems(degrees: Mapping[str, int]) -> list[str]:
    problems = []
    for name, degree in degrees.items():
        if name == "data_parallel_shard_degree" and degree == -1:
            continue
        if degree < 1:
            also = " (or -1 for what the others leave)" if name == "data_parallel_shard_degree" else ""
            problems.append(f"parallelism.{name} must be at least 1{also}, not {degree}")
    return problems


def _product(degrees: Mapping[str, int]) -> int:
    return math.prod(degrees[name] for name in DENSE_DEGREES)


def _spelled(degrees: Mapping[str, int]) -> str:
    above = [f"{name.removesuffix('_degree')} {degrees[name]}" for name in DENSE_DEGREES if degrees[name] > 1]
    return " x ".join(above) or "each is 1"


def _ranks(count: int) -> str:
    return "rank" if count == 1 else "ranks"
