"""Write the reference pages from the code: ``python docs/generate.py``; with ``--check``, say whether they are current.

The command line's page comes from the parsers that the commands use, the configuration's from the dataclasses and the
docstrings under their fields.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from milepost.cli.main import COMMANDS, EXIT_STATUSES, build_parser
from milepost.train.config import TrainConfig

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code: change it there, then run `make docs`. -->\n"


def pages() -> dict[Path, str]:
    """The text of every generated page."""
    return {REFERENCE / "cli.md": cli_page(), REFERENCE / "config.md": config_page()}


# ---- the command line ----


def cli_page() -> str:
    """Every command with its options, its examples and its exit statuses."""
    parts = [
        NOTE,
        "# Command line\n",
        "`milepost` runs on any machine that sees the files: it needs no GPU, no process group, and no torch but "
        "for `resume-test`. Tables are for people; `--json` prints one document for programs. Colours and moving "
        "progress bars appear on a terminal only, and not where `NO_COLOR` is set. Ctrl-C stops any command at a safe "
        "point.\n",
        "| command | what it does |\n|---|---|",
        *(f"| [`milepost {name}`](#milepost-{name}) | {command.summary} |" for name, command in COMMANDS.items()),
        "",
        _exit_statuses(),
        *(_command(name) for name in COMMANDS),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _exit_statuses() -> str:
    rows = re.findall(r"^  (\d+) +(.+)$", EXIT_STATUSES, flags=re.MULTILINE)
    table = "\n".join(f"| {status} | {meaning} |" for status, meaning in rows)
    return f"## Exit statuses\n\n| status | meaning |\n|---|---|\n{table}\n"


def _command(name: str) -> str:
    module: Any = importlib.import_module(COMMANDS[name].module)
    sub = next(a for a in build_parser({name: module})._actions if isinstance(a, argparse._SubParsersAction))
    parser = sub.choices[name]
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    before, examples, after = _split_epilog(parser.epilog or "")
    parts = [f"## milepost {name}\n", _flowing(parser.description or ""), "", "| argument | meaning |", "|---|---|"]
    parts += [f"| {_spelling(action)} | {_cell(action)} |" for action in actions]
    parts += ["", f"```sh\n{examples}\n```", "", _flowing(after), ""]
    if before:
        parts.insert(2, f"\n```text\n{before}\n```")
    return "\n".join(parts)


def _spelling(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        optional = action.nargs in ("?", "*")
        text = f"{value} ..." if action.nargs in ("+", "*") else value
        return f"`[{text}]`" if optional else f"`{text}`"
    return f"`{action.option_strings[-1]}`" if action.nargs == 0 else f"`{action.option_strings[-1]} {value}`"


def _cell(action: argparse.Action) -> str:
    required = " (required)" if action.option_strings and action.required else ""
    return ((action.help or "").replace("%%", "%") + required).replace("|", "\\|")


def _split_epilog(epilog: str) -> tuple[str, str, str]:
    """What stands before the examples, the examples, and the exit statuses."""
    before, _, rest = epilog.partition("examples:\n")
    examples, _, after = rest.partition("\n\n")
    return before.strip("\n"), textwrap.dedent(examples), after


def _flowing(text: str) -> str:
    """A paragraph whose lines were broken for a terminal."""
    flowing = " ".join(text.split())
    return flowing[:1].upper() + flowing[1:] + ("" if flowing.endswith(".") else ".")


# ---- the configuration ----


def config_page() -> str:
    """Every option of the trainer, by section, with type, default and meaning."""
    parts = [
        NOTE,
        "# Configuration\n",
        "The trainer reads these from a TOML file (`[checkpoint]`, `interval = 500`), then from flags "
        "(`--checkpoint.interval 500`; `--checkpoint.enable` and `--checkpoint.no_enable` for true and false; lists "
        "with commas). The options of section `checkpoint` are the fields of `milepost.CheckpointConfig`, for your own "
        "training loop. Names and meanings are torchtitan's, where it has them.\n",
    ]
    hints = typing.get_type_hints(TrainConfig)
    for section in dataclasses.fields(TrainConfig):
        cls = hints[section.name]
        parts += [
            f"## {section.name}\n",
            _first_line(cls),
            "",
            "| option | type | default | meaning |",
            "|---|---|---|---|",
        ]
        parts += [f"| `{name}` | {kind} | {default} | {meaning} |" for name, kind, default, meaning in _options(cls)]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _first_line(cls: type) -> str:
    """The first line of a docstring, with a role of Sphinx's as plain code."""
    return re.sub(r":class:`([^`]+)`", r"`\1`", inspect.cleandoc(cls.__doc__ or "").splitlines()[0])


def _options(cls: Any) -> Iterator[tuple[str, str, str, str]]:
    docs = field_docs(cls)
    hints = typing.get_type_hints(cls)
    for option in dataclasses.fields(cls):
        default = option.default
        if default is dataclasses.MISSING and option.default_factory is not dataclasses.MISSING:
            default = option.default_factory()
        yield option.name, _type_text(hints[option.name]), _default_text(default), _table_text(docs[option.name])


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[ast.unparse(field.target)] = inspect.cleandoc(str(after.value.value))
    return docs


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_text(arg) for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "list of names"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[hint]


def _default_text(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value not in ("", ()) else "empty"


def _table_text(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def main() -> int:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is not what the code says: run python docs/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path])
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
