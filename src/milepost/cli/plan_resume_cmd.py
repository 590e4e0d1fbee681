"""``milepost plan-resume``: predict what a resume under other degrees reads, before any GPU is requested."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from milepost.cli.paths import manifest_at
from milepost.cli.render import console, print_json, print_line, print_list, print_table
from milepost.config import PARTS
from milepost.errors import ConfigError, StateMismatchError
from milepost.loading.policy import Policy
from milepost.parallelism.degrees import SHORT_DEGREES, Degrees, degrees_text
from milepost.storage.base import counted, format_nbytes

if TYPE_CHECKING:
    from milepost.report.resume_plan import RankPlan, ResumePlan

MAX_RANKS = 16
MAX_KEYS = 20
MAX_WORLD_SIZE = 1 << 16
"""Maximum number of ranks that are planned; more are taken for a mistake."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost plan-resume``."""
    parser.description = (
        "Report what a resume would read on each rank, which keys would be missing or unexpected, and the peak memory\n"
        "of the load. Only metadata is read. Parameters are assumed to be sharded as milepost.train and torchtitan\n"
        "shard Llama and Qwen; those with other names by FSDP only."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost plan-resume outputs/checkpoint/step-500 --world-size 4\n"
        "  milepost plan-resume outputs/checkpoint/step-500 --world-size 16 --degrees tp=2,pp=2,fsdp=4\n"
        "  milepost plan-resume outputs/checkpoint/step-500 --world-size 8 --model llama3 --flavor 8B\n\n"
        "exit status: 0 the resume would succeed, 4 keys are missing or unexpected, 3 there is no checkpoint, 5 it is\n"
        "damaged, 2 wrong usage, 7 it can't be read\n"
    )
    parser.add_argument("path", metavar="STEP", help="the folder of a checkpoint")
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="number of ranks of the resumed run")
    parser.add_argument(
        "--degrees",
        default="",
        metavar="NAME=N,...",
        help=f"degrees of parallelism, of {', '.join(SHORT_DEGREES.values())}; the default is 1, and for fsdp "
        "the remaining ranks",
    )
    parser.add_argument(
        "--stages-per-rank",
        type=int,
        default=1,
        metavar="N",
        help="pipeline stages on each rank: 2 for Interleaved1F1B (default 1)",
    )
    parser.add_argument(
        "--model",
        help="compare the keys with those of this model: llama3, qwen3 or a family of `milepost convert` (mistral, "
        "...)",
    )
    parser.add_argument(
        "--flavor", help="the size of a llama3 or qwen3, for instance 8B; not needed if the step has it"
    )
    parser.add_argument(
        "--hf-assets",
        default="",
        metavar="DIR",
        help="a Hugging Face folder whose config.json gives the sizes of --model; not needed if the step has them",
    )
    for option, what in (("missing", "the step may not have"), ("unexpected", "the run may not have")):
        parser.add_argument(
            f"--allow-{option}",
            metavar="GLOB,...",
            default="",
            help=f"keys that {what} (checkpoint.allow_{option} of the run)",
        )
    parser.add_argument(
        "--exclude",
        metavar="PART,...",
        default="",
        help=f"parts not to load (checkpoint.exclude_from_loading of the run): any of {', '.join(PARTS)}",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan the resume and print the plan; returns 4 if it would be refused."""
    degrees = resolve_degrees(args.degrees, args.world_size, args.stages_per_rank)
    manifest = manifest_at(args.path)
    from milepost.report.resume_plan import plan_resume  # imports the tables of models, which --help does not need

    policy = Policy(_patterns(args.allow_missing), _patterns(args.allow_unexpected))
    plan = plan_resume(
        manifest,
        degrees,
        stages_per_rank=args.stages_per_rank,
        model=args.model,
        flavor=args.flavor,
        hf_assets=args.hf_assets,
        policy=policy,
        excluded=_parts(args.exclude),
    )
    if args.json:
        print_json({"fits": plan.fits} | _json(plan))
    else:
        saved = degrees_text(manifest.layout)
        title = f"{args.path}: {manifest.kind}, saved by {counted(manifest.world_size, 'rank')}" + (
            f" ({saved})" if saved else ""
        )
        now = degrees_text(degrees.as_dict())
        print_line(f"{title}; resumed by {degrees.world_size} ({now})")
        _print(plan)
    return 0 if plan.fits else StateMismatchError.exit_status


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parts(text: str) -> tuple[str, ...]:
    found = _patterns(text)
    unknown = [part for part in found if part not in PARTS]
    if unknown:
        raise ConfigError([f"--exclude: there is no part '{part}'; parts are {', '.join(PARTS)}" for part in unknown])
    return found


def resolve_degrees(text: str, world_size: int, stages_per_rank: int) -> Degrees:
    """Fit ``tp=2,fsdp=4`` (short names, or the trainer's) to a world. Raises ConfigError with all problems."""
    given: dict[str, int] = {}
    problems = [
        f"{option} must be at least 1, not {number}"
        for option, number in (("--world-size", world_size), ("--stages-per-rank", stages_per_rank))
        if number < 1
    ]
    if world_size > MAX_WORLD_SIZE:
        problems.append(f"--world-size must be at most {MAX_WORLD_SIZE}, not {world_size}")
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        long = next((option for option, short in SHORT_DEGREES.items() if name in (option, short, _stem(option))), "")
        if not long:
            problems.append(f"--degrees: there is no degree '{name}'; degrees are {', '.join(SHORT_DEGREES.values())}")
        elif not number.isdecimal() or int(number) < 1:
            problems.append(f"--degrees: {part}: write {name}=N with a whole number of at least 1")
        elif long in given:
            problems.append(f"--degrees: {name} is given twice")
        else:
            given[long] = int(number)
    if problems:
        raise ConfigError(problems)
    try:
        return Degrees.resolve(given, world_size)
    except ConfigError as error:
        raise ConfigError([f"--degrees: {_own_words(problem)}" for problem in error.problems]) from None


def _stem(option: str) -> str:
    return option.removesuffix("_degree")


def _own_words(problem: str) -> str:
    """Reword a problem for this command line, which has no trainer sections."""
    return problem.removeprefix("parallelism: ").removeprefix("parallelism.")


def _json(plan: ResumePlan) -> dict[str, Any]:
    described = dataclasses.asdict(plan)
    degrees = {short: described["degrees"][name] for name, short in SHORT_DEGREES.items()}
    layout = degrees | {"stages_per_rank": described.pop("stages_per_rank")}
    described = {"layout": layout} | {name: value for name, value in described.items() if name != "degrees"}
    described["ranks"] = [dataclasses.asdict(rank) | {"memory_nbytes": rank.memory_nbytes} for rank in plan.ranks]
    return described


def _print(plan: ResumePlan) -> None:
    out = console()
    out.print()
    shown = plan.ranks if len(plan.ranks) <= MAX_RANKS else plan.ranks[: MAX_RANKS - 1]
    print_table(
        ("RANK", "PP", "REPLICA", "SHARD", "TP", "TENSORS", "WANTED", "READ", "FILES", "MEMORY"),
        [_row(rank) for rank in shown],
        numeric=("RANK", "PP", "REPLICA", "SHARD", "TP", "TENSORS", "WANTED", "READ", "FILES", "MEMORY"),
    )
    if len(shown) < len(plan.ranks):
        out.print(f"  ... and {len(plan.ranks) - len(shown)} more ranks; --json lists them")
    reads = [rank.read_nbytes for rank in plan.ranks]
    memory = max(rank.memory_nbytes for rank in plan.ranks)
    out.print(
        f"\ntotal read: {format_nbytes(sum(reads))}, at most {format_nbytes(max(reads))} by one rank; "
        f"peak memory of the load: at most {format_nbytes(memory)} per rank"
    )
    for note in plan.notes:
        print_line(f"note: {note}")
    for reason in plan.refused:
        print_line(f"refused: {reason}")
    for title, keys in (
        ("missing from the checkpoint", plan.missing),
        ("unexpected: in the checkpoint but not in the run", plan.unexpected),
        ("of another shape", plan.misshapen),
        ("not read under these degrees", plan.left_out),
    ):
        print_list(title, keys, limit=MAX_KEYS)
    out.print("it fits" if plan.fits else "[bold red]mismatch[/]: a resume would be refused")


def _row(rank: RankPlan) -> tuple[str, ...]:
    place = rank.place
    return (
        str(rank.rank),
        str(place.pp),
        str(place.replica),
        str(place.shard),
        str(place.tp),
        str(rank.num_tensors),
        format_nbytes(rank.wanted_nbytes),
        format_nbytes(rank.read_nbytes),
        str(rank.num_files),
        format_nbytes(rank.memory_nbytes),
    )
