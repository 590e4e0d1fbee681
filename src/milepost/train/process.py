"""One rank as a process: its output, and its exit on signals and errors. Torch-free.

Every exit goes through ``leave``, which skips Python's finalisation: during that a gloo thread may abort the process,
after all work is done, and torchrun would report a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from types import FrameType
from typing import NoReturn, TextIO

from milepost.errors import MilepostError
from milepost.saving.background import finish_saves

LAUNCHER_PID = "MILEPOST_LAUNCHER_PID"
"""Environment variable with the process id of the launcher, for its ranks."""
_PR_SET_PDEATHSIG = 1
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_LOST_PEER = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Broken pipe|Socket closed|remote process exited", re.I
)


def speaks() -> bool:
    """Return True if this rank prints: its local rank is in LOG_RANK (default 0), or it is the only process."""
    return "LOCAL_RANK" not in os.environ or os.environ["LOCAL_RANK"] in os.environ.get("LOG_RANK", "0").split(",")


class _Output(logging.StreamHandler[TextIO]):
    """Standard output that may go away, with a terminal or a reader such as ``head``: the run continues without it."""

    _is_lost = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
        elif not self._is_lost:
            self._is_lost = True
            write_line("standard output is closed: the run continues without it")


def show_log() -> None:
    """Print Milepost's log with the time of day, if this rank prints."""
    log = logging.getLogger("milepost")
    handler = _Output(sys.stdout) if speaks() else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def leave(status: int) -> NoReturn:
    """End the process with ``status``, at once."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal may be gone
            stream.flush()
    os._exit(status)


def leave_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP end the process with 128 + their number and one line, without a traceback.

    SIGHUP stays ignored if it is, as ``nohup`` requests.
    """
    for number in _ENDING:
        if not ignores_hangup() or number != signal.SIGHUP:
            signal.signal(number, _leave_on_signal)


def ignores_hangup() -> bool:
    """Return True if this process was started to survive the end of its terminal, by ``nohup`` for instance."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def hold_save_requests() -> None:
    """Keep SIGUSR1 pending, which would end the process, until `accept_save_requests`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def accept_save_requests() -> None:
    """Handle SIGUSR1, including a pending one. If no handler was installed, it only prints a line."""
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _nothing_to_save)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    write_line("SIGUSR1: this run does not save (see checkpoint.enable and checkpoint.load_only)")


def write_line(text: str) -> None:
    """Print a line on stderr, if this rank prints; safe in a signal handler."""
    if speaks():
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"{text}\n".encode())


def leave_with_launcher() -> None:
    """Have the kernel send SIGTERM to this rank when torchrun's agent dies, so that it saves and exits.

    An agent that is killed can't stop its ranks. They would continue training, with no one to restart them, and keep
    the run's folder locked against the next start of the job. (``PR_SET_PDEATHSIG`` of prctl(2); Linux only.)
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.environ.get(LAUNCHER_PID, str(os.getppid())) != str(os.getppid()):  # the agent is already dead
        os.kill(os.getpid(), signal.SIGTERM)


def _leave_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    ignore_signals()
    write_line(f"stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


def ignore_signals() -> None:
    """Ignore SIGINT, SIGTERM and SIGHUP: the process is about to exit."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def leave_with(error: Exception) -> NoReturn:
    """End the process because of ``error``: with one message for Milepost's own errors, else with a traceback.

    torchrun stops all ranks when the first one exits, and reports that one as the cause. So a rank that failed only
    because of another waits a little, as does one with the same error as the rank that prints. Before that, a staged
    save is finished: ``leave`` ends the thread that writes it.
    """
    ignore_signals()
    rank = os.environ.get("RANK", "0")
    if isinstance(error, MilepostError):
        text, status, wait_s = f"error: {error}", error.exit_status, 0.0 if speaks() else 1.0
    elif lost := _LOST_PEER.search(str(error)):
        text, status, wait_s = f"rank {rank} has lost another rank ({lost[0]})", 1, 2.0
    else:
        text, status, wait_s = f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}", 1, 0.0
    if speaks():
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(text, file=sys.stderr, flush=True)
    finish_saves()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(wait_s)
    _record(text)
    leave(status)


def _record(text: str) -> None:
    """Write ``text`` to the file where torchrun looks for the reason of a failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)
