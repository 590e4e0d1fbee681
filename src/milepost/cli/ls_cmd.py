"""``milepost ls``: what checkpoints a run has."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

from milepost import catalog
from milepost.catalog import StepEntry
from milepost.cli.render import print_json, print_table, state_text
from milepost.errors import CheckpointNotFoundError
from milepost.storage import open_storage
from milepost.storage.base import format_duration, format_nbytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost ls``."""
    parser.description = "List the checkpoints of a run, oldest first. Only metadata is read."
    parser.epilog = (
        "states:\n"
        "  committed  whole, as far as metadata and sizes tell\n"
        "  foreign    whole, written by torchtitan or torch.distributed.checkpoint\n"
        "  partial    never finished: no reader uses it\n"
        "  damaged    finished once, and no longer what it was\n\n"
        "examples:\n"
        "  milepost ls outputs/checkpoint\n"
        "  milepost ls outputs --json\n\n"
        "exit status: 0, 3 there are no checkpoints, 2 wrong usage, 7 it can't be read\n"
    )
    parser.add_argument(
        "path", metavar="FOLDER", nargs="?", default=".", help="the folder of a run (default: this one)"
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    """List the steps."""
    storage, name = open_storage(args.path)
    folder = catalog.find_run(storage, name)
    if folder is None:
        raise CheckpointNotFoundError(
            f"{args.path} holds no step-<N> folder, and neither does {args.path}/checkpoint", path=args.path
        )
    entries = catalog.scan(storage, folder)
    if args.json:
        print_json([_json(entry) for entry in entries])
    else:
        print_table(
            ("STEP", "STATE", "HOLDS", "AGE", "SIZE", "RANKS", "NOTES"),
            [_row(entry, time.time()) for entry in entries],
            numeric=("STEP", "AGE", "SIZE", "RANKS"),
        )
    return 0


def _json(entry: StepEntry) -> dict[str, Any]:
    return dataclasses.asdict(entry)


def _row(entry: StepEntry, now: float) -> tuple[Any, ...]:
    notes = [text for holds, text in ((entry.pinned, "pinned"), (entry.is_link, "link")) if holds]
    notes += [entry.reason] if entry.reason else []
    return (
        str(entry.step),
        state_text(entry.state),
        entry.kind or "-",
        format_duration(max(0.0, now - entry.created_s)) if entry.created_s else "-",
        format_nbytes(entry.nbytes),
        str(entry.world_size) if entry.state == "committed" else "-",
        "; ".join(notes),
    )
