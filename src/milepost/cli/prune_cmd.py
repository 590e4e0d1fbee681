"""``milepost prune``: delete old checkpoints by the trainer's retention rules."""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Sequence

from milepost.cli.paths import open_run
from milepost.cli.render import console, print_json, print_table, printable
from milepost.errors import ConfigError, near
from milepost.run import catalog, retention
from milepost.run.catalog import StepEntry
from milepost.run.retention import Decision
from milepost.run.sweep import Sweep, sweep_leftovers
from milepost.storage.base import counted, format_nbytes

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|min|h|d|w)")
_UNIT_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost prune``."""
    parser.description = (
        "Delete the committed steps of a run that no rule keeps, and stale save attempts.\n"
        "These are always kept: the newest committed step, the newest one to resume from, pinned\n"
        "steps, links, steps of another run, and external, incomplete or damaged steps. Rules add up: a step is\n"
        "deleted only if none keeps it. Rules count the steps of the branch that was written last. If it has fewer\n"
        "than --keep-latest, the newest steps of abandoned branches make up the number; those within --keep-within\n"
        "are kept; the rest are deleted first. Hours and days without a step are not counted."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost prune outputs/checkpoint --keep-latest 3 --dry-run\n"
        "  milepost prune outputs/checkpoint --keep-latest 3 --keep-every 10000 --keep-within 2d\n"
        "  milepost prune outputs/checkpoint --keep-hourly 24 --keep-daily 7\n\n"
        "exit status: 0, 3 there are no checkpoints, 2 wrong usage, 7 something can't be deleted\n"
    )
    parser.add_argument("path", metavar="FOLDER", help="the folder of a run")
    parser.add_argument(
        "--keep-latest", type=int, metavar="K", help="keep the K newest committed steps (checkpoint.keep_latest_k)"
    )
    parser.add_argument(
        "--keep-every",
        type=int,
        default=0,
        metavar="N",
        help="keep steps that are multiples of N (checkpoint.keep_every_n_steps)",
    )
    parser.add_argument(
        "--keep-hourly", type=int, default=0, metavar="N", help="keep the newest step of each of the last N hours"
    )
    parser.add_argument(
        "--keep-daily", type=int, default=0, metavar="N", help="keep the newest step of each of the last N days (UTC)"
    )
    parser.add_argument(
        "--keep-best", type=int, default=0, metavar="K", help="keep the K steps with the best value of --metric"
    )
    parser.add_argument(
        "--metric", default="", metavar="NAME", help="the value that --keep-best compares, such as loss"
    )
    parser.add_argument(
        "--mode", choices=("min", "max"), default="min", help="which value of --metric is best (default: min)"
    )
    parser.add_argument(
        "--keep-within", default="0s", metavar="TIME", help="keep steps committed in the last TIME: 90min, 12h, 2d, 1w"
    )
    parser.add_argument("--dry-run", action="store_true", help="report what would be deleted, and delete nothing")
    parser.add_argument("--json", action="store_true", help="print the decisions as JSON")


def run(args: argparse.Namespace) -> int:
    """Decide, print each decision with its rule, and delete."""
    keep_within_s = _checked(args)
    storage, folder = open_run(args.path)
    now = time.time()
    entries = catalog.scan(storage, folder)
    if args.metric:
        _check_metric(args.metric, entries)
    rules = retention.Rules(
        keep_latest_k=args.keep_latest or 1,  # the newest is always kept
        keep_every_n=args.keep_every,
        keep_within_s=keep_within_s,
        keep_hourly=args.keep_hourly,
        keep_daily=args.keep_daily,
        keep_best_k=args.keep_best,
        metric=args.metric,
        mode=args.mode,
    )
    decisions = retention.plan(entries, rules, now=now)
    if not args.json:
        print_table(
            ("STEP", "SIZE", "DECISION", "REASON"),
            [(str(d.step), format_nbytes(d.nbytes), "keep" if d.keep else "delete", d.reason) for d in decisions],
            numeric=("STEP", "SIZE"),
        )
    gone = [decision for decision in decisions if not decision.keep]
    others: list[str] = []
    if not args.dry_run:
        deleted = retention.apply(storage, folder, decisions)
        others = [decision.name for decision in gone if decision.name not in deleted]
        gone = [decision for decision in gone if decision.name in deleted]
    swept = sweep_leftovers(storage, folder, now=now, dry_run=args.dry_run)
    if args.json:
        _print_json(decisions, gone, swept, dry_run=args.dry_run)
    else:
        _print(decisions, gone, swept, others, dry_run=args.dry_run)
    return 0


def _print_json(decisions: Sequence[Decision], gone: Sequence[Decision], swept: Sweep, *, dry_run: bool) -> None:
    done = {
        "dry_run": dry_run,
        "freed_nbytes": sum(decision.nbytes for decision in gone),
        "steps": [dataclasses.asdict(decision) for decision in decisions],
        "swept": swept.removed,
        "left_alone": swept.left,
    }
    print_json(done if dry_run else done | {"deleted": [decision.name for decision in gone]})


def _print(
    decisions: Sequence[Decision], gone: Sequence[Decision], swept: Sweep, others: Sequence[str], *, dry_run: bool
) -> None:
    """Print the outcome. ``others`` are steps to delete that another process deleted or pinned first."""
    freed = format_nbytes(sum(decision.nbytes for decision in gone))
    verb, removes = ("would delete", "would remove") if dry_run else ("deleted", "removed")
    extra = f"; {removes} {counted(len(swept.removed), 'stale save attempt')}" if swept.removed else ""
    console().print(f"{verb} {counted(len(gone), 'step')} of {len(decisions)}, {freed}{extra}")
    if others:
        console().print(f"not deleted, because another process deleted or pinned them meanwhile: {', '.join(others)}")
    if swept.left:
        names = printable(", ".join(swept.left))
        console().print(f"not removed, because not recognised as Milepost's: {names}", markup=False)


def _check_metric(metric: str, entries: Sequence[StepEntry]) -> None:
    """Raise ConfigError if no step has ``metric``: a misspelled one would keep none of the best steps."""
    recorded = {name for entry in entries for name in entry.metrics}
    if metric not in recorded:
        closest = near(metric, recorded)
        hint = f"; did you mean {closest}?" if closest else f"; recorded are: {', '.join(sorted(recorded)) or 'none'}"
        raise ConfigError(f"--metric {metric}: no step has this metric{hint}")


def _checked(args: argparse.Namespace) -> float:
    """Check all options; returns ``--keep-within`` in seconds."""
    problems = []
    if args.keep_latest is not None and args.keep_latest < 1:
        problems.append(f"--keep-latest must be at least 1, not {args.keep_latest}")
    for option in ("keep_every", "keep_hourly", "keep_daily", "keep_best"):
        number = getattr(args, option)
        if number < 0:
            problems.append(f"--{option.replace('_', '-')} must be 0 (disabled) or more, not {number}")
    if bool(args.keep_best) != bool(args.metric):
        problems.append("--keep-best and --metric need each other: how many steps to keep, and the metric to compare")
    span = _DURATION.fullmatch(args.keep_within)
    if span is None:
        problems.append(f"--keep-within {args.keep_within} is not a time span: write 90min, 12h, 2d or 1w")
    rules = (
        args.keep_latest,
        args.keep_every,
        args.keep_hourly,
        args.keep_daily,
        args.keep_best,
        span and float(span[1]),
    )
    if not problems and not any(rules):
        problems.append("give at least one rule that says what to keep, for instance --keep-latest 3")
    if problems or span is None:
        raise ConfigError(problems)
    return float(span[1]) * _UNIT_S[span[2]]
