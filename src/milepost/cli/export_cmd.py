"""``milepost export``: write the newest weights of a run for other programs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

from milepost.cli.convert_cmd import add_conversion_arguments, options_of, print_report, run_conversion, stage_bars
from milepost.cli.paths import open_run
from milepost.cli.render import print_line, printable
from milepost.errors import CheckpointNotFoundError, ConfigError, ConversionError
from milepost.format.huggingface import ADAPTER_CONFIG_NAME, MAX_CONFIG_NBYTES, parse_object
from milepost.run import catalog, checkpoint_record
from milepost.run.branches import History
from milepost.run.catalog import StepEntry
from milepost.run.values import Unreadable, read_values
from milepost.storage import open_storage
from milepost.storage.links import read_linked

FILES = "attached.files."
"""Prefix of the keys of files stored with a step by `CheckpointManager.save(files=...)`."""
MAX_FILE_NBYTES = 130 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost export``."""
    parser.description = (
        "Write the model of a run's newest usable step (or of --step) as a Hugging Face folder, a .pt file or a\n"
        "model-only checkpoint. For anything but a run, use `milepost convert`. Files saved with\n"
        "the step, such as a tokenizer, are written beside the weights, unless --hf-assets gives others."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost export outputs/checkpoint my-model --model llama3 --flavor 1B --hf-assets Llama-3.2-1B\n"
        "  milepost export outputs/checkpoint my-model.pt --to pt --step 500 --model llama3 --flavor 1B\n"
        "  milepost export outputs/lora my-adapter --adapter\n"
        "  milepost export outputs/lora my-tuned-model --merge-adapter --base Llama-3.2-1B\n\n"
        "exit status: as for `milepost convert`\n"
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a run")
    parser.add_argument("destination", metavar="DST", help="a new folder, for --to pt a new file")
    parser.add_argument("--to", choices=("hf", "pt", "dcp"), default="hf", help="what to write (default hf)")
    parser.add_argument("--step", type=int, metavar="N", help="this step instead of the newest")
    parser.add_argument("--adapter", action="store_true", help="write only the step's PEFT adapter, as PEFT does")
    parser.add_argument(
        "--merge-adapter", action="store_true", help="write the base model with the step's LoRA adapter merged in"
    )
    parser.add_argument(
        "--adapter-name", default="", metavar="NAME", help="the adapter to write, where a step has several"
    )
    parser.add_argument(
        "--base", default="", metavar="DIR",
        help="with --merge-adapter: the base model's Hugging Face folder (default: the base is in the step)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter-config", default="", metavar="FILE", help="the adapter_config.json to use, where the step has none"
    )
    add_conversion_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Find the step, convert it and print the report."""
    _check_adapter_options(args)
    step = step_to_export(args.run_folder, args.step)
    if not args.json:
        print_line(f"exporting {step}")
    if args.adapter or args.merge_adapter:
        return _export_adapter(args, step)
    if args.to != "hf" or args.hf_assets:
        return run_conversion(args, step)
    with tempfile.TemporaryDirectory(prefix="milepost-") as folder:
        if _lay_out_files(step, folder):
            args.hf_assets = folder
        return run_conversion(args, step)


def _check_adapter_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for contradictory options."""
    problems = []
    if args.adapter and args.merge_adapter:
        problems.append("--adapter and --merge-adapter: choose one")
    if args.base and not args.merge_adapter:
        problems.append("--base is for --merge-adapter only")
    if (args.adapter_name or args.adapter_config) and not (args.adapter or args.merge_adapter):
        problems.append("--adapter-name and --adapter-config are for --adapter and --merge-adapter only")
    if args.to != "hf" and (args.adapter or args.merge_adapter):
        problems.append(f"--to {args.to}: adapters are written for Hugging Face")
    if problems:
        raise ConfigError(problems)


def _export_adapter(args: argparse.Namespace, step: str) -> int:
    options = options_of(args)
    config = _adapter_config(args, step)
    from milepost.interop.adapters import export_adapter, export_merged  # with numpy and the engine

    with stage_bars() as progress:
        if args.adapter:
            report = export_adapter(step, args.destination, config, args.adapter_name, options)
        else:
            report = export_merged(
                step, args.destination, config, args.adapter_name, args.base, options, progress=progress
            )
    return print_report(report, as_json=args.json)


def _adapter_config(args: argparse.Namespace, step: str) -> dict[str, Any]:
    """Return the configuration saved with the step, or that of ``--adapter-config``."""
    if args.adapter_config:
        storage, name = open_storage(args.adapter_config)
        return parse_object(read_linked(storage, name, MAX_CONFIG_NBYTES), args.adapter_config)
    storage, path = open_storage(step)
    manifest = checkpoint_record.read_manifest(storage, path)
    names = [f"adapter_config.{args.adapter_name}.json", ADAPTER_CONFIG_NAME]
    key = next((FILES + name for name in names if FILES + name in manifest.objects), None)
    values = read_values(storage, path, manifest, [key], max_nbytes=MAX_FILE_NBYTES) if key is not None else {}
    content = values[key] if key is not None else None
    if not isinstance(content, bytes):
        raise ConversionError(
            f"{step} holds no {ADAPTER_CONFIG_NAME}: give --adapter-config, or --adapter-name if it has several "
            "adapters (a CheckpointManager stores it with each step of a model that has adapters)",
            path=step,
        )
    return parse_object(content, f"{step}: {key}")


def _lay_out_files(step: str, folder: str) -> bool:
    """Write the files saved with a step, such as a tokenizer; returns True if there are any.

    Raises:
        ConversionError: one of them can't be read.
    """
    storage, path = open_storage(step)
    manifest = checkpoint_record.read_manifest(storage, path)
    keys = {key: key.removeprefix(FILES) for key in manifest.objects if key.startswith(FILES)}
    keys = {key: name for key, name in keys.items() if not name.startswith("adapter_config.")}  # of no whole model
    values = read_values(storage, path, manifest, keys, max_nbytes=MAX_FILE_NBYTES)
    for key, name in keys.items():
        value = values[key]
        if not isinstance(value, bytes) or os.path.basename(name) != name:
            reason = value.reason if isinstance(value, Unreadable) else "it is not a file"
            raise ConversionError(f"{step}: '{key}' can't be written beside the weights: {reason}; give --hf-assets")
        with open(os.path.join(folder, name), "wb") as file:
            file.write(value)
    return bool(keys)


def _report_passed_over(history: History, chosen: StepEntry) -> None:
    newer = history.current[history.current.index(chosen) + 1 :]
    for entry in newer:
        reason = f" ({entry.reason})" if entry.reason else ""
        print(
            f"milepost: warning: exporting {chosen.name}: {entry.name} is {entry.state}{printable(reason)}",
            file=sys.stderr,
        )


def step_to_export(path: str, step: int | None) -> str:
    """Return the path of step ``step`` of the run at ``path``; None: the newest usable step of the latest branch.

    Raises:
        CheckpointNotFoundError: there is no such step; lists the existing ones.
    """
    storage, folder = open_run(path)
    entries = catalog.scan(storage, folder)
    usable = [entry for entry in entries if entry.is_usable]
    # A step given by number may be damaged: every byte that is read from it is checked.
    readable = [entry for entry in entries if entry.state != "incomplete"]
    history = History.of(entries)
    chosen = history.newest if step is None else next((e for e in readable if e.step == step), None)
    if chosen is not None:
        if step is None:
            _report_passed_over(history, chosen)
        return f"{storage.root}/{chosen.path}"
    steps = [entry.step for entry in usable]
    wanted = f"no usable step {step}" if step is not None else "no usable step"
    listed = f"; usable are {', '.join(map(str, steps))}" if steps else ""
    raise CheckpointNotFoundError(f"{path} holds {wanted}{listed}", path=path, available=steps)
