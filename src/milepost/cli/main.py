"""Entry point of the ``milepost`` command: choose the command, run it, turn errors into messages and exit statuses.

Only the chosen command's module is imported, and none of them imports torch, so that every command starts at once on
a login node.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from milepost.errors import MilepostError, StorageError
from milepost.version import __version__


@dataclass(frozen=True, slots=True)
class Command:
    """A command's module, which has ``add_arguments`` and ``run``, and its line in the list of commands."""

    module: str
    summary: str


COMMANDS = {
    "ls": Command("milepost.cli.ls_cmd", "list the checkpoints of a run: state, age, size"),
    "inspect": Command("milepost.cli.inspect_cmd", "show what a checkpoint holds, and where it is stored"),
    "pin": Command("milepost.cli.pin_cmd", "keep steps from ever being pruned"),
    "unpin": Command("milepost.cli.unpin_cmd", "let the rules decide about steps again"),
    "verify": Command("milepost.cli.verify_cmd", "check that checkpoints are what was saved"),
    "diff": Command("milepost.cli.diff_cmd", "compare two checkpoints, or weights across formats"),
    "convert": Command("milepost.cli.convert_cmd", "convert weights: DCP, Hugging Face, .pt, torchtitan's names"),
    "export": Command("milepost.cli.export_cmd", "write the newest weights of a run for Hugging Face or as .pt"),
    "plan-resume": Command("milepost.cli.plan_resume_cmd", "say what a resume on a layout would read, rank by rank"),
    "resume-test": Command("milepost.cli.resume_test_cmd", "kill a training run, resume it, compare bit for bit"),
    "prune": Command("milepost.cli.prune_cmd", "delete old checkpoints by rules, and the leftovers of dead saves"),
    "completion": Command("milepost.cli.completion_cmd", "print a completion script for bash, zsh or fish"),
}

EXIT_STATUSES = """\
exit status:
  0    done, and nothing is wrong
  1    an unforeseen error
  2    wrong usage
  3    there is no such checkpoint
  4    a checkpoint does not fit what it would be loaded into
  5    a checkpoint is damaged
  7    the operating system refused an operation
  8    a conversion can't be made: source, sizes and target do not fit
  9    what was compared differs
  130  interrupted with Ctrl-C
"""


class CommandModule(Protocol):
    """What the module of a command must offer."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options, its description and its examples."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it, print the result, and give the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (that of the process by default). Returns the exit status."""
    _make_output_bearable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        modules = {}
        if name in COMMANDS:
            modules[name] = cast("CommandModule", importlib.import_module(COMMANDS[name].module))
        args = build_parser(modules).parse_args(arguments)
        status = modules[args.command].run(args)  # the parser has ended the program for any other name
        sys.stdout.flush()
        return status
    except MilepostError as error:
        _complain(error.message)
        return error.exit_status
    except KeyboardInterrupt:
        print("milepost: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _give_up_output()  # the reader (`head`, `less`) has gone
        return 141  # as if ended by SIGPIPE
    except OSError as error:
        _give_up_output()
        what = error.strerror or str(error)
        _complain(f"{error.filename}: {what}" if error.filename else what)
        return StorageError.exit_status


def _make_output_bearable() -> None:
    """Nothing that is printed may fail for want of a character (``LC_ALL=C``) or of an output (``>&-``)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the program ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Python must not meet again at exit what could not be written."""
    with contextlib.suppress(io.UnsupportedOperation):  # not one of the operating system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> None:
    from milepost.cli.render import printable

    print(f"milepost: error: {printable(message)}", file=sys.stderr)


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs to the width of the terminal, but not those with indented lines: examples and lists."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.rstrip("\n").split("\n\n")
        return "\n\n".join(
            paragraph if "\n " in paragraph else textwrap.fill(" ".join(paragraph.split()), width)
            for paragraph in paragraphs
        )

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2  # commands stand further in than argparse reckons with


def build_parser(modules: Mapping[str, CommandModule]) -> argparse.ArgumentParser:
    """The parser of the whole command line; of the commands only those of ``modules`` have their options."""
    parser = argparse.ArgumentParser(
        prog="milepost",
        description="Look after the checkpoints of PyTorch training runs.",
        epilog=EXIT_STATUSES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"milepost {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for known, command in COMMANDS.items():
        sub = commands.add_parser(known, help=command.summary, formatter_class=HelpFormatter, allow_abbrev=False)
        if known in modules:
            modules[known].add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
