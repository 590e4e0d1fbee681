"""Write the reference pages from the code: ``python docs/generate.py``; with ``--check``, say whether they are current.

The command line's page comes from the parsers that the commands use, the configuration's from the dataclasses and the
docstrings under their fields, Python's from the signatures and docstrings of what ``milepost`` exports, and the picture
of the folders from their imports.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import flow
import house

import milepost
from milepost.cli.main import COMMANDS, EXIT_STATUSES, build_parser
from milepost.train.config import TrainConfig

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code: change it there, then run `make docs`. -->\n"


def pages() -> dict[Path, str]:
    """The text of every generated page."""
    return {
        REFERENCE / "api.md": api_page(),
        REFERENCE / "cli.md": cli_page(),
        REFERENCE / "config.md": config_page(),
        REFERENCE.parent / "flow.svg": flow.picture(),
        REFERENCE.parent / "house.svg": house.picture(),
    }


# ---- the command line ----


def cli_page() -> str:
    """Every command with its options, its examples and its exit statuses."""
    parts = [
        NOTE,
        "# Command line\n",
        "`milepost` runs on any machine that sees the files: it needs no GPU, no process group, and no torch but "
        "for `resume-test`. Tables are for people; `--json` prints one document for programs. Colours and moving "
        "progress bars appear on a terminal only, and no colours where `NO_COLOR` is set; elsewhere progress is lines "
        "on standard error, the first after 2 s. Where a terminal is too narrow for a table, its values get lines of "
        "their own. Ctrl-C stops any command at a safe point. `python -m milepost` is the same program.\n",
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
    value = "" if action.nargs == 0 else f" {value}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _cell(action: argparse.Action) -> str:
    required = " (required)" if action.option_strings and action.required else ""
    return ((action.help or "").replace("%%", "%") + required).replace("|", "\\|")


def _split_epilog(epilog: str) -> tuple[str, str, str]:
    """Return the text before the examples, the examples, and the exit statuses."""
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
    return _in_cell(_markdown(inspect.cleandoc(cls.__doc__ or "").splitlines()[0]))


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


# ---- Python ----


def api_page() -> str:
    """Every name that ``milepost`` exports, with its signature and docstring."""
    exported = {name: getattr(milepost, name) for name in ("open", *milepost.__all__)}
    names = [name for name, value in exported.items() if not _is_error(value)]
    parts = [
        NOTE,
        "# Python\n",
        "What `import milepost` offers. Names are loaded on first use, so that the import itself costs nothing. "
        "Functions that save or load are *collective*: every rank calls them, in the same order, and an error on one "
        "rank is raised on all. Ranks exchange through `comm`: by default torch's default process group, and without "
        "one there is one rank.\n",
        "| name | what it is |\n|---|---|",
        *(
            f"| [`{name}`](#milepost-{name.lower().replace('_', '-')}) | {_first_line(exported[name])} |"
            for name in names
        ),
        "| [errors](#errors) | what all of them raise |",
        "",
        *(_exported(name, exported[name]) for name in names),
        _errors([value for value in exported.values() if _is_error(value)]),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def _exported(name: str, value: Any) -> str:
    parts = [f"## milepost.{name}\n"]
    if name == "CheckpointConfig":
        return (
            f"{parts[0]}\n{_prose(value)}\nIts fields are the options of section [checkpoint](config.md#checkpoint).\n"
        )
    if not inspect.isclass(value):
        return "\n".join([*parts, _signature(name, value), _prose(value)])
    if dataclasses.is_dataclass(value):
        fields = field_docs(value)
        rows = [
            f"| `{field.name}` | `{_in_cell(_annotation(str(field.type), value))}` | "
            f"{_table_text(fields.get(field.name, ''))} |"
            for field in dataclasses.fields(value)
        ]
        parts += [_prose(value), "| field | type | meaning |\n|---|---|---|", *rows, ""]
    else:
        is_made_by_users = "Args:" in (value.__doc__ or "")
        parts += [_signature(name, value.__init__, skip_first=True)] if is_made_by_users else []
        parts += [_prose(value)]
    return "\n".join(parts + list(_members(name, value)))


def _members(owner: str, cls: type) -> Iterator[str]:
    """The documented methods and properties that a class defines itself."""
    for name, member in vars(cls).items():
        if name.startswith("_") or not member.__doc__:  # not the base class's: DCP documents its own
            continue
        if isinstance(member, property):
            returned = typing.cast("Any", member.fget).__annotations__["return"]
            yield f"### {owner}.{name}\n\n```text\n{name}: {returned}\n```\n\n{_prose(member)}"
        elif inspect.isfunction(member):
            yield f"### {owner}.{name}\n\n{_signature(name, member, skip_first=True)}\n{_prose(member)}"


def _errors(errors: Sequence[type]) -> str:
    rows = []
    for error in errors:
        parent = error.__mro__[1].__name__
        own = inspect.signature(error.__init__).parameters
        attributes = ", ".join(f"`{name}`" for name in own if name not in ("self", "message"))
        status = getattr(error, "exit_status", 1)
        meaning = _in_cell(_markdown(" ".join((error.__doc__ or "").split())))
        rows.append(f"| `{error.__name__}` | `{parent}` | {status} | {attributes} | {meaning} |")
    return "\n".join(
        [
            "## Errors\n",
            "All derive from `milepost.MilepostError`, whose `message` says what, where, and what to do next. The "
            "status is what the command line exits with. Symptoms and fixes are in [Errors](../errors.md).\n",
            "| error | derives from | status | attributes | meaning |\n|---|---|---|---|---|",
            *rows,
        ]
    )


def _signature(name: str, function: Any, *, skip_first: bool = False) -> str:
    """``name(path: str, *, step: int = 1) -> Report``, broken into lines when it is long."""
    signature = inspect.signature(function)
    words = []
    starred = False
    for parameter in list(signature.parameters.values())[skip_first:]:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            words.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{parameter.name}: {_annotation(parameter.annotation, function)}{default}")
    returned = signature.return_annotation
    after = f" -> {_annotation(returned, function)}" if returned not in (signature.empty, "None") else ""
    text = f"{name}({', '.join(words)}){after}"
    if len(text) > 100:
        text = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){after}"
    return f"```text\n{text}\n```\n"


def _annotation(text: str, used_by: Any) -> str:
    """An annotation as it is written; a name for a choice of words gives the words."""
    found = getattr(sys.modules[used_by.__module__], text, None)
    if typing.get_origin(found) is Literal:
        return " | ".join(repr(word) for word in typing.get_args(found))
    return text


def _prose(value: Any) -> str:
    """A docstring as Markdown: sections with entries become lists, indented code becomes a block."""
    lines = inspect.cleandoc(value.__doc__ or "").splitlines()
    out: list[str] = []
    while lines:
        line = lines.pop(0)
        indented = []
        if line.endswith(":") and lines and (not lines[0].strip() or lines[0].startswith(" ")):
            while lines and (not lines[0].strip() or lines[0].startswith(" ")):
                indented.append(lines.pop(0))
        if not indented:
            out.append(_markdown(line))
        elif line.endswith("::"):
            code = textwrap.dedent("\n".join(indented)).strip("\n")
            out += [_markdown(line[:-1]), "", "```text", code, "```", ""]
        else:
            out += [
                f"**{ {'Args:': 'Parameters'}.get(line, line[:-1]) }**".replace("** ", "**").replace(" **", "**"),
                "",
            ]
            out += [*_entries(textwrap.dedent("\n".join(indented))), ""]
    return "\n".join(out).rstrip() + "\n"


def _entries(text: str) -> Iterator[str]:
    """``name: what it is``, each with its continuation lines, as a list."""
    for entry in re.split(r"\n(?=\S)", text.strip()):
        name, colon, meaning = " ".join(entry.split()).partition(": ")
        names = ", ".join(f"`{part}`" for part in name.split(", "))
        yield f"- {names}: {_markdown(meaning)}" if colon else f"- {_markdown(name)}"


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def _markdown(text: str) -> str:
    """Roles and literals of reStructuredText as plain code."""
    text = re.sub(r":(?:class|func|meth):`([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


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
