"""A run's folder; managers closed after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_run import opened


@pytest.fixture(autouse=True)
def close_managers() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"
