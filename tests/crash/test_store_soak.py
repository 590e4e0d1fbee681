"""Training on a store that ends bit for bit as an undisturbed run; see ``store_soak``."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_soak import soak_on_store, victims_of


@pytest.mark.timeout(900)
def test_a_rank_and_the_store_fall(memory_path: Path) -> None:
    soak_on_store(memory_path, ["rank 1", "store"], 1, tier=False)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("tier", [False, True], ids=["store", "tier"])
def test_everything_falls_twice(memory_path: Path, tier: bool) -> None:
    soak_on_store(memory_path, victims_of(11, 12 if tier else 10, tier=tier), 11, tier=tier)
