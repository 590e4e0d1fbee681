"""``milepost sync``: copy committed steps to another folder or to a store."""

from __future__ import annotations

import argparse
import dataclasses

from milepost.cli.paths import open_run
from milepost.cli.render import print_json, print_line, progress_bar
from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, ConfigError, listed
from milepost.run import catalog
from milepost.run.step_names import step_name, step_of
from milepost.saving.copy_step import CopyReport, Spot, copy_step
from milepost.storage import open_storage
from milepost.storage.base import format_nbytes, join
from milepost.verification.verify import verify_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost sync``."""
    parser.description = (
        "Copy the committed steps of a run, or one step, to another folder or to a store, newest first. Each is\n"
        "committed there like a save: readers see all of it or nothing. Steps already there are not copied again;\n"
        "an interrupted copy continues after its complete files. Each copy is read back and verified."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost sync outputs/checkpoint backup/run-7\n"
        "  milepost sync outputs/checkpoint/step-500 backup/run-7\n\n"
        "exit status: 0, 2 wrong usage, 3 there is nothing to copy, 5 a step or its copy is damaged, 7 a place\n"
        "can't be read or written\n"
    )
    parser.add_argument("source", metavar="SRC", help="the folder of a run, or of one of its steps")
    parser.add_argument("destination", metavar="DST", help="the destination folder; created if missing")
    parser.add_argument("--no-verify", action="store_true", help="do not read the copies back")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    """Copy each step, verify the copy and print the report."""
    reports = []
    for src, dst in _copies(args.source, args.destination):
        with progress_bar(f"copying {src.path.rpartition('/')[2]}") as progress:
            report = copy_step(src, dst, progress)
        reports.append(report)
        if not args.no_verify:
            _verify(dst)
        if not args.json:
            _print(report, verified=not args.no_verify)
    if args.json:
        print_json([dataclasses.asdict(report) for report in reports])
    return 0


def _copies(source: str, destination: str) -> list[tuple[Spot, Spot]]:
    """List the steps to copy with their destinations, newest first.

    Raises:
        CheckpointNotFoundError: there is no committed step.
        ConfigError: the destination names another step.
    """
    storage, name = open_storage(source)
    target, folder = open_storage(destination)
    step, wanted = step_of(name.rpartition("/")[2]), step_of(folder.rpartition("/")[2])
    if step is not None:
        if wanted not in (None, step):
            raise ConfigError(f"{destination} is a path for step {wanted}, not for step {step}")
        path = folder if wanted is not None else join(folder, step_name(step))
        return [(Spot(storage, name), Spot(target, path))]
    if wanted is not None:
        raise ConfigError(
            f"{destination} is a path for one step: give the destination folder for the steps of {source}"
        )
    storage, run_folder = open_run(source)
    found = catalog.scan(storage, run_folder)
    entries = [entry for entry in found if entry.state == "committed"]
    if not entries and any(entry.state == "part" for entry in found):
        raise CheckpointNotFoundError(
            f"{source} holds one node's parts of steps: a run with checkpoint.folder_per_node copies "
            "them to checkpoint.remote_folder, where they are complete",
            path=source,
        )
    if not entries:
        raise CheckpointNotFoundError(f"{source} holds no committed step", path=source)
    return [
        (Spot(storage, entry.path), Spot(target, join(folder, step_name(entry.step)))) for entry in reversed(entries)
    ]


def _verify(copy: Spot) -> None:
    with progress_bar(f"verifying {copy.path.rpartition('/')[2]}") as progress:
        report = verify_in(copy.storage, copy.path, progress=progress)
    if report.problems:
        lines = "\n  ".join(listed(report.problems, total=report.num_problems))
        raise CheckpointDamagedError(f"{copy} is damaged:\n  {lines}", path=copy.path)


def _print(report: CopyReport, *, verified: bool) -> None:
    checked = ", verified" if verified else ""
    if report.was_there:
        print_line(f"{report.path}: already there{checked}")
        return
    rate = f", {format_nbytes(int(report.nbytes / report.seconds))}/s" if report.seconds > 0.1 else ""
    print_line(f"{report.path}: {format_nbytes(report.nbytes)} in {report.seconds:.1f} s{rate}{checked}")
