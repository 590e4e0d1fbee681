"""``milepost diff``: in what two checkpoints, or the weights in other formats, differ."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from milepost.cli.render import console, print_json, print_table, printable, progress_bar
from milepost.errors import listed

if TYPE_CHECKING:
    from milepost.report.diff import DiffReport, Held

DIFFERENT = 9
"""Exit status when the two differ."""
MAX_LINES = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost diff``."""
    parser.description = (
        "Compare what two places hold: keys, dtypes and shapes, and with --values every element. Each is a checkpoint\n"
        "folder of Milepost, torchtitan or stock DCP, a Hugging Face folder, a .pt/.pth or a .safetensors file. With\n"
        "--model and --flavor the models are compared whatever names and order of weights the formats have."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost diff outputs/checkpoint/step-500 outputs/checkpoint/step-1000\n"
        "  milepost diff outputs/checkpoint/step-500 model.pt --values\n"
        "  milepost diff outputs/checkpoint/step-500 Llama-3.2-1B --values --model llama3 --flavor 1B\n\n"
        "exit status: 0 no difference was found, 9 they differ, 3 there is nothing to compare, 5 one is damaged,\n"
        "2 wrong usage, 7 one can't be read, 8 one is not the model given\n"
    )
    parser.add_argument("a", metavar="A", help="a checkpoint folder, a Hugging Face folder or a file")
    parser.add_argument("b", metavar="B", help="what to compare it with")
    parser.add_argument(
        "--values", action="store_true", help="read both whole and compare element by element, checking digests"
    )
    parser.add_argument("--model", help="llama3 or qwen3: compare the models alone, by Milepost's names")
    parser.add_argument("--flavor", help="the model's size, for instance 8B; goes with --model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare, print what differs; 9 if anything does."""
    from milepost.report.diff import diff  # with numpy and the readers, which --help can do without

    with progress_bar("comparing") if args.values else contextlib.nullcontext() as progress:
        report = diff(args.a, args.b, values=args.values, model=args.model, flavor=args.flavor, progress=progress)
    if args.json:
        print_json({"same": report.is_same} | dataclasses.asdict(report))
    else:
        _print(report, compared_values=args.values)
    return 0 if report.is_same else DIFFERENT


def _print(report: DiffReport, *, compared_values: bool) -> None:
    _print_list(f"only in {report.a}", [_held(held) for held in report.only_a])
    _print_list(f"only in {report.b}", [_held(held) for held in report.only_b])
    kinds = [f"{change.key}: {_kind(change.a)} in A, {_kind(change.b)} in B" for change in report.kinds]
    _print_list("of another dtype or shape", kinds)
    _print_list("stored with other bytes", report.other_bytes)
    if report.values:
        console().print(f"with other values ({len(report.values)}):")
        rows = [
            (
                change.key,
                str(change.num_different),
                str(change.num_elements),
                f"{change.max_abs:.3g}",
                f"{change.max_rel:.3g}",
                str(list(change.at)),
            )
            for change in sorted(report.values, key=lambda change: -change.max_abs)[:MAX_LINES]
        ]
        print_table(
            ("KEY", "DIFFERENT", "OF", "MAX |A-B|", "MAX RELATIVE", "AT"),
            rows,
            numeric=("DIFFERENT", "OF", "MAX |A-B|", "MAX RELATIVE"),
        )
        if len(report.values) > MAX_LINES:
            console().print(f"  ... and {len(report.values) - MAX_LINES} more; --json lists them")
    console().print(_summary(report, compared_values=compared_values), markup=False)


def _summary(report: DiffReport, *, compared_values: bool) -> str:
    different = {change.key for change in report.kinds} | {change.key for change in report.values}
    num_common = report.num_same + report.num_unknown + len(different | set(report.other_bytes))
    if not num_common:
        return "no key is in both; to compare a model across formats give --model and --flavor"
    same = f"{report.num_same} of {num_common} common keys are the same"
    if not report.num_unknown:
        return same
    if compared_values:
        return f"{same}; of {report.num_unknown} values that are no tensors nothing is known"
    return f"{same}, {report.num_unknown} are the same but for values; compare these with --values"


def _print_list(title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    out = console()
    out.print(printable(f"{title} ({len(lines)}):"), markup=False)
    for line in listed(lines, MAX_LINES, hint="; --json lists them"):
        out.print(f"  {printable(line)}", markup=False)


def _held(held: Held) -> str:
    return f"{held.key}: {_kind(held)}"


def _kind(held: Held) -> str:
    return f"{held.dtype} {list(held.shape)}" if held.dtype else "a value"
