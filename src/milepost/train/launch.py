"""torchrun with quiet ends: ``python -m milepost.train.launch <torchrun's options> -- <the trainer's options>``.

torchrun itself answers a failed rank, and even Ctrl-C, with its own traceback and exit status 1. Here a mistake in the
configuration is told before anything is started, a failure is told once, in the words of the rank that failed first,
and the exit status is that rank's (128 + the signal's number for a signal).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from milepost.errors import ConfigError
from milepost.train.options import load_config
from milepost.train.process import LAUNCHER_PID, leave_on_signals


def main() -> None:
    leave_on_signals()
    torchrun_args, trainer_args = split_args(sys.argv[1:])
    try:
        load_config(trainer_args, world_size(torchrun_args))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    sys.exit(run([*torchrun_args, "-m", "milepost.train", *trainer_args]))


def split_args(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before ``--`` and what comes after."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def world_size(torchrun_args: Sequence[str]) -> int | None:
    """The number of ranks that torchrun will start on all nodes; None where only torchrun can tell."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", dest="ranks", default="1")
    args, _ = parser.parse_known_args(torchrun_args)
    numbers = (args.nnodes, args.ranks)
    return int(args.nnodes) * int(args.ranks) if all(n.isdecimal() for n in numbers) else None


def run(argv: Sequence[str]) -> int:
    """Run torchrun with ``argv`` and return the exit status of the job."""
    from torch.distributed import run as torchrun  # seconds: only once the configuration is known to be right
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    # PyTorch 2.13 keeps one store for all restarts of a job, where a restarted rank finds the addresses of dead ones.
    # This makes a new one for each, hosted by rank 0.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ[LAUNCHER_PID] = str(os.getpid())
    try:
        torchrun.run(torchrun.parse_args(argv))
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            print(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
            return 128 - failure.exitcode
        if str(failure.local_rank) not in os.environ.get("LOG_RANK", "0").split(","):
            print(failure.message, file=sys.stderr)
        return failure.exitcode
    except RendezvousError as lost:
        print(
            f"error: the nodes of this job can't meet: {lost}\n"
            "The one at --rdzv_endpoint hosts the meeting; without it the job can't go on. Started anew, it resumes "
            "from the newest checkpoint",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    main()
