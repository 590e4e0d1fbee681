"""``milepost export``: the newest weights of a run, for the world outside."""

from __future__ import annotations

import argparse

from milepost.cli.convert_cmd import add_conversion_arguments, run_conversion
from milepost.cli.paths import open_run
from milepost.errors import CheckpointNotFoundError
from milepost.run import catalog
from milepost.run.branches import History


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost export``."""
    parser.description = (
        "Write the model of a run's newest good step (or of --step) as a Hugging Face folder, a .pt file or a\n"
        "model-only checkpoint. For anything but a run, use `milepost convert`."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost export outputs/checkpoint my-model --model llama3 --flavor 1B --hf-assets Llama-3.2-1B\n"
        "  milepost export outputs/checkpoint my-model.pt --to pt --step 500 --model llama3 --flavor 1B\n\n"
        "exit status: as of `milepost convert`\n"
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a run, which holds its steps")
    parser.add_argument("destination", metavar="DST", help="a new folder, for --to pt a new file")
    parser.add_argument("--to", choices=("hf", "pt", "dcp"), default="hf", help="what to write (default hf)")
    parser.add_argument("--step", type=int, metavar="N", help="this step in place of the newest")
    add_conversion_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Find the step, convert it, print what was done."""
    return run_conversion(args, step_to_export(args.run_folder, args.step))


def step_to_export(path: str, step: int | None) -> str:
    """The path of step ``step`` of the run at ``path``, None for the newest usable one of the branch written last.

    Raises:
        CheckpointNotFoundError: there is no such step; lists those that are.
    """
    storage, folder = open_run(path)
    entries = catalog.scan(storage, folder)
    usable = [entry for entry in entries if entry.is_usable]
    # A step that is named may be damaged: every byte that is read of it is checked.
    readable = [entry for entry in entries if entry.state != "incomplete"]
    chosen = History.of(entries).newest if step is None else next((e for e in readable if e.step == step), None)
    if chosen is not None:
        return f"{storage.root}/{chosen.path}"
    steps = [entry.step for entry in usable]
    wanted = f"no usable step {step}" if step is not None else "no usable step"
    listed = f"; usable are {', '.join(map(str, steps))}" if steps else ""
    raise CheckpointNotFoundError(f"{path} holds {wanted}{listed}", path=path, available=steps)
