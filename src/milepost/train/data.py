"""Which sequence of tokens comes when: one global order of samples, whatever the number of ranks that read it.

Samples are counted globally from 0. The order is a pure function of (count, seed), so that the state of the data is
the number of samples consumed, and a run goes on at another data-parallel degree without missing or repeating one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from milepost.errors import ConfigError, StateMismatchError
from milepost.train.corpus import Corpus

Indices = np.ndarray[Any, np.dtype[np.uint64]]
Tokens = np.ndarray[Any, np.dtype[np.int64]]

_FEISTEL_ROUNDS = 6


class SampleOrder:
    """A permutation of ``num_samples`` samples for every epoch, without a table of it.

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
        """The samples that come at these global counts."""
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


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the order and content of the samples depend on. A resumed run must agree in all of it."""

    dataset: str
    """Its name, for messages."""
    tokens: str
    """Digest of the token ids."""
    tokenizer: str
    seq_len: int
    seed: int


class DataLoader:
    """The batches of one data-parallel rank. Its state, equal on all ranks, is the count of samples consumed.

    Sample ``i`` is tokens ``[i * seq_len, (i + 1) * seq_len]`` of the packed corpus, the last of which is only a label.

    Raises:
        ConfigError: the corpus is shorter than one sample.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        tokenizer: str,
        seq_len: int,
        seed: int,
        local_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_degree: int,
    ):
        num_samples = (len(corpus.tokens) - 1) // seq_len
        if num_samples < 1:
            raise ConfigError(
                f"training.seq_len {seq_len} needs {seq_len + 1} tokens, but {corpus.name} has {len(corpus.tokens)}"
            )
        self.order = SampleOrder(num_samples, seed)
        self.fingerprint = Fingerprint(corpus.name, corpus.digest, tokenizer, seq_len, seed)
        self.samples_consumed = 0
        self._tokens = corpus.tokens
        self._seq_len = seq_len
        self.global_batch_size = global_batch_size
        # One row of counts a micro-batch; in a row, each rank has its own run of local_batch_size.
        own = np.arange(global_batch_size, dtype=np.uint64).reshape(-1, dp_degree, local_batch_size)
        self._own_offsets = own[:, dp_rank]

    def next_batch(self) -> Iterator[tuple[Tokens, Tokens]]:
        """Take the next global batch: this rank's (tokens, labels), each (local_batch, seq), for every micro-batch."""
        counts = self._own_offsets + np.uint64(self.samples_consumed)
        self.samples_consumed += self.global_batch_size
        return map(self._read, counts)

    def _read(self, counts: Indices) -> tuple[Tokens, Tokens]:
        starts = self.order.samples(counts).astype(np.int64) * self._seq_len
        rows = [self._tokens[start : start + self._seq_len + 1] for start in starts]
        batch = np.stack(rows).astype(np.int64)  # (local_batch, seq + 1)
        return batch[:, :-1], batch[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"samples_consumed": self.samples_consumed, "fingerprint": asdict(self.fingerprint)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            StateMismatchError: data set, tokenizer, sequence length or seed differ; the message says which.
        """
        saved, present = dict(state.get("fingerprint", {})), asdict(self.fingerprint)
        changed = [name for name in present if saved.get(name) != present[name]]
        if changed not in ([], ["dataset"]):  # the same tokens under another name are the same data
            changes = [f"{name} was {saved.get(name)!r} and is {present[name]!r}" for name in changed]
            raise StateMismatchError(
                "the checkpoint was trained on other data, so the samples already seen can't be told: "
                + "; ".join(changes)
                + ". Restore these, or start the data afresh with --checkpoint.exclude_from_loading dataloader",
                mismatched=changes,
            )
        self.samples_consumed = int(state["samples_consumed"])
