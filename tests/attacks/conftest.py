"""Fixtures: a checkpoint, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_checkpoint import DATA_FILES, save_state

from milepost.format.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    METADATA_NAME,
    SHARDS_NAME,
)
from milepost.testing.world import run_world


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "step-5"
    run_world(save_state, 2, path, timeout_s=60)
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        [METADATA_NAME, *DATA_FILES, SHARDS_NAME, DIGESTS_NAME, MANIFEST_NAME]
    )
    return path


@pytest.fixture
def step(intact: Path, memory_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(intact, memory_path / "step-5"))
