"""``milepost completion``: a shell completion script for commands, options, paths, models and keys."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import cast

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost completion``."""
    parser.description = "Print a script that completes commands, options, paths, models, flavors and keys in a shell."
    parser.epilog = (
        "examples:\n"
        "  milepost completion bash > ~/.local/share/bash-completion/completions/milepost\n"
        "  milepost completion zsh > ~/.zfunc/_milepost     # with ~/.zfunc in $fpath, before compinit\n"
        "  milepost completion fish > ~/.config/fish/completions/milepost.fish\n\n"
        "exit status: 0, 2 wrong usage\n"
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete for")


def run(args: argparse.Namespace) -> int:
    """Print the script for the whole command line."""
    import shtab  # imports shtab and the modules of all commands, which only this command needs

    sys.stdout.write(shtab.complete(whole_parser(), shell=args.shell))
    sys.stdout.write("\n")
    return 0


KEYS = {
    "bash": "_milepost_keys",
    "zsh": "{_milepost_keys}",
    "fish": "(_milepost_keys)",
    "preamble": {
        "bash": """_milepost_keys() {
  local word
  for word in "${COMP_WORDS[@]:2}"; do
    if [[ -d $word ]]; then compgen -W "$(milepost inspect "$word" --keys 2>/dev/null)" -- "$1"; return; fi
  done
}""",
        "zsh": """_milepost_keys() {
  local word
  for word in ${words[3,-1]}; do
    if [[ -d $word ]]; then compadd -- ${(f)"$(milepost inspect $word --keys 2>/dev/null)"}; return; fi
  done
}""",
        "fish": """function _milepost_keys
  for word in (commandline -opc)[3..-1]
    test -d $word; and milepost inspect $word --keys 2>/dev/null; and return
  end
end""",
    },
}
"""Completes the keys of the first folder on the command line."""


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser with every command's options, set up to complete paths, models, flavors and keys."""
    import shtab

    from milepost.cli.main import COMMANDS, CommandModule, build_parser
    from milepost.interop.names.model_sizes import MODEL_NAMES, model_flavors
    from milepost.interop.options import MODELS

    modules = {name: cast("CommandModule", importlib.import_module(COMMANDS[name].module)) for name in COMMANDS}
    parser = build_parser(modules)
    choices = {
        "--model": list(MODELS),
        "--flavor": list(dict.fromkeys(flavor for model in MODEL_NAMES for flavor in model_flavors(model))),
    }
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for argument in (argument for sub in action.choices.values() for argument in sub._actions):
                option = argument.option_strings[-1] if argument.option_strings else ""
                if option in choices:
                    argument.choices = choices[option]
                elif (option in ("--tensors", "--keys") and argument.nargs != 0) or argument.dest in ("key", "keys"):
                    argument.complete = KEYS
                elif argument.choices is None and (not option or argument.metavar in ("DIR", "FILE", "PATH")):
                    argument.complete = shtab.FILE
    return parser
