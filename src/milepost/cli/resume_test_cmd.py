"""``milepost resume-test``: kill a training run, resume it, and compare with a run that was not killed."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from milepost.cli.render import DIFFERENT, console, print_json, print_table
from milepost.errors import ConfigError

if TYPE_CHECKING:
    from milepost.report.resume_test import Resumed, ResumeTestReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost resume-test``."""
    parser.description = (
        "Prove for a model and a configuration that a killed run resumes exactly. The trainer\n"
        "runs to the end; runs again and gets SIGKILL on every rank; and is resumed on each layout. On the layout\n"
        "that saved, the last checkpoint must be the same bit for bit; on others, the losses must be, up to the order\n"
        "of sums. Needs torch, and the time of three short runs."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost resume-test configs/debug_cpu.toml\n"
        "  milepost resume-test configs/debug_cpu.toml --steps 8 --kill-at 5 --layouts fsdp2,tp2\n"
        "  milepost resume-test my.toml --layouts fsdp2xtp2,fsdp4 --set training.local_batch_size=1\n\n"
        "exit status: 0 it resumes exactly, 9 it does not, 1 a run failed, 2 wrong usage or configuration,\n"
        "3 or 5 the killed run left no undamaged checkpoint\n"
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the trainer")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="steps of each run (default 6)")
    parser.add_argument(
        "--kill-at", type=int, metavar="M", help="kill the run after step M; step M-1 is saved (default: half)"
    )
    parser.add_argument(
        "--layouts",
        default="",
        metavar="A,B,...",
        help="A is trained on and killed, and the run is resumed on each: degrees such as fsdp2xtp2, or a number of "
        "ranks (default: NGPU or 2 ranks, as the file says)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="X",
        help="largest relative difference of the loss on another layout (default 1e-3)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="set an option of the trainer; repeatable"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the runs in this new folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the test in a temporary folder (or ``--folder``) and print the report."""
    kill_at = args.kill_at if args.kill_at is not None else max(2, args.steps // 2 + 1)
    _check(args, kill_at)
    from milepost.report.resume_test import (  # imports numpy, for the comparison
        ResumeTestSettings,
        parse_layouts,
        resume_test,
    )

    settings = ResumeTestSettings(
        config_file=os.path.abspath(args.config),
        layouts=parse_layouts(args.layouts, int(os.environ.get("NGPU", "2"))),
        num_steps=args.steps,
        kill_at=kill_at,
        tolerance=args.tolerance,
        extra=tuple(f"--{setting}" for setting in args.set),
    )
    folder = args.folder or Path(tempfile.mkdtemp(prefix="milepost-resume-test-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        report = resume_test(settings, folder.resolve(), _print_stage)
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print_json({"passed": report.passed} | dataclasses.asdict(report))
    else:
        _print(report)
    return 0 if report.passed else DIFFERENT


def _check(args: argparse.Namespace, kill_at: int) -> None:
    problems = []
    if args.steps < 3:
        problems.append(f"--steps must be at least 3 (one to save, one to be killed at, one more), not {args.steps}")
    elif not 2 <= kill_at < args.steps:
        problems.append(f"--kill-at must be from 2 to {args.steps - 1} (--steps is {args.steps}), not {kill_at}")
    if args.tolerance < 0:
        problems.append(f"--tolerance must be 0 or more, not {args.tolerance:g}")
    if args.folder is not None and args.folder.exists() and any(args.folder.iterdir()):
        problems.append(f"--folder {args.folder} must be new or empty")
    problems += [
        f"--set {setting}: write it as training.seq_len=128"
        for setting in args.set
        if "=" not in setting or setting.startswith("-")
    ]
    if not os.path.isfile(args.config):
        problems.append(f"there is no file {args.config}")
    if problems:
        raise ConfigError(problems)


def _print_stage(text: str) -> None:
    print(f"milepost: {text}", file=sys.stderr, flush=True)


def _print(report: ResumeTestReport) -> None:
    out = console()
    out.print(
        f"killed after step {report.killed_after} of {report.num_steps}; step {report.committed_step} was committed, "
        "and every byte of it is verified"
    )
    print_table(
        ("LAYOUT", "RESUMED FROM", "LAST LOSS", "LOSS DIFFERENCE", "RESULT"),
        [
            (one.layout, f"step {one.resumed_from}", f"{one.loss:.4f}", f"{one.loss_difference:.1e}", _result(one))
            for one in report.resumed
        ],
        numeric=("LAST LOSS", "LOSS DIFFERENCE"),
    )
    verdict = "[green]passed[/]" if report.passed else "[bold red]failed[/]"
    out.print(f"{verdict}: uninterrupted, the loss of step {report.num_steps} is {report.loss:.4f}")


def _result(one: Resumed) -> str:
    if one.is_same_layout:
        if one.passed:
            return f"all {one.num_same_keys} keys of the last checkpoint are identical bit for bit"
        some = ", ".join(one.differs_in[:3]) or "the losses"
        return f"differs in {len(one.differs_in)} keys: {some}"
    return f"{'the same' if one.passed else 'not the same'} up to the order of sums (largest element {one.max_abs:.1e})"
