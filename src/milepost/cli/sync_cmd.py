"""``milepost sync``: copy committed steps to another folder or to a store."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from milepost.cli.paths import is_file, open_run
from milepost.cli.render import print_json, print_line, printable_lines, progress_bar
from milepost.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConfigError,
    MilepostError,
    NewerFormatError,
    SaveError,
    StorageError,
    listed,
)
from milepost.run import catalog
from milepost.run.beside import enclosing_checkpoint, is_same_folder
from milepost.run.branches import have_no_run_in_common
from milepost.run.catalog import StepEntry
from milepost.run.step_names import damage_mark, step_name, step_of
from milepost.saving.copy_step import CopyReport, Spot, copy_step
from milepost.storage import join_path, open_storage
from milepost.storage.base import format_nbytes, join, split
from milepost.verification.verify import verify_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost sync``."""
    parser.description = (
        "Copy the committed steps of a run, or one step, to another folder or to a store, newest first. Each is\n"
        "committed there like a save: readers see all of it or nothing. Steps already there are not copied again;\n"
        "an interrupted copy continues after its complete files. Each copy is read back and verified. Damaged steps\n"
        "and those of other programs are reported, and not copied. A later save of a step there is not replaced. The\n"
        "destination must not hold steps of another run."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost sync outputs/checkpoint backup/run-7\n"
        "  milepost sync outputs/checkpoint/step-500 backup/run-7\n\n"
        "exit status: 0, 2 wrong usage, 3 there is nothing to copy, 5 a step or its copy is damaged, 6 another\n"
        "process is copying a step, 7 a place can't be read or written\n"
    )
    parser.add_argument("source", metavar="SRC", help="the folder of a run, or of one of its steps")
    parser.add_argument("destination", metavar="DST", help="the destination folder; created if missing")
    parser.add_argument("--no-verify", action="store_true", help="do not read the copies back")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


_WORST_FIRST = (CheckpointDamagedError, StorageError, ConfigError, SaveError)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The steps to copy with their destinations, newest first; reasons why others are not, and errors."""

    copies: Sequence[tuple[Spot, Spot]]
    left: Sequence[str] = ()
    failures: Sequence[MilepostError] = ()


def run(args: argparse.Namespace) -> int:
    """Copy each step, verify the copy and print the report; one that can't be copied does not keep the others from it.

    Raises:
        CheckpointDamagedError: a step, or the copy of one, is damaged: lists all of them.
        StorageError: a step can't be read.
        ConfigError: the destination holds other saves of the same steps, which are not replaced.
        SaveError: another process is copying a step.
    """
    plan = _plan(args.source, args.destination)
    reports: list[CopyReport] = []
    failures = [*plan.failures]
    for src, dst in plan.copies:
        try:
            reports.append(_copy(src, dst, verifies=not args.no_verify))
        except CheckpointNotFoundError:
            if len(plan.copies) == 1:
                raise
            _report_left(f"{src}: deleted before it was copied")
        except (CheckpointDamagedError, ConfigError, SaveError) as error:
            failures.append(error)
        else:
            if not args.json:
                _print(reports[-1], verified=not args.no_verify)
    for reason in plan.left:
        _report_left(reason)
    if args.json:
        print_json([dataclasses.asdict(report) for report in reports])
    sys.stdout.flush()
    if failures:
        raise _merged(failures)
    return 0


def _copy(src: Spot, dst: Spot, *, verifies: bool) -> CopyReport:
    with progress_bar(f"copying {split(src.path)[1]}") as progress:
        report = copy_step(src, dst, progress)
    if verifies and (damage := _damage_of(src, dst)):
        raise CheckpointDamagedError(damage, path=dst.path)
    return report


def _merged(failures: Sequence[MilepostError]) -> MilepostError:
    """Return the worst of the errors, with the messages of all."""
    rank = [next(number for number, kind in enumerate(_WORST_FIRST) if isinstance(one, kind)) for one in failures]
    worst = failures[rank.index(min(rank))]
    worst.message = "\n".join(failures[number].message for number in sorted(range(len(rank)), key=rank.__getitem__))
    worst.args = (worst.message, *worst.args[1:])
    return worst


def _report_left(reason: str) -> None:
    print(printable_lines(f"not copied: {reason}"), file=sys.stderr, flush=True)


def _plan(source: str, destination: str) -> _Plan:
    """Decide what to copy.

    Raises:
        CheckpointNotFoundError: there is no committed step.
        ConfigError: the destination is the source, a file, another step, or holds another run's steps.
    """
    storage, name = open_storage(source)
    target, folder = open_storage(destination)
    if is_file(target, folder):
        raise ConfigError(f"{destination} is a file: give the destination folder")
    step, wanted = step_of(split(name)[1]), step_of(split(folder)[1])
    if step is not None:
        if wanted not in (None, step):
            raise ConfigError(f"{destination} is a path for step {wanted}, not for step {step}")
        to = folder if wanted is None else split(folder)[0]
        run_folder = split(name)[0]
    elif wanted is not None:
        raise ConfigError(
            f"{destination} is a path for one step: give the destination folder for the steps of {source}"
        )
    else:
        storage, run_folder = open_run(source)
        to = folder
    if is_same_folder(join_path(storage.root, run_folder), join_path(target.root, to)):
        raise ConfigError(f"{source} and {destination} are the same folder: give another destination")
    inside = enclosing_checkpoint(join_path(target.root, join(to, "step")), target)
    if inside is not None:
        raise ConfigError(f"{destination} is inside the checkpoint {inside}: give a destination outside of it")
    found = catalog.scan(storage, run_folder, keep_going=step is None)
    _refuse_other_run(found, catalog.scan(target, to), source, destination)
    if step is not None:
        return _Plan([(Spot(storage, name), Spot(target, join(to, step_name(step))))])
    return _plan_of_run(Spot(storage, run_folder), found, Spot(target, to), source)


def _plan_of_run(run: Spot, found: Sequence[StepEntry], to: Spot, source: str) -> _Plan:
    entries = [entry for entry in found if entry.state == "committed"]
    if not entries and any(entry.state == "part" for entry in found):
        raise CheckpointNotFoundError(
            f"{source} holds one node's parts of steps: a run with checkpoint.folder_per_node copies "
            "them to checkpoint.remote_folder, where they are complete",
            path=source,
        )
    steps = [f"{join_path(run.storage.root, entry.path)} is {entry.state}" for entry in found]
    external = [text for text, entry in zip(steps, found, strict=True) if entry.state == "external"]

    failures = [_failure(text, entry) for text, entry in zip(steps, found, strict=True) if entry.state in _FAILED]
    if not entries and any(entry.state == "unreadable" for entry in found):
        raise _merged(failures)
    if not entries:
        hint = f": {'; '.join(listed(steps))}. Copy folders of other programs unchanged" if external else ""
        raise CheckpointNotFoundError(f"{source} holds no committed step{hint}", path=source)
    return _Plan(
        copies=[
            (Spot(run.storage, entry.path), Spot(to.storage, join(to.path, step_name(entry.step))))
            for entry in reversed(entries)
        ],
        left=[f"{text}, written by another program: copy its folder unchanged" for text in external],
        failures=failures,
    )


_FAILED = ("damaged", "newer", "unreadable")


def _failure(text: str, entry: StepEntry) -> MilepostError:
    message = f"not copied: {text}: {entry.reason}"
    if entry.state == "unreadable":
        return StorageError(message, operation="read", path=entry.path)
    return (NewerFormatError if entry.state == "newer" else CheckpointDamagedError)(message, path=entry.path)


def _refuse_other_run(ours: Sequence[StepEntry], theirs: Sequence[StepEntry], source: str, destination: str) -> None:
    """Refuse to mix runs: a resume or retention at the destination would take the steps of one for the other's."""
    if have_no_run_in_common(ours, theirs):
        steps = ", ".join(listed([step_name(entry.step) for entry in theirs]))
        raise ConfigError(f"{destination} holds steps of another run than {source} ({steps}): give a folder of its own")


def _damage_of(src: Spot, copy: Spot) -> str:
    """Verify the copy; mark it if it is damaged, so that no reader takes it. Returns the damage, or ''."""
    with progress_bar(f"verifying {split(copy.path)[1]}") as progress:
        report = verify_in(copy.storage, copy.path, progress=progress)
    if not report.problems:
        copy.storage.remove(damage_mark(copy.path))  # of an earlier, damaged copy; only now is it known to be replaced
        return ""
    catalog.mark_damaged(copy.storage, copy.path, f"as copied from {src}: {report.problems[0]}", now=time.time())
    lines = "\n  ".join(listed(report.problems, total=report.num_problems))
    return f"{copy} is damaged, and marked so; `milepost verify {src}` shows whether the source is:\n  {lines}"


def _print(report: CopyReport, *, verified: bool) -> None:
    checked = ", verified" if verified else ""
    if report.was_there:
        print_line(f"{report.path}: already there{checked}")
        return
    rate = f", {format_nbytes(int(report.nbytes / report.seconds))}/s" if report.seconds > 0.1 else ""
    print_line(f"{report.path}: {format_nbytes(report.nbytes)} in {report.seconds:.1f} s{rate}{checked}")
