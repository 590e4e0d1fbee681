"""torchrun with clean errors: ``python -m milepost.train.launch <torchrun's options> -- <the trainer's options>``.

After a failed rank, and even after Ctrl-C, torchrun prints its own traceback and exits with status 1. Here a mistake in
the configuration is reported before anything is started; a failure is reported once, with the message of the rank that
failed first; and the exit status is that rank's (128 + the signal's number for a signal). SIGUSR1 is forwarded to the
ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil

from milepost.errors import ConfigError
from milepost.train.options import load_config
from milepost.train.process import LAUNCHER_PID, ignores_hangup, leave_on_signals

SHUTDOWN_TIMEOUT_S = 600
"""Seconds that ranks have to save after SIGTERM or Ctrl-C before torchrun kills them; its default of 30 s is short."""

_NUMBERS_OF_RANKS = ("auto", "gpu", "cpu", "xpu")
"""Words that torchrun accepts for ``--nproc_per_node`` instead of a number."""


def main() -> None:
    leave_on_signals()
    pass_on_save_requests()
    torchrun_args, trainer_args = split_args(sys.argv[1:])
    try:
        check(torchrun_args, trainer_args)
        status = run([*torchrun_args, "-m", "milepost.train", *trainer_args])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.exit_status
    sys.exit(status)


def check(torchrun_args: Sequence[str], trainer_args: Sequence[str]) -> None:
    """Check both command lines. Raises ConfigError with all problems."""
    problems: list[str] = []
    num_ranks = None
    try:
        num_ranks = world_size(torchrun_args)
    except ConfigError as error:
        problems += error.problems
    try:
        load_config(trainer_args, num_ranks)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)


def split_args(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments at ``--``."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def world_size(torchrun_args: Sequence[str]) -> int | None:
    """Return the number of ranks that torchrun will start on all nodes; None if only torchrun can determine it.

    Raises:
        ConfigError: an invalid number of ranks or nodes, or LOG_RANK, for which torchrun would print a traceback.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", dest="ranks", default="1")
    args, _ = parser.parse_known_args(torchrun_args)
    problems = []
    is_number = _is_count(args.ranks)
    if not is_number and args.ranks not in _NUMBERS_OF_RANKS:
        problems.append(
            f"NGPU (--nproc_per_node) must be the number of processes on this machine, at least 1, or one of "
            f"{', '.join(_NUMBERS_OF_RANKS)}, not {args.ranks!r}"
        )
    least, _, most = args.nnodes.partition(":")
    if not all(_is_count(n) for n in (least, most or least)) or int(least) > int(most or least):
        problems.append(f"--nnodes must be a number of nodes, or MIN:MAX, not {args.nnodes!r}")
    problems += _log_rank_problems(int(args.ranks) if is_number else None)
    if problems:
        raise ConfigError(problems)
    return int(args.nnodes) * int(args.ranks) if is_number and not most else None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) >= 1


def _log_rank_problems(num_local_ranks: int | None) -> list[str]:
    shown = os.environ.get("LOG_RANK", "0")
    ranks = shown.split(",")
    if not all(rank.isascii() and rank.isdecimal() for rank in ranks):
        return [f"LOG_RANK must be local ranks separated by commas, such as 0 or 0,1, not {shown!r}"]
    if num_local_ranks is not None and all(int(rank) >= num_local_ranks for rank in ranks):
        there = "0" if num_local_ranks == 1 else f"0 to {num_local_ranks - 1}"
        return [f"LOG_RANK={shown} names none of the local ranks, {there}, so nothing would be printed"]
    return []


def run(argv: Sequence[str]) -> int:
    """Run torchrun with ``argv`` and return the exit status of the job.

    Raises:
        ConfigError: torchrun does not accept ``argv``.
    """
    from torch.distributed import run as torchrun  # takes seconds: only after the configuration was checked
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    # PyTorch 2.13 keeps one store for all restarts of a job, in which a restarted rank finds the addresses of dead
    # ones. This creates a new one for each start, hosted by rank 0.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ[LAUNCHER_PID] = str(os.getpid())
    args = _parsed(argv, torchrun.get_args_parser())
    if "LOGLEVEL" not in os.environ:  # it requests torchrun's own log
        _show_in_our_words(args.max_restarts)
    signal.signal(signal.SIGINT, _Interrupt(SignalException))
    try:
        torchrun.run(args)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
            return 128 - failure.exitcode
        if str(failure.local_rank) not in os.environ.get("LOG_RANK", "0").split(","):
            print(failure.message, file=sys.stderr)
        return failure.exitcode
    except RendezvousError as lost:
        print(
            f"error: rendezvous of this job's nodes failed: {lost}\n"
            "The one at --rdzv_endpoint hosts the meeting; without it the job can't continue. Restarted, it resumes "
            "from the newest checkpoint",
            file=sys.stderr,
        )
        return 1
    return 0


def _defaults() -> dict[str, Any]:
    """Return our replacements for torchrun's defaults, if this torch has the option; SIGINT is handled here."""
    handled = "SIGTERM,SIGQUIT" if ignores_hangup() else "SIGTERM,SIGHUP,SIGQUIT"
    return {"shutdown_timeout": SHUTDOWN_TIMEOUT_S, "signals_to_handle": handled}


def _parsed(argv: Sequence[str], parser: argparse.ArgumentParser) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise ConfigError(f"torchrun does not understand its options (TORCHRUN_ARGS): {message}")

    parser.error = refuse  # type: ignore[assignment,method-assign]  # the original prints a page of usage
    parser.set_defaults(**_defaults())
    return parser.parse_args(argv)


class _Interrupt:
    """Handles Ctrl-C: the first one makes torchrun ask the ranks to save and stop; a second one kills them."""

    def __init__(self, exception: Any):
        self._exception = exception
        self._came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._came:
            self._came = True
            if not _ranks():  # else they report it themselves
                os.write(2, b"stopped by SIGINT\n")
            raise self._exception("interrupted", signal.Signals(number))
        os.write(2, b"stopped at once by a second SIGINT\n")
        for rank in _ranks():
            with contextlib.suppress(psutil.Error):
                rank.kill()


def pass_on_save_requests() -> None:
    """Start forwarding SIGUSR1 to the ranks.

    Child processes inherit its blocked state: a rank that is still starting keeps it pending until it can save.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_pass_on, name="milepost-save-requests", daemon=True).start()


def _pass_on() -> None:
    while True:
        signal.sigwait({signal.SIGUSR1})
        for rank in _ranks():
            with contextlib.suppress(psutil.Error):
                rank.send_signal(signal.SIGUSR1)


def _ranks() -> list[psutil.Process]:
    """Return the ranks started by this launcher. Writer processes are the ranks' children."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "milepost.train" in child.cmdline():
                found.append(child)
    return found


class _OurWords(logging.Handler):
    """Reports the important events of torchrun's log: a rank died, all ranks are restarted."""

    def __init__(self, max_restarts: int):
        super().__init__(logging.INFO)
        self._may_restart = max_restarts > 0

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args if isinstance(record.args, tuple) else ()
        text = None
        if record.msg.startswith("failed (exitcode: %s) local_rank: %s"):
            if self._may_restart:  # else it is reported at the end of the job
                text = f"local rank {args[1]} {_ending(int(str(args[0])))}"
        elif record.msg.startswith("[%s] Worker group %s. %s/%s attempts left"):
            text = f"restarting all ranks; restarts left: {int(str(args[2])) - 1}"
        elif record.msg.startswith("[%s] Detected %s new nodes"):
            joining = "1 more node joins" if args[1] == 1 else f"{args[1]} more nodes join"
            text = f"{joining}: the ranks save, and all are restarted"
        elif record.levelno >= logging.ERROR:
            text = f"torchrun: {record.getMessage()}"
        if text is not None:
            print(text, file=sys.stderr, flush=True)


def _ending(exitcode: int) -> str:
    return f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit status {exitcode}"


def _show_in_our_words(max_restarts: int) -> None:
    log = logging.getLogger("torch.distributed.elastic")
    log.handlers, log.propagate = [_OurWords(max_restarts)], False
    # Restarts are reported at INFO; torch sets the level of each logger by itself.
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.INFO)


if __name__ == "__main__":
    main()
