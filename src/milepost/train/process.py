"""One rank as a process: what it prints, how signals and errors end it. Torch-free.

Every way to end goes through ``leave``: it exits without finalising Python, during which a thread of gloo may abort
the process (after all work is done, and torchrun would report a failure).
"""

from __future__ import annotations

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
from typing import NoReturn

from milepost.errors import MilepostError
from milepost.saving.background import finish_saves

LAUNCHER_PID = "MILEPOST_LAUNCHER_PID"
"""Environment variable with the process id of the launcher, for its ranks."""
_PR_SET_PDEATHSIG = 1

_LOST_PEER = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Broken pipe|Socket closed|remote process exited", re.I
)


def speaks() -> bool:
    """True if this rank prints: the local ranks in LOG_RANK do (comma-separated, default 0), and a process alone."""
    return "LOCAL_RANK" not in os.environ or os.environ["LOCAL_RANK"] in os.environ.get("LOG_RANK", "0").split(",")


def show_log() -> None:
    """Print what Milepost logs, with the time of day, if this rank speaks; else nothing."""
    log = logging.getLogger("milepost")
    handler = logging.StreamHandler(sys.stdout) if speaks() else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def leave(status: int) -> NoReturn:
    """End the process with ``status``, at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_on_signals() -> None:
    """From now on SIGINT and SIGTERM end the process with 128 + their number and one line, without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave_on_signal)


def hold_save_requests() -> None:
    """Keep SIGUSR1 pending, which would end the process, until `accept_save_requests`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def accept_save_requests() -> None:
    """Handle SIGUSR1, one that has come meanwhile too. Without a handler by now it has no effect but a line."""
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _nothing_to_save)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    write_line("SIGUSR1: this run saves nothing now (see checkpoint.enable and checkpoint.load_only)")


def write_line(text: str) -> None:
    """Print a line on stderr, if this rank speaks; safe in a signal handler."""
    if speaks():
        os.write(2, f"{text}\n".encode())


def leave_with_launcher() -> None:
    """From now on the death of torchrun's agent sends SIGTERM to this rank, which so saves and ends.

    An agent that is killed can't end its ranks. Left to themselves they would train on, with nobody to restart them,
    and keep the run's folder locked against the next start of the job. (``PR_SET_PDEATHSIG`` of prctl(2); Linux only.)
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.environ.get(LAUNCHER_PID, str(os.getppid())) != str(os.getppid()):  # it has died already
        os.kill(os.getpid(), signal.SIGTERM)


def _leave_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    ignore_signals()
    write_line(f"stopped by {signal.Signals(number).name}")
    os._exit(128 + number)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM: the process is about to end by itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def leave_with(error: Exception) -> NoReturn:
    """End the process because of ``error``: one message for what Milepost raises on purpose, a traceback for the rest.

    torchrun ends all ranks when the first one does, and shows that one as the cause. So a rank that only follows from
    another's failure waits a little, and so does one that has the same error as the rank that speaks. Before that, a
    save that was staged is finished: ``leave`` ends the thread that writes it.
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
        print(text, file=sys.stderr, flush=True)
    finish_saves()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(wait_s)
    _record(text)
    leave(status)


def _record(text: str) -> None:
    """Leave ``text`` where torchrun looks for the reason of a failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)
