"""The order of samples: one global order, independent of the number of ranks that read it.

Samples are counted globally from 0. The order is a pure function of (count, seed), so that the state of the data is
the number of samples consumed, and a run continues at another data-parallel degree without missing or repeating one.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard, TypeVar

import numpy as np

from milepost.errors import ConfigError, StateMismatchError

Indices = np.ndarray[Any, np.dtype[np.uint64]]
T = TypeVar("T")

_FEISTEL_ROUNDS = 6


class SampleOrder:
    """A permutation of ``num_samples`` samples for every epoch, computed without a table.

    A balanced Feistel network permutes the numbers of an even count of bits; those that fall outside the range are
    sent through it again until they don't (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Unlike
    ``numpy.random`` it is the same in every version, and needs no memory for a billion samples.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        bits = max(2, (num_samples - 1).bit_length())
        self._half_bits = np.uint64((bits + 1) // 2)
        self._half_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)

    def samples(self, counts: Indices) -> Indices:
        """Return the samples at these global positions."""
        epochs, positions = counts // np.uint64(self.num_samples), counts % np.uint64(self.num_samples)
        keys = _mix(_mix(np.full_like(epochs, self.seed % 2**64)) + epochs)
        result = self._permute_bits(positions, keys)
        outside = result >= self.num_samples
        while outside.any():
            result[outside] = self._permute_bits(result[outside], keys[outside])
            outside = result >= self.num_samples
        return result

    def _permute_bits(self, numbers: Indices, keys: Indices) -> Indices:
        left, right = numbers >> self._half_bits, numbers & self._half_mask
        for round_number in range(_FEISTEL_ROUNDS):
            mixed = _mix(right + keys + np.uint64(round_number << 60))
            left, right = right, left ^ (mixed & self._half_mask)
        return (left << self._half_bits) | right


def _mix(x: Indices) -> Indices:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): each input bit changes half of the output bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ResumableSampler:
    """A batch sampler that resumes exactly once each sample, on any number of ranks.

    It yields this rank's batches of indices without end, each epoch in a different order. Its state is the count of
    samples that all ranks together have consumed, so it is the same on every rank and fits any other number of ranks or
    batch size. Samples prefetched by a loader's workers are not consumed: :meth:`batches` counts a batch when it yields
    it.

    Example::

        sampler = ResumableSampler(len(dataset), batch_size=32, seed=0)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
        manager = CheckpointManager(..., dataloader=sampler)
        manager.load()
        for step, batch in zip(range(start, num_steps), sampler.batches(loader)):
            ...

    Args:
        num_samples: size of the data set.
        batch_size: samples in one batch of one rank.
        seed: seed of the order; a resumed run must give the same.
        rank, world_size: which of how many ranks that read different samples; by default those of the default process
            group. Ranks that share samples (tensor, pipeline, context parallelism) give the same ``rank``.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        default_rank, default_world_size = _ranks()
        self.batch_size = batch_size
        self.rank = default_rank if rank is None else rank
        self.world_size = default_world_size if world_size is None else world_size
        given = {"num_samples": num_samples, "batch_size": batch_size, "world_size": self.world_size}
        sizes = [*given.items(), ("rank", self.rank), ("seed", seed)]
        problems = [
            f"{name} must be a whole number, not {value!r:.60}" for name, value in sizes if not _is_whole(value)
        ]
        if not problems:
            problems = [f"{name} must be at least 1, not {number}" for name, number in given.items() if number < 1]
            if not 0 <= self.rank < max(self.world_size, 1):
                problems.append(f"rank must be from 0 to {self.world_size - 1}, not {self.rank}")
        if problems:
            raise ConfigError([f"ResumableSampler: {problem}" for problem in problems])
        self.order = SampleOrder(int(num_samples), int(seed))
        self.samples_consumed = 0
        """Samples consumed by all ranks together since the beginning of the first epoch."""
        self._turn = 0  # of the iterator that counts, and one more after a load
        self._drawn_at: int | None = None  # the samples consumed when a loader drew, and nothing was to count

    @property
    def global_batch_size(self) -> int:
        """Samples in one batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self.samples_consumed // self.order.num_samples

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches of indices without end, from the next sample on, without counting them."""
        own = np.arange(self.batch_size, dtype=np.uint64) + np.uint64(self.rank * self.batch_size)
        first = self.samples_consumed
        while True:
            if self._turn == 0:
                self._drawn_at = self.samples_consumed
            yield self.order.samples(own + np.uint64(first)).tolist()
            first += self.global_batch_size

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield the batches of a loader over this sampler, counting each as consumed.

        Starting a loader draws a number from torch's generator; the generator's state is restored, so that a run that
        resumes in the middle of an epoch draws the same numbers (for dropout, for instance) as an uninterrupted one.

        Raises:
            ConfigError: the loader draws from another sampler; or, at the next batch, ``batches`` was called again or
                a state was loaded since, so that this iterator is at another place in the data than the count.
        """
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(loader, torch.utils.data.DataLoader) and loader.batch_sampler is not self:
            raise ConfigError(
                "ResumableSampler.batches: the loader draws from another sampler, so its batches can't be counted: "
                "make it with DataLoader(dataset, batch_sampler=sampler)"
            )
        return self._counted(loader)

    def _counted(self, loader: Iterable[T]) -> Iterator[T]:
        self._turn += 1
        turn = self._turn
        torch = sys.modules.get("torch")
        before = torch.get_rng_state() if torch is not None else None
        iterator = iter(loader)
        if torch is not None and before is not None:
            torch.set_rng_state(before)
        for batch in iterator:
            if turn != self._turn:
                raise ConfigError(
                    "ResumableSampler.batches: this iterator was begun before a state was loaded, or before another "
                    "one was begun: call batches(loader) again after the load"
                )
            self.samples_consumed += self.global_batch_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data; the same on every rank.

        Raises:
            ConfigError: batches were drawn and none was counted, so a resumed run would begin with the first again.
        """
        if self._drawn_at is not None and self._turn == 0 and self._drawn_at == self.samples_consumed:
            raise ConfigError(
                "ResumableSampler: batches were drawn, but none was counted, so a resumed run would repeat them: loop "
                "over sampler.batches(loader), not over the loader itself"
            )
        return {
            "samples_consumed": self.samples_consumed,
            "num_samples": self.order.num_samples,
            "seed": self.order.seed,
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse a ``state`` that :meth:`load_state_dict` would refuse. A load calls it before it changes anything.

        Raises:
            StateMismatchError: the number of samples or the seed differs.
        """
        present = {"num_samples": self.order.num_samples, "seed": self.order.seed}
        consumed = state.get("samples_consumed") if isinstance(state, Mapping) else None
        if not _is_whole(consumed) or consumed < 0:
            raise StateMismatchError(
                f"ResumableSampler: expected a state with the number of samples_consumed, found {state!r:.200}"
            )
        changed = [name for name in present if state.get(name) != present[name]]
        if changed:
            changes = [f"{name} was {state.get(name)!r} and is {present[name]!r}" for name in changed]
            raise StateMismatchError(
                f"the checkpoint was trained on other data, so the samples seen are unknown: {'; '.join(changes)}",
                mismatched=changes,
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, on any number of ranks. Call it before :meth:`batches`.

        Raises:
            StateMismatchError: the number of samples or the seed differs.
        """
        self.check_state_dict(state)
        self.samples_consumed = int(state["samples_consumed"])
        self._turn += bool(self._turn)  # what was begun before is at another place
        self._drawn_at = None


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _ranks() -> tuple[int, int]:
    """Return rank and world size of the default process group; before it exists, of torchrun's environment."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
