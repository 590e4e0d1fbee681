"""``milepost merge``: merge weights of one model: the last steps of a run, or variants of a model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from milepost.cli.convert_cmd import parse_dtype, parse_size, stage_bars
from milepost.cli.paths import open_run
from milepost.cli.render import print_json, print_line
from milepost.errors import CheckpointNotFoundError, ConfigError
from milepost.interop.merging.options import DEFAULT_DECAY, DEFAULT_DENSITY, METHODS, MergeOptions, MergeReport
from milepost.interop.options import DTYPES
from milepost.run import catalog
from milepost.run.branches import History
from milepost.storage.base import counted, format_nbytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost merge``."""
    parser.description = (
        "Merge the weights of several sources that hold the same tensors: steps of a run, or anything that\n"
        "`milepost convert` reads. Tensors stream through fixed memory, whatever the model's size. The result is a\n"
        "Hugging Face folder if the first source (or --base) is one, a .pt file if it is named so, else a checkpoint.\n"
        "It appears only after it was read back and every value equals the computed one."
    )
    parser.epilog = (
        "methods:\n"
        "  mean             mean of all, or weighted mean: --weights are divided by their sum\n"
        "  linear           sum of all, each multiplied by its weight\n"
        "  ema              exponential moving average of the sources, oldest first, by --decay\n"
        "  slerp            point on the arc between two; --weights 1,3 is three quarters of the way\n"
        "  task-arithmetic  --base plus the weighted differences of the sources from it\n"
        "  ties             the same, with small differences trimmed and one sign elected per element\n\n"
        "examples:\n"
        "  milepost merge outputs/checkpoint --last 3 --to averaged\n"
        "  milepost merge outputs/checkpoint/step-20 outputs/checkpoint/step-500 --to averaged.pt --weights 1,3\n"
        "  milepost merge Llama-3.2-1B tuned/out/epoch_0 --to merged --method slerp --dtype bfloat16\n"
        "  milepost merge tuned/out/epoch_0 --base Llama-3.2-1B --to merged --method ties --density 0.3\n\n"
        "exit status: 0, 2 wrong usage, 3 no such source, 5 a source is damaged, 7 no space and the like,\n"
        "8 the sources do not hold the same tensors\n"
    )
    parser.add_argument(
        "sources", metavar="SRC", nargs="+", help="a step, a Hugging Face folder or a file; with --last, a run"
    )
    parser.add_argument("--to", required=True, metavar="PATH", help="a new folder, or a new .pt file")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="how to merge (default mean)")
    parser.add_argument("--weights", metavar="W,W,...", help="one number for each source (default: all 1)")
    parser.add_argument(
        "--decay",
        type=float,
        metavar="D",
        help=f"ema: share of the average that is kept at each source ({DEFAULT_DECAY:g})",
    )
    parser.add_argument(
        "--base", default="", metavar="DIR", help="task-arithmetic, ties: the model that the sources derive from"
    )
    parser.add_argument(
        "--density", type=float, metavar="D", help=f"ties: share of each difference to keep ({DEFAULT_DENSITY:g})"
    )
    parser.add_argument("--scale", type=float, metavar="X", help="task-arithmetic, ties: factor of the difference (1)")
    parser.add_argument(
        "--last", type=int, metavar="N", help="for each source that is a run, merge its N newest usable steps"
    )
    parser.add_argument(
        "--dtype", type=parse_dtype, choices=DTYPES, help="cast to this dtype (default: that of the first source)"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="size of Hugging Face files, such as 5GB or 512MiB")
    parser.add_argument(
        "--memory", default="256MiB", metavar="SIZE", help="memory for buffers, whatever the model's size (256MiB)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Merge and print the report."""
    options = MergeOptions(
        method=args.method,
        weights=_weights(args.weights) if args.weights is not None else (),
        decay=args.decay,
        base=args.base,
        density=args.density,
        scale=args.scale,
        dtype=args.dtype,
        max_shard_nbytes=parse_size("--max-shard-size", args.max_shard_size) if args.max_shard_size else None,
        budget_nbytes=parse_size("--memory", args.memory),
    )
    sources = args.sources if args.last is None else [s for path in args.sources for s in _last(path, args.last)]
    options.check(len(sources))
    from milepost.interop.merging.merge import merge  # imports numpy and the engine, which --help does not need

    with stage_bars() as progress:
        report = merge(sources, args.to, options, progress)
    if args.json:
        print_json(dataclasses.asdict(report))
    else:
        _print(report)
    return 0


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--weights {text}: give one number for each source, such as 0.5,0.3,0.2") from None


def _last(path: str, count: int) -> Sequence[str]:
    """Return the paths of the newest ``count`` usable steps of a run, oldest first.

    Raises:
        CheckpointNotFoundError: it is not a run, or has fewer.
    """
    if count < 1:
        raise ConfigError(f"--last must be at least 1, not {count}")
    storage, folder = open_run(path)
    usable = [entry for entry in History.of(catalog.scan(storage, folder)).current if entry.is_usable]
    if len(usable) < count:
        steps = [entry.step for entry in usable]
        raise CheckpointNotFoundError(
            f"{path} has {counted(len(usable), 'usable step')}, not {count}"
            + (f": {', '.join(map(str, steps))}" if steps else ""),
            path=path,
            available=steps,
        )
    return [f"{storage.root}/{entry.path}" for entry in usable[-count:]]


def _print(report: MergeReport) -> None:
    rate = f", {format_nbytes(int(report.written_nbytes / report.seconds))}/s" if report.seconds > 0.1 else ""
    size = f"{counted(report.num_tensors, 'tensor')}, {format_nbytes(report.written_nbytes)}"
    what = f"{report.method} of {counted(len(report.weights) or len(report.sources), 'source')}"
    print_line(f"{report.path}: {what}, {size} in {report.seconds:.1f} s{rate}")
    for number, source in enumerate(report.sources):
        print_line(f"  {source}{_share(report, number)}")
    if report.checked_nbytes:
        print_line(f"  {format_nbytes(report.checked_nbytes)} of the sources matched their digests")
    print_line("  verified: read back, every value equals the computed one")
    for note in report.notes:
        print_line(f"  note: {note}")


def _share(report: MergeReport, number: int) -> str:
    """Return the weight of a source as text, or that it is the base."""
    skipped = len(report.sources) - len(report.weights) if report.weights else 0
    if number < skipped:
        return " (base)"
    return f" x {report.weights[number - skipped]:g}" if report.weights else ""
