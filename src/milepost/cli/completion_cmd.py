"""``milepost completion``: a script with which a shell completes commands, options and paths."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import cast

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost completion``."""
    parser.description = "Print a script that completes commands, options and paths in a shell."
    parser.epilog = (
        "examples:\n"
        "  milepost completion bash > ~/.local/share/bash-completion/completions/milepost\n"
        "  milepost completion zsh > ~/.zfunc/_milepost     # with ~/.zfunc in $fpath, before compinit\n"
        "  milepost completion fish > ~/.config/fish/completions/milepost.fish\n\n"
        "exit status: 0, 2 wrong usage\n"
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete in")


def run(args: argparse.Namespace) -> int:
    """Print the script for the whole command line."""
    import shtab  # all commands and this, for one script: no other command pays for it

    sys.stdout.write(shtab.complete(whole_parser(), shell=args.shell))
    sys.stdout.write("\n")
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """The parser with the options of every command; positional arguments and folders complete to paths."""
    import shtab

    from milepost.cli.main import COMMANDS, CommandModule, build_parser

    modules = {name: cast("CommandModule", importlib.import_module(COMMANDS[name].module)) for name in COMMANDS}
    parser = build_parser(modules)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                for argument in sub._actions:
                    is_path = not argument.option_strings or argument.metavar == "DIR"
                    if is_path and argument.choices is None:
                        argument.complete = shtab.FILE
    return parser
