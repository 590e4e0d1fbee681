"""``milepost report``: write a run or a step as one HTML page."""

from __future__ import annotations

import argparse
import pathlib
import webbrowser

from milepost.cli.render import console, page_path, printable, progress_bar, write_page
from milepost.errors import CheckpointDamagedError, ConfigError
from milepost.storage.base import counted, format_nbytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost report``."""
    parser.description = (
        "Write a report of a run's checkpoints as one HTML file that needs no server and no network: the cost of\n"
        "each save, the content of each step and whether it is verified, changes of every layer's weights,\n"
        "histograms, the rank that holds each shard. Every byte of the steps that are read is checked; statistics of\n"
        "large tensors use a sample."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost report outputs\n"
        "  milepost report outputs/checkpoint/step-40 -o step-40.html\n"
        "  milepost report outputs --tensorboard outputs/tb\n\n"
        "exit status: 0, 2 wrong usage, 3 there is no checkpoint, 5 the page is written, but a\n"
        "step is damaged or could not be read, 7 it can't be read or written\n"
    )
    parser.add_argument("path", metavar="RUN_OR_STEP", help="the folder of a run, or one of its steps")
    parser.add_argument(
        "-o",
        "--output",
        type=page_path,
        default="report.html",
        metavar="FILE",
        help="the file to write (report.html)",
    )
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument(
        "--steps", type=int, default=12, metavar="N", help="read the weights of at most N steps (default: 12, 0: none)"
    )
    parser.add_argument(
        "--tensorboard",
        metavar="FOLDER",
        help="also write the norm and the change of each layer there, for TensorBoard",
    )


def run(args: argparse.Namespace) -> int:
    """Gather, draw, write; 5 if a step is damaged or could not be read."""
    if args.steps < 0:
        raise ConfigError(f"--steps must be 0 (none) or more, not {args.steps}")
    from milepost.report.gather import gather  # imports numpy and the readers, which --help does not need
    from milepost.report.page import page

    with progress_bar("reading") as progress:
        view = gather(args.path, max_steps=args.steps, weights=args.steps > 0, progress=progress)
    target = pathlib.Path(args.output)
    nbytes = write_page(args.output, page(view))
    num_unread = sum(step.is_bad and not step.profiles for step in view.steps)
    num_damaged = sum(step.is_bad for step in view.steps) - num_unread
    bad = [f"{num_unread} could not be read"] * bool(num_unread)
    bad += [f"{num_damaged} {'is' if num_damaged == 1 else 'are'} damaged"] * bool(num_damaged)
    noted = f"; {' and '.join(bad)} (see the page)" if bad else ""
    console().print(
        printable(f"wrote {target} ({format_nbytes(nbytes)}): {counted(len(view.steps), 'step')}{noted}"), markup=False
    )
    if args.tensorboard:
        from milepost.report.tensorboard import write_scalars

        count = write_scalars(view, args.tensorboard)
        console().print(printable(f"wrote {counted(count, 'scalar')} to {args.tensorboard}"), markup=False)
    if args.open:
        webbrowser.open(target.resolve().as_uri())
    return CheckpointDamagedError.exit_status if bad else 0
