"""Retention deletes exactly the steps that no rule keeps, and never one that a resume may need."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.errors import StorageError
from milepost.format.manifest import Lineage
from milepost.run import catalog, retention
from milepost.run.branches import History
from milepost.run.catalog import StepEntry
from milepost.run.retention import Rules
from milepost.run.step_names import DELETING_PREFIX
from milepost.run.sweep import delete_checkpoint, sweep_leftovers
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays
from milepost.testing.wrap import Operation, WrappedStorage

T = TypeVar("T")
NOW = 1_000_000.0


def entry(step: int, state: str = "committed", **fields: object) -> StepEntry:
    given = {"kind": "full", "nbytes": 10, "created_s": NOW - 1000 + step} | fields
    return StepEntry(step=step, path=f"run/step-{step}", state=state, **given)  # type: ignore[arg-type]


def deleted(entries: list[StepEntry], **rules: object) -> list[int]:
    options = {"keep_latest_k": 2} | rules
    return [d.step for d in retention.plan(entries, Rules(**options), now=NOW) if not d.keep]  # type: ignore[arg-type]


def test_the_k_newest_stay() -> None:
    assert deleted([entry(step) for step in (5, 30, 10, 20)]) == [5, 10]


def test_zero_keeps_all() -> None:
    assert deleted([entry(step) for step in range(20)], keep_latest_k=0) == []


def test_multiples_stay() -> None:
    assert deleted([entry(step) for step in range(1, 10)], keep_latest_k=1, keep_every_n=4) == [1, 2, 3, 5, 6, 7]


def test_what_is_young_stays() -> None:
    entries = [entry(step, created_s=NOW - 100 * (5 - step)) for step in range(5)]
    assert deleted(entries, keep_latest_k=1, keep_within_s=250) == [0, 1, 2]
    # A clock that jumped back must not delete what seems to come from the future.
    assert deleted([entry(1, created_s=NOW + 9999), entry(2)], keep_latest_k=1, keep_within_s=1) == []


def test_what_is_not_a_committed_step_of_our_own_neither_counts_nor_goes() -> None:
    entries = [
        entry(1),
        entry(2),
        entry(3, "external"),
        entry(4, "incomplete"),
        entry(5, "damaged", reason="cut off"),
        entry(6, is_link=True),
    ]
    assert deleted(entries, keep_latest_k=1) == [1]


def test_steps_of_another_run_neither_count_nor_go() -> None:
    """A step moved here from another run, or of a run that was here before: this run did not write it."""
    others = [entry(step, lineage=Lineage(run="before", order=step, branch="b0")) for step in (1, 2, 70)]
    own = [entry(step, lineage=Lineage(run="r", order=100 + step, branch="b1")) for step in (3, 4, 5)]
    assert deleted([*others, *own], keep_latest_k=1) == [3, 4]
    assert deleted([*others, *own], keep_latest_k=4) == []
    decisions = retention.plan([*others, *own], Rules(keep_latest_k=1), now=NOW)
    assert {d.step for d in decisions if d.reason == "it is of another run"} == {1, 2, 70}


def test_pinned_and_protected_steps_stay_and_count_as_steps() -> None:
    entries = [entry(1, pinned=True), entry(2), entry(3), entry(4), entry(5)]
    assert deleted(entries, protected={3: "this run resumed from it"}) == [2]


def test_the_newest_step_to_resume_from_outlives_newer_weights() -> None:
    entries = [entry(1), entry(2), entry(3, kind="model"), entry(4, kind="model")]
    assert deleted(entries, keep_latest_k=1) == [1, 3]
    assert deleted(entries, keep_latest_k=2) == [1]


def test_each_decision_carries_its_reason() -> None:
    entries = [
        entry(1),
        entry(2, pinned=True),
        entry(3),
        entry(4, "damaged", reason="cut off"),
        entry(5, "external"),
        entry(6, "incomplete", reason="it was never committed"),
        entry(7, is_link=True),
        entry(10),
        entry(11, created_s=NOW - 60),
        entry(12),
        entry(13),
        entry(14, kind="model"),
    ]
    decisions = retention.plan(
        entries, Rules(keep_latest_k=3, keep_every_n=5, keep_within_s=7200, protected={3: "needed"}), now=NOW
    )
    assert {d.step: d.reason for d in decisions} == {
        1: "it was committed in the last 2 h",
        2: "it is pinned",
        3: "needed",
        4: "it is damaged: cut off",
        5: "it is external, written by another program",
        6: "it is incomplete: it was never committed",
        7: "it is a link to another folder",
        10: "it is a multiple of 5",
        11: "it was committed in the last 2 h",
        12: "it is one of the 3 newest",
        13: "it is the newest step to resume from",
        14: "it is the newest committed step",
    }
    (first, _) = retention.plan([entry(1), entry(2)], Rules(keep_latest_k=1), now=NOW)
    assert (first.keep, first.reason) == (False, "no rule keeps it")


states = st.sampled_from(["committed", "committed", "committed", "external", "incomplete", "damaged"])


@given(
    runs=st.dictionaries(
        st.integers(0, 60), st.tuples(states, st.sampled_from(["full", "model"]), st.booleans(), st.booleans())
    ),
    k=st.integers(0, 5),
    n=st.integers(0, 7),
    protected=st.sets(st.integers(0, 60)),
)
def test_a_resume_loses_nothing_whatever_the_rules(
    runs: dict[int, tuple[str, str, bool, bool]], k: int, n: int, protected: set[int]
) -> None:
    entries = [
        entry(step, state, kind=kind, pinned=pinned, is_link=link) for step, (state, kind, pinned, link) in runs.items()
    ]
    rules = {"keep_latest_k": k, "keep_every_n": n, "protected": dict.fromkeys(protected, "needed")}
    gone = set(deleted(entries, **rules))
    left = [e for e in entries if e.step not in gone]
    before, after = History.of(entries), History.of(left)
    assert (before.newest, before.newest_resumable) == (after.newest, after.newest_resumable)
    own = [History.of([e for e in some if e.state == "committed" and not e.is_link]) for some in (entries, left)]
    assert (own[0].newest, own[0].newest_resumable) == (own[1].newest, own[1].newest_resumable)
    assert not gone & protected
    assert all(e.state == "committed" and not e.pinned and not e.is_link for e in entries if e.step in gone)
    assert k or not gone
    # Pruning twice is pruning once.
    assert deleted(left, **rules) == []


def test_applying_deletes_what_was_decided(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    for step in range(4):
        save_arrays(storage, f"run/step-{step}", {"w": np.zeros(3, "float32")})
    decisions = retention.plan(catalog.scan(storage, "run"), Rules(keep_latest_k=2), now=NOW)
    assert retention.apply(storage, "run", decisions) == ["step-0", "step-1"]
    assert [e.name for e in storage.list("run")] == ["step-2", "step-3"]


def test_bytes_that_cannot_be_removed_are_an_error_and_those_of_the_others_go(memory_path: Path) -> None:
    """They are hidden, and a later sweep removes them; but the space that was to become free is not."""

    class Held(WrappedStorage):
        def remove_tree(self, path: str) -> None:
            if path.endswith("/step-0"):
                raise StorageError("a file in it is busy", operation="remove", path=path, errno=errno.EBUSY)
            self.inner.remove_tree(path)

    storage = LocalStorage(memory_path)
    for step in range(4):
        save_arrays(storage, f"run/step-{step}", {"w": np.zeros(1, np.float32)}, step=step)
    decisions = retention.plan(catalog.scan(storage, "run"), Rules(keep_latest_k=1), now=NOW)
    with pytest.raises(StorageError, match="busy"):
        retention.apply(Held(storage), "run", decisions)
    assert [entry.step for entry in catalog.scan(storage, "run")] == [3]
    (place,) = (one.name for one in storage.list("run") if one.name.startswith(DELETING_PREFIX))
    assert [one.name for one in storage.list(f"run/{place}") if one.is_folder] == ["step-0"]
    assert sweep_leftovers(storage, "run", now=NOW).removed == (place,)


def test_one_step_that_cannot_be_deleted_does_not_keep_the_others(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    for step in range(4):
        save_arrays(storage, f"run/step-{step}", {"w": np.zeros(3, "float32")})

    class Stubborn(WrappedStorage):
        def rename(self, src: str, dst: str) -> None:
            if src == "run/step-0":
                raise StorageError("permission denied", operation="rename", path=src, errno=errno.EACCES)
            self.inner.rename(src, dst)

    decisions = retention.plan(catalog.scan(storage, "run"), Rules(keep_latest_k=1), now=NOW)
    with pytest.raises(StorageError, match="permission denied"):
        retention.apply(Stubborn(storage), "run", decisions)
    assert [e.name for e in storage.list("run")] == ["step-0", "step-3"]


def test_what_another_prunes_at_the_same_time_is_no_error(memory_path: Path) -> None:
    """The trainer after a save, and another process's ``milepost prune``: before ours begins, and between its steps."""
    storage = LocalStorage(memory_path)
    for step in range(4):
        save_arrays(storage, f"run/step-{step}", {"w": np.zeros(4, "float32")}, step=step)

    class Shared(WrappedStorage):
        def rename(self, src: str, dst: str) -> None:
            if src == "run/step-1":
                storage.remove_tree(src)
            super().rename(src, dst)

    decisions = retention.plan(catalog.scan(storage, "run"), Rules(keep_latest_k=1), now=0.0)
    storage.remove_tree("run/step-0")
    assert retention.apply(Shared(storage), "run", decisions) == ["step-2"]
    assert [found.step for found in catalog.scan(storage, "run")] == [3]


class _Cut(WrappedStorage):
    """Dies before its n-th change; everything before it has happened."""

    def __init__(self, inner: LocalStorage, changes: int):
        super().__init__(inner)
        self.left = changes

    def around(self, operation: Operation, act: Callable[[], T], half: Callable[[], None] | None = None) -> T:
        if operation.changes:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return act()


@pytest.mark.parametrize("has_record", [True, False])
def test_what_a_user_put_into_a_step_outlives_it_wherever_the_deletion_dies(
    memory_path: Path, has_record: bool
) -> None:
    changes, done = 0, False
    while not done:
        folder = memory_path / str(changes)
        storage = LocalStorage(folder)
        save_arrays(storage, "run/step-1", {"w": np.zeros(3, "float32")})
        if not has_record:  # deleted by name, as an adapter for another framework does
            storage.remove("run/step-1/milepost.json")
        (folder / "run/step-1/notes.txt").write_text("mine")
        (folder / "run/step-1/evaluation/late").mkdir(parents=True)
        (folder / "run/step-1/evaluation/late/scores.json").write_text("{}")
        try:
            delete_checkpoint(_Cut(storage, changes), "run/step-1")
            done = True
        except KeyboardInterrupt:
            changes += 1
            sweep_leftovers(storage, "run", now=NOW)
            if (folder / "run/step-1").exists():
                delete_checkpoint(storage, "run/step-1")
        assert [path.read_text() for path in folder.rglob("notes.txt")] == ["mine"]
        assert [path.parent.name for path in folder.rglob("scores.json")] == ["late"]
        assert all(path.parent.name.startswith("step-1.aside-") for path in folder.rglob("notes.txt"))
        assert not (folder / "run/step-1").exists()
        assert not list(folder.rglob("*.distcp"))
    assert changes > 5
