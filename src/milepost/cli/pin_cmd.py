"""``milepost pin``: protect steps from being pruned."""

from __future__ import annotations

import argparse

from milepost.cli.paths import find_step, locate_step
from milepost.cli.render import print_json, print_line
from milepost.run import marks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost pin``."""
    parser.description = (
        "Pin steps: neither the trainer nor `milepost prune` deletes them, until `milepost unpin`. A pin is an empty\n"
        "file .pinned-step-<N> beside the step."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost pin outputs/checkpoint/step-500\n"
        "  milepost pin outputs/checkpoint/step-500 outputs/checkpoint/step-1000\n\n"
        "exit status: 0, 3 there is no such step, 2 wrong usage, 7 the folder can't be written\n"
    )
    parser.add_argument("steps", metavar="STEP", nargs="+", help="the folder of a step")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    """Pin the steps, after checking that all of them exist."""
    found = []
    for path in args.steps:
        storage, folder, step = locate_step(path)
        found.append((path, storage, find_step(storage, folder, step, path), folder))
    for path, storage, entry, folder in found:
        marks.pin(storage, folder, entry.step)
        if not args.json:
            was = " already" if entry.pinned else ""
            print_line(f"{path} is{was} pinned: neither the trainer nor `milepost prune` will delete it")
    if args.json:
        print_json([{"path": path, "step": entry.step, "was_pinned": entry.pinned} for path, _, entry, _ in found])
    return 0
