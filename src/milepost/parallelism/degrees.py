"""``Degrees``: over how many ranks each kind of parallelism is spread, resolved against the size of the world."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

from milepost.errors import ConfigError

DENSE_DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
)
"""The degrees whose product is the world size. Expert parallelism re-divides ranks of these; it adds none."""

ALL_DEGREES = (*DENSE_DEGREES, "expert_parallel_degree")


class DegreeOptions(Protocol):
    """Anything that names the six degrees, such as ``ParallelismConfig``."""

    @property
    def data_parallel_replicate_degree(self) -> int: ...
    @property
    def data_parallel_shard_degree(self) -> int: ...
    @property
    def tensor_parallel_degree(self) -> int: ...
    @property
    def pipeline_parallel_degree(self) -> int: ...
    @property
    def context_parallel_degree(self) -> int: ...
    @property
    def expert_parallel_degree(self) -> int: ...


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
    def resolve(cls, options: DegreeOptions, world_size: int) -> Degrees:
        """The degrees for ``world_size`` ranks: ``data_parallel_shard_degree = -1`` takes what the others leave.

        Raises:
            ConfigError: with every problem and its numbers.
        """
        degrees = {name: getattr(options, name) for name in ALL_DEGREES}
        problems = _range_problems(degrees)
        if problems:
            raise ConfigError(problems)
        if degrees["data_parallel_shard_degree"] == -1:
            rest = _product({**degrees, "data_parallel_shard_degree": 1})
            if world_size % rest:
                raise ConfigError(
                    f"parallelism: data_parallel_shard_degree = -1 takes the ranks that the other degrees leave, but "
                    f"{world_size} ranks can't be divided by {rest} ({_spelled(degrees)})"
                )
            degrees["data_parallel_shard_degree"] = world_size // rest
        elif _product(degrees) != world_size:
            raise ConfigError(
                f"parallelism: the degrees multiply to {_product(degrees)} but the world has {world_size} "
                f"{'rank' if world_size == 1 else 'ranks'} ({_spelled(degrees)})"
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
    def num_expert_ranks(self) -> int:
        """Number of ranks over which one copy of the experts of a pipeline stage may be spread."""
        return self.data_parallel_shard_degree * self.context_parallel_degree * self.tensor_parallel_degree

    @property
    def world_size(self) -> int:
        return _product(self.as_dict())

    def as_dict(self) -> dict[str, int]:
        """The degrees by option name, as they are recorded with a checkpoint."""
        return asdict(self)


def _range_problems(degrees: dict[str, int]) -> list[str]:
    problems = []
    for name, degree in degrees.items():
        if name == "data_parallel_shard_degree" and degree == -1:
            continue
        if degree < 1:
            also = " (or -1 for what the others leave)" if name == "data_parallel_shard_degree" else ""
            problems.append(f"parallelism.{name} must be at least 1{also}, not {degree}")
    return problems


def _product(degrees: dict[str, int]) -> int:
    product = 1
    for name in DENSE_DEGREES:
        product *= degrees[name]
    return product


def _spelled(degrees: dict[str, int]) -> str:
    return " x ".join(f"{name.removesuffix('_degree')} {degrees[name]}" for name in DENSE_DEGREES)
