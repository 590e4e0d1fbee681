"""Entry point of the ``milepost`` command: choose the command, run it, turn errors into messages and exit statuses.

Only the chosen command's module is imported, and none imports torch, so that every command starts fast on a login node.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, cast

from milepost.errors import (
    MAX_MESSAGE_LENGTH,
    CheckpointDamagedError,
    MilepostError,
    StorageError,
    near,
    shortened,
)
from milepost.version import __version__


@dataclass(frozen=True, slots=True)
class Command:
    """A command's module, which has ``add_arguments`` and ``run``, and its line in the list of commands."""

    module: str
    summary: str


COMMANDS = {
    "ls": Command("milepost.cli.ls_cmd", "list the checkpoints of a run, or one: state, age, size"),
    "inspect": Command("milepost.cli.inspect_cmd", "show what a checkpoint holds, and where it is stored"),
    "pin": Command("milepost.cli.pin_cmd", "protect steps from being pruned"),
    "unpin": Command("milepost.cli.unpin_cmd", "unpin steps, so that they may be pruned again"),
    "verify": Command("milepost.cli.verify_cmd", "check that checkpoints and weights are undamaged"),
    "diff": Command("milepost.cli.diff_cmd", "compare two checkpoints, or weights across formats"),
    "stats": Command("milepost.cli.stats_cmd", "statistics of tensors: norm, mean, NaN, zeros"),
    "show": Command("milepost.cli.show_cmd", "print values of a tensor"),
    "report": Command("milepost.cli.report_cmd", "write a run's checkpoints as one HTML page"),
    "convert": Command("milepost.cli.convert_cmd", "convert weights: DCP, Hugging Face, .pt, torchtitan's names"),
    "export": Command("milepost.cli.export_cmd", "write the newest weights of a run for Hugging Face or as .pt"),
    "merge": Command("milepost.cli.merge_cmd", "average or merge the weights of several checkpoints, streaming"),
    "plan-resume": Command("milepost.cli.plan_resume_cmd", "show what a resume on other ranks would read, per rank"),
    "resume-test": Command("milepost.cli.resume_test_cmd", "kill a training run, resume it, compare bit for bit"),
    "sync": Command("milepost.cli.sync_cmd", "copy checkpoints to another folder or a store, and verify the copies"),
    "prune": Command("milepost.cli.prune_cmd", "delete old checkpoints by rules, and stale save attempts"),
    "completion": Command("milepost.cli.completion_cmd", "print a completion script for bash, zsh or fish"),
}

EXIT_STATUSES = """\
exit status:
  0    done, and no problem was found
  1    an unexpected error
  2    wrong usage
  3    there is no such checkpoint
  4    a checkpoint does not match its target
  5    a checkpoint is damaged
  7    the operating system refused an operation
  8    a conversion is not possible: source, sizes and target do not match
  9    a comparison found differences
  11   no problem was found, but some bytes or values can't be checked
  130  interrupted with Ctrl-C
  141  the reader of the output, such as `head`, has exited before its end
"""
NOT_CHECKED = 11


class CommandModule(Protocol):
    """The module of a command."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options, its description and its examples."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command, print the result and return the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's). Returns the exit status."""
    _make_output_bearable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] == "help":
        arguments = [*arguments[1:2], "--help"]
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        modules = {}
        if name in COMMANDS:
            modules[name] = cast("CommandModule", importlib.import_module(COMMANDS[name].module))
        args = _parse(build_parser(modules), arguments)
        status = modules[args.command].run(args)  # the parser has already exited for any other name
        sys.stdout.flush()
        return status
    except MilepostError as error:
        return _fail(error.message, error.exit_status)
    except KeyboardInterrupt:
        print("milepost: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _give_up_output()  # the reader (`head`, `less`) has exited
        return 141  # the status of a process killed by SIGPIPE
    except OSError as error:
        _give_up_output()
        what = error.strerror or str(error)
        return _fail(f"{error.filename}: {what}" if error.filename else what, StorageError.exit_status)
    except MemoryError:
        return _fail("out of memory: free some, or run this on a larger machine", StorageError.exit_status)
    except (RecursionError, UnicodeError) as error:
        # From a file's content. Readers refuse it and name the file; this catches what they missed.
        message = f"a file holds text that is not Unicode, or is nested too deeply: {error}"
        return _fail(shortened(message, MAX_MESSAGE_LENGTH), CheckpointDamagedError.exit_status)
    except Exception as error:  # a traceback does not help a user
        if os.environ.get("MILEPOST_TRACEBACK"):
            raise
        message = f"unexpected error (a bug in Milepost): {type(error).__name__}: {error}"
        advice = "please report it, with the output of MILEPOST_TRACEBACK=1"
        return _fail(f"{shortened(message, MAX_MESSAGE_LENGTH)}; {advice}", MilepostError.exit_status)


def _make_output_bearable() -> None:
    """Keep printing from failing on unencodable characters (``LC_ALL=C``) or a closed output (``>&-``)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the program ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Discard unwritable output, which Python would otherwise try to flush again at exit."""
    with contextlib.suppress(io.UnsupportedOperation):  # no file descriptor behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> int:
    from milepost.cli.render import printable_lines

    print(f"milepost: error: {printable_lines(message)}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest option or command for an unknown one."""

    given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        hints = [hint for word in self.given if (hint := self.hint(word)) not in message]
        super().error("; ".join([message, *hints]))

    def hint(self, word: str) -> str:
        """Return a hint about the unknown option ``word``; empty if it exists or is not an option."""
        option = word.partition("=")[0]
        if not option.startswith("--") or option == "--" or option in self._option_string_actions:
            return ""
        return f"there is no option {option}" + _did_you_mean(option, self._option_string_actions)


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return a suggestion of the nearest of ``choices``; empty if none is near."""
    found = near(word, choices)
    return f": did you mean {found}?" if found else ""


def _parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parse with the chosen command's parser; wrong usage exits with status 2."""
    commands = _commands_of(parser)
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    chosen = commands.get(name, parser)
    chosen.given = arguments
    if name and name not in commands:
        parser.error(f"there is no command {name}" + (_did_you_mean(name, commands) or ": `milepost help` lists all"))
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        hints = list(filter(None, map(chosen.hint, unknown)))
        chosen.error("; ".join(hints) or f"unexpected argument {unknown[0]}")
    return args


def _commands_of(parser: argparse.ArgumentParser) -> Mapping[str, Parser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return cast("Mapping[str, Parser]", action.choices)


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
            self._action_max_length += 2  # commands are indented deeper than argparse assumes


def build_parser(modules: Mapping[str, CommandModule]) -> Parser:
    """Build the parser of the command line; only commands in ``modules`` get their options."""
    parser = Parser(
        prog="milepost",
        description="Manage the checkpoints of PyTorch training runs.",
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
