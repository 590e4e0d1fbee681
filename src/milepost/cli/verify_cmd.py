"""``milepost verify``: check one checkpoint, or all checkpoints of a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from typing import Any

from rich.text import Text

from milepost.cli.main import NOT_CHECKED
from milepost.cli.paths import run_at
from milepost.cli.render import print_json, print_line, printable, printable_lines, progress_bar
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConfigError,
    MilepostError,
    StorageError,
    listed,
)
from milepost.run.step_names import step_name
from milepost.storage import open_storage
from milepost.storage.base import counted, format_nbytes
from milepost.verification.verify import LEVELS, Level, VerifyReport, verify_in, verify_run

MAX_LINES = 20
"""Maximum number of problems printed per checkpoint; ``--json`` has up to 1000."""
VERDICTS = {
    "ok": (Text("OK", style="green"), 0),
    "not_verified": (Text("not verified", style="yellow"), NOT_CHECKED),
    "damaged": (Text("damaged", style="bold red"), CheckpointDamagedError.exit_status),
}
"""Text and exit status of each verdict, best first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost verify``."""
    parser.description = (
        "Check that checkpoints hold what was saved, and that weights match their headers. Nothing is changed. A\n"
        "Hugging Face folder, safetensors and .pt files are checked as far as possible; data without digests is never\n"
        "reported OK."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost verify outputs/checkpoint/step-500\n"
        "  milepost verify outputs/checkpoint --level sizes\n"
        "  milepost verify outputs/checkpoint/step-500 outputs/checkpoint/step-1000\n"
        "  milepost verify Llama-3.2-1B\n\n"
        "exit status: 0 OK, 5 damaged, 11 no problem was found but there are bytes without digests, or a newer\n"
        "Milepost wrote it, 3 there is no checkpoint, 2 wrong usage, 7 it can't be read\n"
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a checkpoint, the folder of a run to check all its steps, or weights",
    )
    parser.add_argument(
        "--level",
        choices=LEVELS,
        default="full",
        help="metadata: the commit record and the index; sizes: also every file's size; sample: also some of the "
        "records; full: every byte (default)",
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="number of reading threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")


def run(args: argparse.Namespace) -> int:
    """Verify, print a report for each checkpoint; 5 if any is damaged, 11 if one can't be verified.

    Of several paths, one that can't be verified at all does not keep the others from being verified.
    """
    if args.threads < 1:
        raise ConfigError(f"--threads must be at least 1, not {args.threads}")
    reports: list[VerifyReport] = []
    failures: list[MilepostError] = []
    for path in args.paths:
        try:
            found = _verify(path, args.level, args.threads)
        except (CheckpointNotFoundError, ConfigError, StorageError) as error:
            failures.append(error)
            continue
        reports += found
        for report in found if not args.json else ():
            _print(report)
    if not reports and len(failures) == 1:
        raise failures[0]
    worst = max((report.verdict for report in reports), key=list(VERDICTS).index, default="not_verified")
    if args.json:
        summary = {"verdict": worst, "sound": worst == "ok" and not failures}
        print_json(summary | {"checkpoints": [_json(report) for report in reports]})
    sys.stdout.flush()
    for failure in failures:
        print(f"milepost: error: {printable_lines(failure.message)}", file=sys.stderr)
    if worst == "damaged":
        return VERDICTS[worst][1]
    if failures:
        return failures[0].exit_status
    is_unreadable = any(report.state == "unreadable" for report in reports)
    return StorageError.exit_status if is_unreadable else VERDICTS[worst][1]


def _verify(path: str, level: Level, num_threads: int) -> list[VerifyReport]:
    """Verify a checkpoint or weights, or all checkpoints of a run.

    Raises:
        CheckpointNotFoundError: there is none.
        ConfigError, StorageError: the path is not one, or can't be read.
    """
    storage, name = open_storage(path)
    folder = run_at(storage, name)
    with contextlib.ExitStack() as stack:
        if folder is None:
            progress = stack.enter_context(progress_bar(name))
            return [verify_in(storage, name, level, num_threads=num_threads, progress=progress)]

        def on_step(step: int) -> Any:
            stack.close()  # the previous step's bar
            return stack.enter_context(progress_bar(step_name(step)))

        reports = verify_run(storage, folder, level, num_threads=num_threads, on_step=on_step)
    if not reports:
        raise CheckpointNotFoundError(f"{path}: all steps were deleted while they were being verified")
    return reports


def _json(report: VerifyReport) -> dict[str, Any]:
    return {"verdict": report.verdict, "sound": report.is_sound} | dataclasses.asdict(report)


def _print(report: VerifyReport) -> None:
    rate = f", {format_nbytes(int(report.read_nbytes / report.seconds))}/s" if report.seconds > 0.1 else ""
    read = f"{format_nbytes(report.read_nbytes)} read in {report.seconds:.1f} s{rate}"
    count = f": {counted(report.num_problems, 'problem')}" if report.problems else ""
    items = counted(report.num_items, "item")
    verdict = VERDICTS[report.verdict][0]
    print_line(
        Text.assemble(f"{printable(report.path)}: ", verdict, f"{count} (level {report.level}, {items}, {read})")
    )
    for line in listed(report.problems, MAX_LINES, total=report.num_problems, hint="; --json lists them"):
        print_line(f"  {line}")
    if report.unchecked_nbytes:
        whole = f" of {format_nbytes(report.nbytes)}" if report.nbytes > report.unchecked_nbytes else ""
        print_line(f"  {format_nbytes(report.unchecked_nbytes)}{whole} can't be checked: they have no digests")
    for note in report.notes:
        print_line(f"  note: {note}")
