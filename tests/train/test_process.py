"""The end of a rank: one message from one rank, and an exit status that identifies the cause."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import milepost
from milepost.errors import CheckpointNotFoundError
from milepost.storage import LocalStorage
from milepost.train.process import (
    LAUNCHER_PID,
    accept_save_requests,
    hold_save_requests,
    leave,
    leave_on_signals,
    leave_with,
    leave_with_launcher,
    show_log,
)


def ended(act: Callable[[], object], **environment: str) -> tuple[int, float]:
    """Run ``act`` in a fork with more environment variables; its exit status and how long it took."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        act()
        os._exit(99)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def rank(number: int, folder: Path) -> dict[str, str]:
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_ERROR_FILE": str(folder / f"{number}.json"),
    }


def not_found() -> None:
    leave_with(CheckpointNotFoundError("step 7 does not exist"))


def lost_peer() -> None:
    leave_with(RuntimeError("[tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:14711\nmore"))


def bug() -> None:
    leave_with(ZeroDivisionError("division by zero"))


def save_and_fail(folder: Path) -> None:
    """A bug right after a save that a thread writes, to a slow disk."""
    torch.set_num_threads(1)
    real = LocalStorage.open_write

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return real(*args, **options)

    with mock.patch.object(LocalStorage, "open_write", slow):
        milepost.async_save(folder / "step-1", {"w": torch.ones(3)}, mode="async")
        bug()


def test_what_was_staged_is_committed_before_the_process_ends_by_an_error(tmp_path: Path):
    status, _ = ended(lambda: save_and_fail(tmp_path), **rank(0, tmp_path))
    assert status == 1
    assert (tmp_path / "step-1").is_dir()


def test_an_error_is_one_message_with_its_own_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    status, seconds = ended(not_found, **rank(0, tmp_path))
    assert status == CheckpointNotFoundError.exit_status
    assert capfd.readouterr().err == "error: step 7 does not exist\n"
    assert json.loads((tmp_path / "0.json").read_text())["message"] == "error: step 7 does not exist"
    assert seconds < 0.9


def test_a_rank_that_does_not_speak_lets_the_one_that_does_go_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    status, seconds = ended(not_found, **rank(1, tmp_path))
    assert status == CheckpointNotFoundError.exit_status
    assert capfd.readouterr().err == ""
    assert json.loads((tmp_path / "1.json").read_text())["message"] == "error: step 7 does not exist"
    assert seconds >= 1


def test_a_rank_that_lost_another_says_so_in_a_line_and_leaves_the_cause_to_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    status, seconds = ended(lost_peer, **rank(0, tmp_path))
    assert status == 1
    assert capfd.readouterr().err == "rank 0 has lost another rank (Connection closed by peer)\n"
    assert seconds >= 2


def test_a_bug_shows_its_traceback(capfd: pytest.CaptureFixture[str]):
    status, _ = ended(bug)
    assert status == 1
    assert "ZeroDivisionError: division by zero" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_process_with_a_line_and_its_number(number: signal.Signals, capfd: pytest.CaptureFixture[str]):
    def stopped() -> None:
        leave_on_signals()
        os.kill(os.getpid(), number)
        time.sleep(10)

    status, seconds = ended(stopped)
    assert status == 128 + number
    assert capfd.readouterr().err == f"stopped by {number.name}\n"
    assert seconds < 5


@pytest.mark.parametrize("dies_early", [False, True])
def test_a_rank_gets_sigterm_when_its_launcher_is_killed(dies_early: bool, capfd: pytest.CaptureFixture[str]):
    """Also when that happened before the rank could ask for it."""
    from_rank, to_test = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", LAUNCHER_PID: str(os.getpid())}
        if os.fork() == 0:
            leave_on_signals()
            while dies_early and os.getppid() == int(os.environ[LAUNCHER_PID]):
                time.sleep(0.001)
            leave_with_launcher()
            os.write(to_test, b"ready")
            time.sleep(30)
            os._exit(0)
        time.sleep(0 if dies_early else 30)
        os._exit(0)
    os.close(to_test)
    started = time.monotonic()
    if not dies_early:
        assert os.read(from_rank, 5) == b"ready"
        os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(from_rank, 5) == b""  # it is gone
    os.close(from_rank)
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err == "stopped by SIGTERM\n"


@pytest.mark.parametrize("handled", [True, False])
def test_a_save_request_to_a_rank_that_is_starting_waits_until_it_can_save(
    handled: bool, capfd: pytest.CaptureFixture[str]
):
    def start() -> None:
        hold_save_requests()
        os.kill(os.getpid(), signal.SIGUSR1)
        if handled:
            signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"asked to save\n"))
        os.write(1, b"started\n")
        accept_save_requests()
        os._exit(0)

    assert ended(start)[0] == 0
    captured = capfd.readouterr()
    assert captured.out == ("started\nasked to save\n" if handled else "started\n")
    assert ("SIGUSR1: this run does not save" in captured.err) is not handled


def test_a_closed_output_is_said_once_and_the_run_goes_on(capfd: pytest.CaptureFixture[str]):
    def run() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(writer)
        os.close(reader)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        sys.stdout = os.fdopen(1, "w")
        show_log()
        for number in range(3):
            logging.getLogger("milepost").info("step %d", number)
        leave(0)

    assert ended(run)[0] == 0
    assert capfd.readouterr().err == "standard output is closed: the run continues without it\n"
