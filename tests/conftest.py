"""Fixtures for all tests."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from milepost.testing.seaweed import Seaweed, seaweed

Tally = Callable[..., None]


SLOW_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a test that takes minutes more time than the others, unless it sets its own limit."""
    for item in items:
        if item.get_closest_marker("slow") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A fresh folder on a file system in memory, where syncing costs nothing; on disk where there is none."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def same_log() -> Iterator[None]:
    """The trainer stops the propagation of Milepost's log, which ``caplog`` of the next test needs."""
    log = logging.getLogger("milepost")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """``tally(what, tried=..., lost=..., seed=...)``: a line of the table in ``docs/reliability.md``.

    ``what`` was done ``tried`` times, and ``lost`` of them ended with something lost: the test fails if it is not 0.
    Lines go to the file that ``MILEPOST_TALLY`` names, if any (``make reliability`` does, and makes the table of them).
    """

    def note(what: str, *, tried: int, lost: int, seed: int | None = None) -> None:
        assert tried > 0, f"{what}: nothing was tried"
        if path := os.environ.get("MILEPOST_TALLY"):
            line = {"what": what, "tried": tried, "lost": lost, "seed": seed, "test": request.node.nodeid}
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        assert lost == 0, f"{what}: {lost} of {tried} lost something"

    return note


@pytest.fixture(scope="session")
def store() -> Iterator[Seaweed]:
    """A real S3 store, started when the first test asks for it."""
    with seaweed() as server:
        yield server


@pytest.fixture
def store_environment(store: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment by which this process, and its children, find that store."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
