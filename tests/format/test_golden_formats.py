"""Steps as each format was once written, byte for byte: they are read for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import milepost
from milepost.errors import SaveError
from milepost.run import catalog, checkpoint_record
from milepost.run.assemble import SaveInfo, check_fits
from milepost.storage import LocalStorage
from milepost.verification.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
W = np.arange(60, dtype="float32").reshape(12, 5)


@pytest.mark.parametrize("version", [1, 2])
def test_a_step_of_every_format_is_listed_verified_and_loaded(version: int):
    folder = GOLDEN / f"format-{version}"
    (entry,) = catalog.scan(LocalStorage(folder), "")
    assert (entry.step, entry.state, entry.world_size, entry.num_parameters) == (7, "committed", 2, 128)
    report = verify(folder / "step-7")
    assert (report.verdict, report.num_items, report.read_nbytes) == ("ok", 11, report.nbytes)
    into = {"layers.0.w": torch.zeros(12, 5), "layers.1.w": torch.zeros(12, 5), "lr": None, "train_state.step": None}
    milepost.load(folder / "step-7", into, allow_unexpected=["norm.weight", "optimizer", "scalar"])
    assert into["layers.0.w"].equal(torch.from_numpy(W))
    assert into["layers.1.w"].equal(torch.from_numpy(W * 2))
    assert (into["lr"], into["train_state.step"]) == (0.5, 7)


def test_both_formats_say_the_same_of_the_same_state():
    old, new = (
        checkpoint_record.read_manifest(LocalStorage(GOLDEN / f"format-{version}"), "step-7") for version in (1, 2)
    )
    assert old.tensors == new.tensors
    assert old.objects == new.objects


@pytest.mark.parametrize(
    ("changes", "num_shards", "name"),
    [
        ({"metrics": {f"metric {n}": 0.5 for n in range(5000)}}, 1, "the head of milepost.json"),
        pytest.param({"extra": {"x": "y" * (513 << 20)}}, 1, "milepost.json would have", marks=pytest.mark.slow),
        ({}, 1 << 30, "milepost.shards would have"),
    ],
)
def test_a_save_that_could_not_be_read_again_is_refused_before_it_writes(changes, num_shards, name):  # type: ignore[no-untyped-def]
    with pytest.raises(SaveError, match=f"nothing was written: {name}"):
        check_fits(SaveInfo(step=1, kind="full", **changes), num_shards=num_shards, world_size=2)


def test_ten_million_shards_of_a_thousand_ranks_fit():
    check_fits(SaveInfo(step=1, kind="full"), num_shards=10_000_000, world_size=1024)
