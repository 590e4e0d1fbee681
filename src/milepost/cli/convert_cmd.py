"""``milepost convert``: convert weights between checkpoints, Hugging Face folders and ``.pt`` files."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator

from milepost.cli.render import print_json, print_line, progress_bar
from milepost.errors import ConfigError
from milepost.interop.names.families import CONFIG_FAMILIES
from milepost.interop.options import DTYPES, NAMES, ConvertOptions, ConvertReport
from milepost.storage.base import counted, format_nbytes

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_DTYPE_NAMES = {
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
}
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost convert``."""
    parser.description = (
        "Convert weights. The source format is detected: a checkpoint folder of Milepost, torchtitan or stock DCP (of\n"
        "a training checkpoint only the model), a Hugging Face folder, a .pt/.pth or a .safetensors file. The\n"
        "destination appears only when it is complete."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost convert Llama-3.2-1B seed/step-0 --to dcp --model llama3 --flavor 1B\n"
        "  milepost convert outputs/checkpoint/step-500 export --to hf --model llama3 --flavor 1B \\\n"
        "      --hf-assets Llama-3.2-1B --dtype bfloat16 --verify\n"
        "  milepost convert outputs/checkpoint/step-500 model.pt --to pt --model llama3 --flavor 1B\n\n"
        "exit status: 0, 2 wrong usage, 3 no such source, 5 the source is damaged, 7 no space and the like,\n"
        "8 source, sizes and target do not match\n"
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, a Hugging Face folder or a file")
    parser.add_argument("destination", metavar="DST", help="a new folder, for --to pt a new file")
    parser.add_argument("--to", choices=("dcp", "hf", "pt"), required=True, help="what to write")
    parser.add_argument(
        "--training-state",
        action="store_true",
        help="with --to dcp: also convert the optimizer's state, the schedule and the counters, so that a run "
        "resumes from the result",
    )
    add_conversion_arguments(parser)


def add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    """Options shared by ``convert`` and ``export``."""
    parser.add_argument(
        "--model",
        help="llama3 or qwen3 with a --flavor; "
        f"{', '.join(CONFIG_FAMILIES)} with the sizes of their config.json; or hf for any model of transformers (its "
        "tensors keep their names); not needed if the checkpoint records it",
    )
    parser.add_argument("--flavor", help="the model's size, for instance 8B")
    parser.add_argument(
        "--dtype",
        type=parse_dtype,
        choices=DTYPES,
        help="cast to this dtype; also fp32, bf16, fp16 (default: keep every tensor's dtype)",
    )
    parser.add_argument(
        "--hf-assets",
        default="",
        metavar="DIR",
        help="with --to hf: a Hugging Face folder to take the config, tokenizer files and split into files from; of "
        "models without --flavor it gives the sizes",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="with --to hf: maximum size of a file, such as 5GB (the default) or 512MiB",
    )
    parser.add_argument(
        "--names", choices=NAMES, default=NAMES[0], help="with --to dcp: the program whose parameter names to write"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the result back, convert it back and compare every tensor"
    )
    parser.add_argument(
        "--memory", default="256MiB", metavar="SIZE", help="memory for buffers, whatever the model's size (256MiB)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert and print the report."""
    return run_conversion(args, args.source)


def run_conversion(args: argparse.Namespace, source: str) -> int:
    """Convert ``source`` as the options say and print the report."""
    options = options_of(args)
    from milepost.interop.convert import convert  # imports numpy and the engine, which --help does not need

    with stage_bars() as progress:
        report = convert(source, args.destination, options, progress)
    return print_report(report, as_json=args.json)


def print_report(report: ConvertReport, *, as_json: bool) -> int:
    """Print the report of a conversion; returns the exit status."""
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print(report)
    return 0


def options_of(args: argparse.Namespace) -> ConvertOptions:
    """Return the conversion options from the command line's. Raises ConfigError."""
    return ConvertOptions(
        to=args.to,
        model=args.model,
        flavor=args.flavor,
        dtype=args.dtype,
        names=args.names,
        hf_assets=args.hf_assets,
        max_shard_nbytes=parse_size("--max-shard-size", args.max_shard_size) if args.max_shard_size else None,
        verify=args.verify,
        training_state=getattr(args, "training_state", False),
        budget_nbytes=parse_size("--memory", args.memory),
    )


def parse_dtype(text: str) -> str:
    """Parse a dtype by any of its usual names: ``bf16``, ``half``, ``torch.float32``."""
    name = text.strip().lower().removeprefix("torch.")
    return _DTYPE_NAMES.get(name, name)


def parse_size(option: str, text: str) -> int:
    """Parse a size such as ``5GB`` into bytes. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    nbytes = int(float(match[1]) * _UNITS[(match[2] or "b").lower()]) if match else 0
    if nbytes <= 0:
        raise ConfigError(f"{option} {text}: give a size such as 5GB or 512MiB")
    return nbytes


@contextlib.contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar for each stage."""
    with contextlib.ExitStack() as stack:
        shown: dict[str, Callable[[int, int], None]] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                stack.close()  # the previous stage's bar
                shown[stage] = stack.enter_context(progress_bar(stage))
            shown[stage](done, total)

        yield progress


def _print(report: ConvertReport) -> None:
    rate = f", {format_nbytes(int(report.written_nbytes / report.seconds))}/s" if report.seconds > 0.1 else ""
    print_line(
        f"{report.path}: {report.model} {report.flavor}, {counted(report.num_tensors, 'tensor')}, "
        f"{format_nbytes(report.written_nbytes)} in {report.seconds:.1f} s{rate}"
    )
    if report.checked_nbytes:
        print_line(f"  {format_nbytes(report.checked_nbytes)} of the source matched their digests")
    if report.verified:
        print_line("  verified: converted back, every tensor equals the source")
    for note in report.notes:
        print_line(f"  note: {note}")
