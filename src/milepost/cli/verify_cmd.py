"""``milepost verify``: check one checkpoint, or every one of a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from typing import Any

from rich.markup import escape

from milepost.cli.render import console, print_json, printable, progress_bar
from milepost.errors import CheckpointDamagedError, ConfigError, listed
from milepost.run import catalog
from milepost.storage import open_storage
from milepost.storage.base import format_nbytes
from milepost.verification.verify import LEVELS, VerifyReport, verify_in, verify_run

MAX_LINES = 20
"""So many problems of one checkpoint are printed; ``--json`` has up to 1000."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost verify``."""
    parser.description = "Check that checkpoints are what was saved. Nothing is changed."
    parser.epilog = (
        "examples:\n"
        "  milepost verify outputs/checkpoint/step-500\n"
        "  milepost verify outputs/checkpoint --level sizes\n\n"
        "exit status: 0 sound, 5 damaged, 3 there is no checkpoint, 2 wrong usage, 7 it can't be read\n"
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or the folder of a run to check all its steps")
    parser.add_argument(
        "--level",
        choices=LEVELS,
        default="full",
        help="metadata: the commit record and the index; sizes: also every file's size; sample: also some of the "
        "records; full: every byte (default)",
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads that read (default 2)")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")


def run(args: argparse.Namespace) -> int:
    """Verify, print a report for each checkpoint; 5 if any is damaged."""
    if args.threads < 1:
        raise ConfigError(f"--threads must be at least 1, not {args.threads}")
    storage, name = open_storage(args.path)
    info = catalog.examine(storage, name)
    folder = catalog.find_run(storage, name)
    with contextlib.ExitStack() as stack:
        if folder is None or (info is not None and info.state != "incomplete"):
            progress = stack.enter_context(progress_bar(name))
            reports = [verify_in(storage, name, args.level, num_threads=args.threads, progress=progress)]
        else:

            def on_step(step: int) -> Any:
                stack.close()  # the bar of the step before
                return stack.enter_context(progress_bar(catalog.step_name(step)))

            reports = verify_run(storage, folder, args.level, num_threads=args.threads, on_step=on_step)
    sound = all(report.is_sound for report in reports)
    if args.json:
        print_json({"sound": sound, "checkpoints": [_json(report) for report in reports]})
    else:
        for report in reports:
            _print(report)
    return 0 if sound else CheckpointDamagedError.exit_status


def _json(report: VerifyReport) -> dict[str, Any]:
    return {"sound": report.is_sound} | dataclasses.asdict(report)


def _print(report: VerifyReport) -> None:
    out = console()
    rate = f", {format_nbytes(int(report.read_nbytes / report.seconds))}/s" if report.seconds > 0.1 else ""
    read = f"{format_nbytes(report.read_nbytes)} read in {report.seconds:.1f} s{rate}"
    verdict = "[green]sound[/]" if report.is_sound else f"[bold red]damaged[/]: {_count(report.num_problems)}"
    path = escape(printable(report.path))
    out.print(f"{path}: {verdict} (level {report.level}, {report.num_items} items, {read})")
    for line in listed(report.problems, MAX_LINES, total=report.num_problems, hint="; --json lists them"):
        out.print(f"  {printable(line)}", markup=False)
    if report.unchecked_nbytes:
        out.print(f"  {format_nbytes(report.unchecked_nbytes)} can't be checked: there are no digests of them")
    for note in report.notes:
        out.print(f"  note: {printable(note)}", markup=False)


def _count(problems: int) -> str:
    return "1 problem" if problems == 1 else f"{problems} problems"
