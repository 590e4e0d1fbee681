"""Sequences of tokens in the global order of ``milepost.data``, independent of the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from milepost.data import Indices, SampleOrder
from milepost.errors import ConfigError, StateMismatchError, listed
from milepost.train.corpus import Corpus

Tokens = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The inputs that determine order and content of the samples; a resumed run must have the same."""

    dataset: str
    """Name of the corpus, for messages."""
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
        # One row of counts per micro-batch; in each row a rank has a run of local_batch_size.
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

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of other data. A load calls it before it changes anything.

        Raises:
            StateMismatchError: data set, tokenizer, sequence length or seed differ (the message names them), or the
            state is another program's.
        """
        if "samples_consumed" not in state:
            raise StateMismatchError(
                f"the checkpoint holds the state of another program's data loader ({', '.join(listed(list(state), 3))})"
                ", which alone knows the samples seen. Restart the data with "
                "--checkpoint.exclude_from_loading dataloader",
                mismatched=[f"dataloader.{key}" for key in state],
            )
        saved, present = dict(state.get("fingerprint", {})), asdict(self.fingerprint)
        changed = [name for name in present if saved.get(name) != present[name]]
        if changed not in ([], ["dataset"]):  # the same tokens under another name are the same data
            changes = [f"{name} was {saved.get(name)!r} and is {present[name]!r}" for name in changed]
            raise StateMismatchError(
                "the checkpoint was trained on other data, so the samples seen are unknown: "
                + "; ".join(changes)
                + ". Restore these, or restart the data with --checkpoint.exclude_from_loading dataloader",
                mismatched=changes,
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``. Raises like :meth:`check_state_dict`."""
        self.check_state_dict(state)
        self.samples_consumed = int(state["samples_consumed"])
