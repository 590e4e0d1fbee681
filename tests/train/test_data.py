"""Every sample exactly once an epoch, in one order, whatever the number of ranks and wherever a run was stopped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.data import SampleOrder
from milepost.errors import ConfigError, StateMismatchError
from milepost.train.corpus import Corpus
from milepost.train.data import DataLoader

SEQ_LEN = 4


def make_loader(num_samples: int, *, dp_rank: int = 0, dp_degree: int = 1, local: int = 1, batch: int = 1, **changed):
    # Token t is the number t: a sample's first token identifies it.
    corpus = Corpus(np.arange(num_samples * SEQ_LEN + 1), changed.pop("dataset", "numbers"), "digest")
    options = {"tokenizer": "none", "seq_len": SEQ_LEN, "seed": 1} | changed
    return DataLoader(
        corpus, local_batch_size=local, global_batch_size=batch, dp_rank=dp_rank, dp_degree=dp_degree, **options
    )


def samples_of(loaders: list[DataLoader]) -> list[int]:
    """The samples of the next step in the order of their counts: by micro-batch, then rank, then row."""
    micro_batches = zip(*(list(loader.next_batch()) for loader in loaders), strict=True)
    return [int(row[0]) // SEQ_LEN for ranks in micro_batches for tokens, _ in ranks for row in tokens]


@given(num_samples=st.integers(1, 300), seed=st.integers(0, 2**70), epoch=st.integers(0, 5))
def test_an_epoch_has_every_sample_once(num_samples: int, seed: int, epoch: int):
    counts = np.arange(epoch * num_samples, (epoch + 1) * num_samples, dtype=np.uint64)
    order = SampleOrder(num_samples, seed).samples(counts)
    assert sorted(order.tolist()) == list(range(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own():
    counts = np.arange(2000, dtype=np.uint64)
    first, second = np.split(SampleOrder(1000, 7).samples(counts), 2)
    other = SampleOrder(1000, 8).samples(counts[:1000])
    for one, two in ((first, second), (first, other), (first, np.arange(1000))):
        assert np.mean(one == two) < 0.02
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.1


def test_the_order_is_the_same_in_every_version():
    """A change here would make runs in progress see some samples twice and others never."""
    order = SampleOrder(1000, 0).samples(np.arange(995, 1005, dtype=np.uint64))
    assert order.tolist() == [784, 808, 21, 522, 463, 850, 149, 86, 928, 62]


def test_a_billion_samples_need_no_table():
    order = SampleOrder(10**9, 3).samples(np.arange(10**9 - 1000, 10**9, dtype=np.uint64))
    assert len(set(order.tolist())) == 1000
    assert order.max() < 10**9


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    degrees=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4),
    num_samples=st.integers(1, 60),
)
def test_every_sample_comes_once_across_changes_of_the_data_parallel_degree(data, degrees, num_samples):
    """The run is stopped after some steps of 12 samples and continues with other ranks and micro-batches."""
    state, seen = None, []
    for degree in degrees:
        local = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 12) if 12 % (n * degree) == 0]))
        loaders = [
            make_loader(num_samples, dp_rank=rank, dp_degree=degree, local=local, batch=12) for rank in range(degree)
        ]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
        for _ in range(data.draw(st.integers(1, 4))):
            seen += samples_of(loaders)
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert state["samples_consumed"] == len(seen)
    assert seen == SampleOrder(num_samples, 1).samples(np.arange(len(seen), dtype=np.uint64)).tolist()
    epochs, rest = divmod(len(seen), num_samples)
    counts = np.bincount(seen, minlength=num_samples)
    assert counts.min() >= epochs
    assert counts.max() <= epochs + (rest > 0)


def test_labels_are_the_tokens_that_come_next():
    ((tokens, labels),) = make_loader(5, local=2, batch=2).next_batch()
    assert tokens.shape == labels.shape == (2, SEQ_LEN)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(labels, tokens + 1)


def test_other_data_is_refused_and_what_changed_is_named():
    state = make_loader(10).state_dict()
    with pytest.raises(StateMismatchError) as caught:
        make_loader(10, seed=2, dataset="letters").load_state_dict(state)
    assert caught.value.mismatched == ("dataset was 'numbers' and is 'letters'", "seed was 1 and is 2")
    assert "--checkpoint.exclude_from_loading dataloader" in str(caught.value)


def test_the_same_tokens_under_another_name_are_the_same_data():
    loader = make_loader(10, dataset="renamed")
    loader.load_state_dict(make_loader(10).state_dict() | {"samples_consumed": 7})
    assert loader.samples_consumed == 7


def test_a_corpus_shorter_than_a_sample_is_refused():
    with pytest.raises(ConfigError, match="seq_len 4 needs 5 tokens, but numbers has 1"):
        make_loader(0)
