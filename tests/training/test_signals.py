"""Signals that ask for a save or a stop: handled once, and a second request to stop takes effect immediately."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from milepost.training import signals
from milepost.training.signals import HANG_UP, INTERRUPT, SAVE, STOP, SignalFlags


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def second() -> Iterator[list[int]]:
    """The signals received by the previous handlers."""
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    yield came
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "bit"), [(signal.SIGTERM, STOP), (signal.SIGINT, INTERRUPT)])
def test_the_first_stops_with_a_word_and_the_second_at_once(
    number: signal.Signals, bit: int, second: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(signals, "ECHO_S", 0.05)
    flags, said = SignalFlags(), []
    flags.listen(interrupt=True, on_stop=said.append)
    kill(number)
    assert (flags.take(), said, second) == (bit, [number], [])
    time.sleep(0.06)
    kill(number)
    assert (flags.take(), said, second) == (0, [number], [number])
    flags.restore()


def test_a_signal_that_comes_twice_at_once_is_one_request(second: list[int]):
    """A scheduler signals every process of a job, and the launcher forwards its signal."""
    flags = SignalFlags()
    flags.listen()
    kill(signal.SIGTERM)
    kill(signal.SIGTERM)
    assert (flags.take(), second) == (STOP, [])
    flags.restore()


@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGHUP), (signal.SIGHUP, signal.SIGTERM)])
def test_the_end_of_a_session_is_one_request_to_stop(order: tuple[signal.Signals, ...], second: list[int]):
    """A terminal that closes sends SIGHUP; systemd ends a session by SIGTERM and SIGHUP."""
    flags = SignalFlags()
    flags.listen()
    for number in order:
        kill(number)
    assert (flags.take(), second) == (STOP if order[0] == signal.SIGTERM else HANG_UP, [])
    flags.restore()


def test_a_program_that_ignores_hangups_goes_on_ignoring_them():
    """As ``nohup`` starts it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    flags = SignalFlags()
    flags.listen()
    kill(signal.SIGHUP)
    assert flags.take() == 0
    flags.restore()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_another_signal_to_stop_is_a_second_request(second: list[int]):
    """A launcher that is interrupted twice ends its ranks with SIGTERM."""
    flags = SignalFlags()
    flags.listen(interrupt=True)
    kill(signal.SIGINT)
    kill(signal.SIGTERM)
    assert second == [signal.SIGTERM]
    flags.restore()


def test_sigint_is_left_alone_unless_asked_for(second: list[int]):
    flags = SignalFlags()
    flags.listen()
    kill(signal.SIGINT)
    kill(signal.SIGUSR1)
    assert (flags.take(), second) == (SAVE, [signal.SIGINT])
    flags.restore()


@pytest.mark.parametrize(
    ("agreed", "expected"), [(0, None), (SAVE, None), (STOP, signal.SIGTERM), (STOP | INTERRUPT, signal.SIGINT)]
)
def test_the_signal_that_all_ranks_agreed_to_stop_for_is_known(agreed: int, expected: signal.Signals | None):
    flags = SignalFlags()
    flags.agreed = agreed
    assert flags.stop_signal == expected
