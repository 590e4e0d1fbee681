"""``milepost diff``: compare two checkpoints, or weights in other formats."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from milepost.cli.main import NOT_CHECKED
from milepost.cli.render import (
    DIFFERENT,
    console,
    page_path,
    print_json,
    print_list,
    print_table,
    progress_bar,
    write_page,
)
from milepost.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    from milepost.report.diff import DiffReport, Unmatched
    from milepost.report.differences import ValueChange

MAX_LINES = 50
MAX_CHANGES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost diff``."""
    parser.description = (
        "Compare two checkpoints and report by how much they differ: keys, dtypes, shapes, and the elements of all\n"
        "tensors whose stored bytes are not known to be the same. Each is a checkpoint folder of Milepost, torchtitan\n"
        "or stock DCP, a Hugging Face folder, a .pt/.pth or a .safetensors file. With --model the models are compared\n"
        "whatever the formats' names and order of weights."
    )
    parser.epilog = (
        "CHANGE is the norm of the difference over the norm of A. Tensors with the largest change come first.\n\n"
        "examples:\n"
        "  milepost diff outputs/checkpoint/step-500 outputs/checkpoint/step-1000\n"
        "  milepost diff outputs/checkpoint/step-500 outputs/checkpoint/step-1000 --keys 'layers.0.*' --all\n"
        "  milepost diff outputs/checkpoint/step-500 outputs/checkpoint/step-1000 --html diff.html\n"
        "  milepost diff outputs/checkpoint/step-500 model.pt --values --tolerance 1e-6\n"
        "  milepost diff outputs/checkpoint/step-500 Llama-3.2-1B --values --model llama3 --flavor 1B\n"
        "  milepost diff mistral/step-0 Mistral-7B --model mistral\n\n"
        "exit status: 0 no difference was found, 9 they differ, 3 nothing to compare, 5 one is damaged,\n"
        "2 wrong usage, 7 one can't be read, 8 one is not the model given, 11 no difference was found, but there are\n"
        "values that were not or could not be compared\n"
    )
    parser.add_argument("a", metavar="A", help="a checkpoint folder, a Hugging Face folder or a file")
    parser.add_argument("b", metavar="B", help="the one to compare it with")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--values", action="store_true", help="read and compare every element of both, even where digests match"
    )
    how.add_argument(
        "--quick", action="store_true", help="read only metadata: reports which bytes differ, not by how much"
    )
    parser.add_argument("--keys", metavar="GLOB", action="append", default=[], help="only keys that match; repeatable")
    parser.add_argument(
        "--tolerance", type=_tolerance, default=0.0, metavar="X",
        help="tensors whose elements differ by at most X count as the same (default: 0)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help=f"print every changed tensor, not {MAX_CHANGES}")
    parser.add_argument(
        "--model",
        help="compare only the models, by Milepost's names: llama3, qwen3 or a family of `milepost convert` (mistral, "
        "...); hf: by the names of transformers",
    )
    parser.add_argument(
        "--flavor", help="the size of a llama3 or qwen3, for instance 8B; not needed if A or B records it"
    )
    parser.add_argument(
        "--hf-assets",
        default="",
        metavar="DIR",
        help="a Hugging Face folder whose config.json gives the sizes of --model; not needed if A or B records them",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", type=page_path, metavar="FILE", help="also write it as one HTML page, with charts")


def _tolerance(text: str) -> float:
    value = float(text)
    if not value >= 0:  # also rejects NaN, which every difference would exceed
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Compare and print the differences; returns 9 if there are any."""
    from milepost.report.diff import diff  # imports numpy and the readers, which --help does not need

    with progress_bar("comparing") if not args.quick else contextlib.nullcontext() as progress:
        report = diff(
            args.a,
            args.b,
            values=not args.quick,
            trust_digests=not args.values,
            keys=args.keys,
            model=args.model,
            flavor=args.flavor,
            hf_assets=args.hf_assets,
            progress=progress,
        )
    if not report.num_common:
        raise CheckpointNotFoundError(
            f"{args.a} and {args.b} have no key in common: nothing was compared. To compare a model "
            "across formats give --model",
            path=args.b,
        )
    report = report.within(args.tolerance)
    if args.html:
        from milepost.report.diff_page import diff_page

        write_page(args.html, diff_page(report, now=time.time()))
    if args.json:
        print_json({"same": report.is_same} | dataclasses.asdict(report))
    else:
        _print(report, limit=None if args.all else MAX_CHANGES, quick=args.quick)
    if report.is_same and report.num_unknown:
        return NOT_CHECKED
    return 0 if report.is_same else DIFFERENT


def _print(report: DiffReport, *, limit: int | None, quick: bool) -> None:
    print_list(f"only in {report.a}", [_held(held) for held in report.only_a], limit=MAX_LINES)
    print_list(f"only in {report.b}", [_held(held) for held in report.only_b], limit=MAX_LINES)
    kinds = [f"{change.key}: {_kind(change.a)} in A, {_kind(change.b)} in B" for change in report.kinds]
    print_list("with different dtype or shape", kinds, limit=MAX_LINES)
    changes = [f"{change.key}: {change.a} in A, {change.b} in B" for change in report.objects]
    print_list("values other than tensors that differ", changes, limit=MAX_LINES)
    print_list("with different stored bytes", report.other_bytes, limit=MAX_LINES)
    if report.values:
        _print_changes(report.by_change(), limit)
    console().print(_summary(report, quick=quick), markup=False)


def _print_changes(changes: Sequence[ValueChange], limit: int | None) -> None:
    console().print(f"with different values ({len(changes)}), largest change first:")
    shown = changes[:limit]
    numbers = ("CHANGE", "MAX |A-B|", "MEAN |A-B|", "MAX RELATIVE", "COSINE", "DIFFERENT")
    rows = [
        (
            change.key,
            _percent(change.relative_norm),
            f"{change.max_abs:.3g}",
            f"{change.mean_abs:.3g}",
            f"{change.max_rel:.3g}",
            f"{change.cosine:.6f}",
            f"{change.share_different:.1%}",
            str(list(change.at)),
        )
        for change in shown
    ]
    print_table(("KEY", *numbers, "AT"), rows, numeric=numbers)
    if len(changes) > len(shown):
        rest = changes[len(shown) :]
        least, most = rest[-1].relative_norm, rest[0].relative_norm
        console().print(
            f"  ... and {len(rest)} more that changed by {_percent(least)} to {_percent(most)}; --all shows them"
        )
        _print_groups(changes)


def _print_groups(changes: Sequence[ValueChange]) -> None:
    """Print one line of changes for each part and layer."""
    groups: dict[str, list[ValueChange]] = {}
    for change in changes:
        groups.setdefault(change.group, []).append(change)
    numbers = ("TENSORS", "CHANGE", "MAX |A-B|")
    rows = []
    for name, members in groups.items():
        finite = [m.relative_norm for m in members if math.isfinite(m.relative_norm)]
        rms = math.sqrt(sum(x * x for x in finite) / len(finite)) if finite else math.nan
        largest = max(members, key=lambda m: (math.isnan(m.max_abs), m.max_abs)).max_abs
        rows.append((name, str(len(members)), _percent(rms), f"{largest:.3g}"))
    console().print("by part and layer (root mean square of the changes):")
    print_table(("GROUP", *numbers), rows, numeric=numbers)


def _percent(share: float) -> str:
    return f"{share:.3%}" if math.isfinite(share) else "NaN"


def _summary(report: DiffReport, *, quick: bool) -> str:
    same = f"the same: {report.num_same} of {report.num_common} common keys"
    if report.num_by_digest:
        same += f", {report.num_by_digest} of them by their recorded digests (--values reads the data, too)"
    if report.num_within:
        same += f", {report.num_within} of them within the tolerance"
    if not report.num_unknown:
        return same
    if quick:
        return f"{same}; the values of {report.num_unknown} were not compared: run without --quick to compare them"
    are = "is a value that is not a tensor" if report.num_unknown == 1 else "are values that are not tensors"
    return f"{same}; {report.num_unknown} {are} and could not be compared"


def _held(held: Unmatched) -> str:
    return f"{held.key}: {_kind(held)}"


def _kind(held: Unmatched) -> str:
    return f"{held.dtype} {list(held.shape)}" if held.dtype else "a value"
