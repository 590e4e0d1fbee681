"""``milepost unpin``: let retention delete steps again."""

from __future__ import annotations

import argparse

from milepost.cli.paths import locate_step
from milepost.cli.render import print_json, print_line
from milepost.errors import CheckpointNotFoundError
from milepost.run import marks
from milepost.run.step_names import PINNED_PREFIX, step_name
from milepost.storage.base import join


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost unpin``."""
    parser.description = "Unpin steps: the next pruning may delete them."
    parser.epilog = (
        "examples:\n"
        "  milepost unpin outputs/checkpoint/step-500\n\n"
        "exit status: 0, 3 a step is not pinned, 2 wrong usage, 7 the folder can't be written\n"
    )
    parser.add_argument("steps", metavar="STEP", nargs="+", help="the folder of a pinned step")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    """Unpin the steps, after checking that all of them are pinned."""
    found = []
    for path in args.steps:
        storage, folder, step = locate_step(path)
        if storage.stat(join(folder, PINNED_PREFIX + step_name(step))) is None:
            raise CheckpointNotFoundError(f"{path} is not pinned; `milepost ls` shows which steps are", path=path)
        found.append((path, storage, folder, step))
    for path, storage, folder, step in found:
        marks.unpin(storage, folder, step)
        if not args.json:
            print_line(f"{path} is no longer pinned")
    if args.json:
        print_json([{"path": path, "step": step} for path, _, _, step in found])
    return 0
