"""``milepost ls``: list a run's checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from functools import partial
from typing import Any

from milepost.cli.paths import find_step, open_run
from milepost.cli.render import print_json, print_line, print_table, state_text
from milepost.errors import CheckpointNotFoundError, ConfigError, MilepostError
from milepost.format.summary import format_count, model_total
from milepost.parallelism.degrees import degrees_text
from milepost.run import catalog, checkpoint_record, marks, sweep
from milepost.run.branches import History
from milepost.run.catalog import StepEntry
from milepost.run.hf_folder import described
from milepost.run.step_names import ATTEMPT_PREFIX, step_of
from milepost.storage import open_storage
from milepost.storage.base import Storage, counted, format_duration, format_nbytes, join, split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost ls``."""
    parser.description = "List the checkpoints of a run, oldest first. Only metadata is read."
    parser.epilog = (
        "states:\n"
        "  committed   complete, judging by metadata and file sizes\n"
        "  part        one node's part of a step in per-node folders (checkpoint.folder_per_node)\n"
        "  external    complete, written by another program: torchtitan, torch.distributed.checkpoint\n"
        "  incomplete  never committed: no reader uses it\n"
        "  damaged     changed since it was committed\n"
        "  unreadable  the storage could not read it\n"
        "  newer       written by a newer Milepost, in a format that this one can't read: upgrade\n\n"
        "PARAMS counts the model's elements, DTYPE is the dtype of most of them. LAYOUT is the number of ranks that\n"
        "saved, and the degrees of parallelism above 1. METRICS are recorded with the step by the run. A step is\n"
        "on an abandoned branch if the run has since resumed from an earlier step, or of another run than the step\n"
        "that was written last: it is loaded only if\n"
        "checkpoint.load_step names it.\n"
        "WHERE (--remote): in the folder, in checkpoint.remote_folder (remote), in both, or being copied there.\n\n"
        "examples:\n"
        "  milepost ls outputs/checkpoint\n"
        "  milepost ls outputs --json\n"
        "  milepost ls outputs --watch\n\n"
        "exit status: 0, 3 there are no checkpoints, 2 wrong usage, 7 it can't be read\n"
    )
    parser.add_argument(
        "path", metavar="FOLDER", nargs="?", default=".", help="the folder of a run, or of a step (default: this one)"
    )
    parser.add_argument(
        "--remote",
        action="store_true",
        help="also list the steps of checkpoint.remote_folder, and those being copied there",
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.add_argument(
        "--watch", metavar="SECONDS", nargs="?", const=1.0, type=_positive,
        help="show saves in progress, with their ranks, write rates and stuck files: every second, "
        "or every SECONDS, until Ctrl-C",
    )  # fmt: skip


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds from 0.1 to 3600, found {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """List the steps, or watch them being written."""
    if args.watch is not None:
        if args.json or args.remote:
            raise ConfigError("--watch can't be combined with --json or --remote")
        from milepost.cli.watch import watch

        return watch(partial(run_to_watch, args.path), every_s=args.watch)
    storage, folder, entries, history = _listed(args.path)
    remote = marks.remote_of(storage, folder)
    places: dict[int, str] = {}
    if args.remote:
        if not remote:
            raise ConfigError(f"{args.path} has no known remote folder: no run has copied its steps")
        entries, places = both_places(entries, *open_storage(remote))
    ends = history.ends()
    if args.json:
        print_json([_json(entry, ends.get(entry.step)) | _where(places, entry) for entry in entries])
        return 0
    now = time.time()
    headers = ["STEP", "STATE", "HOLDS", "AGE", "SIZE", "PARAMS", "DTYPE", "LAYOUT", "METRICS", "NOTES"]
    others = {entry.step for entry in history.other_runs()}
    rows = [_row(entry, now, ends.get(entry.step), is_other=entry.step in others) for entry in entries]
    if not any(entry.metrics for entry in entries):
        column = headers.index("METRICS")
        headers, rows = [*headers[:column], *headers[column + 1 :]], [(*r[:column], *r[column + 1 :]) for r in rows]
    if places:
        headers = [headers[0], "WHERE", *headers[1:]]
        rows = [(row[0], places[entry.step], *row[1:]) for row, entry in zip(rows, entries, strict=True)]
    print_table(headers, rows, numeric=("STEP", "AGE", "SIZE", "PARAMS"))
    if remote and not args.remote:
        print_line(f"steps are copied to {remote}: --remote lists those too")
    for line in sweep.activity(storage, folder, now=now):
        print_line(line)
    return 0


def run_to_watch(path: str) -> tuple[Storage, str]:
    """Find the run at ``path``, or the folder that its first save will turn into one."""
    try:
        return open_run(path)
    except CheckpointNotFoundError:
        storage, name = open_storage(path)
        found = storage.stat(name)
        if found is not None and not found.is_folder:
            raise
        below = join(name, "checkpoint")
        return storage, below if storage.stat(below) is not None else name


def _listed(path: str) -> tuple[Storage, str, list[StepEntry], History]:
    """Find the run at ``path`` with its steps, or only the step at ``path``, with totals of Hugging Face steps."""
    storage, name = open_storage(path)
    step = step_of(name)
    if step is not None and storage.stat(name) is not None:
        folder, listed = split(name)[0], [find_step(storage, split(name)[0], step, path)]
    else:
        storage, folder = open_run(path)
        listed = []
    entries = catalog.scan(storage, folder, keep_going=True)
    return storage, folder, [_with_totals(storage, entry) for entry in listed or entries], History.of(entries)


def both_places(
    entries: list[StepEntry], remote: Storage, remote_folder: str
) -> tuple[list[StepEntry], dict[int, str]]:
    """Merge the steps of a run's two folders, with the location of each: one of them, both, or being copied."""
    there = {entry.step: _with_totals(remote, entry) for entry in catalog.scan(remote, remote_folder, keep_going=True)}
    names = {entry.name for entry in remote.list(remote_folder)}
    places = dict.fromkeys(there, "remote")
    for entry in entries:
        copy = there.get(entry.step)
        if copy is not None and (copy.is_usable or not entry.is_usable) and copy.save_id == entry.save_id:
            places[entry.step] = "both"
        else:
            is_moving = ATTEMPT_PREFIX + entry.save_id in names  # see `saving.copy_step`
            places[entry.step] = "folder, being copied" if is_moving else "folder"
    merged = there | {entry.step: entry for entry in entries}
    return [merged[step] for step in sorted(merged)], places


def _where(places: dict[int, str], entry: StepEntry) -> dict[str, str]:
    return {"where": places[entry.step]} if places else {}


def _with_totals(storage: Storage, entry: StepEntry) -> StepEntry:
    """Add totals to a step saved as Hugging Face files: they come from the files' headers, not from the manifest."""
    if entry.state != "committed" or entry.num_parameters:
        return entry
    try:
        manifest = checkpoint_record.read_manifest(storage, entry.path)
        total = model_total(described(storage, entry.path, manifest))
    except MilepostError:
        return entry  # `verify` says what is wrong with it
    return dataclasses.replace(entry, num_parameters=total.num_elements, dtype=next(iter(total.dtypes), ""))


def _json(entry: StepEntry, branch_end: int | None) -> dict[str, Any]:
    fields = dataclasses.asdict(entry)
    del fields["has_training_state"]
    metrics = {name: value if math.isfinite(value) else None for name, value in entry.metrics.items()}
    more = {"is_resumable": entry.is_resumable, "is_abandoned": branch_end is not None, "branch_end": branch_end}
    return fields | {"metrics": metrics} | more


def _row(entry: StepEntry, now: float, branch_end: int | None, *, is_other: bool) -> tuple[Any, ...]:
    notes = [text for holds, text in ((entry.pinned, "pinned"), (entry.is_link, "link")) if holds]
    if branch_end is not None:
        notes.append(f"{'of another run' if is_other else 'abandoned branch'} (ended at step {branch_end})")
    notes += [entry.reason] if entry.reason else []
    return (
        str(entry.step),
        state_text(entry.state),
        entry.kind or "-",
        format_duration(max(0.0, now - entry.created_s)) if entry.created_s else "-",
        format_nbytes(entry.nbytes),
        format_count(entry.num_parameters) if entry.num_parameters else "-",
        entry.dtype or "-",
        _layout(entry),
        ", ".join(f"{name} {value:.4g}" for name, value in entry.metrics.items()),
        "; ".join(notes),
    )


def _layout(entry: StepEntry) -> str:
    """Return ``4 ranks: fsdp 2, tp 2``; empty for an external checkpoint, which does not record it."""
    if entry.state == "external" or not entry.world_size:
        return "-"
    ranks = counted(entry.world_size, "rank")
    degrees = degrees_text(entry.layout)
    return f"{ranks}: {degrees}" if degrees and entry.world_size > 1 else ranks
