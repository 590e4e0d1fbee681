"""``milepost export``: the newest weights of a run, for the world outside."""

from __future__ import annotations

import argparse
import os
import tempfile

from milepost.cli.convert_cmd import add_conversion_arguments, run_conversion
from milepost.cli.paths import open_run
from milepost.errors import CheckpointNotFoundError, ConversionError
from milepost.run import catalog
from milepost.run.branches import History
from milepost.run.values import Unreadable, read_values
from milepost.storage import open_storage

FILES = "attached.files."
"""Keys of the files that `CheckpointManager.save(files=...)` has stored with a step."""
MAX_FILE_NBYTES = 130 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost export``."""
    parser.description = (
        "Write the model of a run's newest good step (or of --step) as a Hugging Face folder, a .pt file or a\n"
        "model-only checkpoint. For anything but a run, use `milepost convert`. Files that were saved with\n"
        "the step, such as a tokenizer, are laid beside the weights, unless --hf-assets gives others."
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
    step = step_to_export(args.run_folder, args.step)
    if args.to != "hf" or args.hf_assets:
        return run_conversion(args, step)
    with tempfile.TemporaryDirectory(prefix="milepost-") as folder:
        if _lay_out_files(step, folder):
            args.hf_assets = folder
        return run_conversion(args, step)


def _lay_out_files(step: str, folder: str) -> bool:
    """Write the files that were saved with a step, a tokenizer for instance; whether there are any.

    Raises:
        ConversionError: one of them can't be read.
    """
    storage, path = open_storage(step)
    manifest = catalog.read_manifest(storage, path)
    keys = {key: key.removeprefix(FILES) for key in manifest.objects if key.startswith(FILES)}
    values = read_values(storage, path, manifest, keys, max_nbytes=MAX_FILE_NBYTES)
    for key, name in keys.items():
        value = values[key]
        if not isinstance(value, bytes) or os.path.basename(name) != name:
            reason = value.reason if isinstance(value, Unreadable) else "it is no file"
            raise ConversionError(f"{step}: '{key}' can't be laid beside the weights: {reason}; give --hf-assets")
        with open(os.path.join(folder, name), "wb") as file:
            file.write(value)
    return bool(keys)


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
