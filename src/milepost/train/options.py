"""Read a TOML file and command-line flags into a ``TrainConfig``, or raise one error with all mistakes.

tyro renders ``--help``. Parsing is done here: tyro (1.0) stops at the first wrong value, does not report file and line,
and would apply different rules to a flag than to the same option in TOML.
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, cast

from milepost.config import meant_word
from milepost.errors import ConfigError, near
from milepost.storage import expanded
from milepost.train.checks import find_problems
from milepost.train.config import TrainConfig

SECTIONS: dict[str, Any] = typing.get_type_hints(TrainConfig)
"""Section name -> its dataclass."""

OPTIONS: dict[str, Any] = {
    f"{section}.{name}": hint for section, cls in SECTIONS.items() for name, hint in typing.get_type_hints(cls).items()
}
"""Dotted option name -> type."""


@dataclass
class Settings:
    """Options by dotted name, as set by a file and flags, with the origin of each (``file:line`` or the flag)."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    """Options with rejected values: checks that depend on them are skipped."""

    def set(self, option: str, value: object, origin: str, *, read: Callable[[Any, Any], object]) -> None:
        """Set ``option`` to ``value`` as parsed by ``read`` (``from_flag`` or ``from_toml``), or record the problem."""
        self.origins[option] = origin
        try:
            self.values[option] = read(value, OPTIONS[option])
        except ValueError as error:
            self.refused.add(option)
            hint = _meant(value, OPTIONS[option])
            self.problems.append(f"{origin}: {option} must be {error}, not {_shown(value)}{hint}")

    def update(self, other: Settings) -> None:
        """Override these settings with those of ``other``."""
        self.values |= other.values
        self.origins |= other.origins
        self.problems += other.problems
        self.refused |= other.refused

    def expand_paths(self) -> None:
        """Expand ``~`` and ``$VARIABLE`` in paths, or record the problem of a variable that is not set."""
        for option in PATHS:
            value = self.values.get(option)
            try:
                self.values |= {option: expanded(value)} if isinstance(value, str) else {}
            except ConfigError as error:
                self.refused.add(option)
                self.problems.append(f"{self.origins[option]}: {option}: {error}")

    def check_that_checkpointing_is_on(self) -> None:
        """Reject checkpointing options if ``enable`` is not set: they would silently have no effect."""
        idle = [option for option in self.origins if option.startswith("checkpoint.")]
        if not idle or "checkpoint.enable" in self.origins:
            return
        names = ", ".join(option.removeprefix("checkpoint.") for option in idle)
        self.problems.append(
            f"{self.origins[idle[0]]}: checkpointing is off, so {names} would have no effect: add `enable = true` to "
            "[checkpoint] (or --checkpoint.enable), or `enable = false` to leave it off"
        )
        self.values["checkpoint.enable"] = True  # let the other checks assume that it is on

    def locate(self, problem: str) -> str | None:
        """Prefix ``problem`` with the origin of the option it names first; None if it depends on a rejected value."""
        named = [word for word in re.findall(r"\b\w+\.\w+", problem) if word in OPTIONS]
        section = problem.partition(":")[0]
        if section in SECTIONS:
            named += [option for option in self.origins if option.startswith(f"{section}.")]
        if self.refused.intersection(named):
            return None
        places = [self.origins[option] for option in named if option in self.origins]
        return f"{places[0]}: {problem}" if places else problem


def load_config(argv: Sequence[str], world_size: int | None) -> TrainConfig:
    """Return the configuration of the command line ``argv``, checked for a job of ``world_size`` ranks.

    With ``world_size`` None, checks that depend on it are skipped.

    Raises:
        ConfigError: with every problem of file, flags and their combination.
        SystemExit: after ``--help`` was printed.
    """
    flags = read_flags([arg for arg in argv if arg not in ("-h", "--help")])
    flags.expand_paths()
    path = flags.values.get("job.config_file")
    settings = read_toml(Path(str(path))) if path else Settings()
    settings.update(flags)
    settings.expand_paths()  # not of a file's value that a flag overrides: its variable may be another machine's
    settings.check_that_checkpointing_is_on()
    config, problems = build_config(settings.values)
    if "-h" in argv or "--help" in argv:
        print_help(config)
    located = [settings.locate(problem) for problem in (*problems, *find_problems(config, world_size))]
    settings.problems += [problem for problem in located if problem is not None]
    if settings.problems:
        raise ConfigError(list(dict.fromkeys(settings.problems)))
    return config


def build_config(values: Mapping[str, object]) -> tuple[TrainConfig, list[str]]:
    """Build a config from ``values`` (by dotted name); a section that rejects its values gets the defaults."""
    sections: dict[str, Any] = {}
    problems: list[str] = []
    for section, cls in SECTIONS.items():
        chosen = {f.name: values[f"{section}.{f.name}"] for f in fields(cls) if f"{section}.{f.name}" in values}
        if section == "checkpoint":
            chosen.setdefault("enable", False)  # off by default in the trainer, as in torchtitan
        try:
            sections[section] = cls(**chosen)
        except ConfigError as error:
            problems += error.problems
    return replace(TrainConfig(), **sections), problems


def read_flags(argv: Sequence[str]) -> Settings:
    """Read ``--section.key value``, ``--section.key=value``, ``--section.flag`` and ``--section.no_flag``.

    Hyphens and underscores are equivalent in a name. The last setting of an option wins.
    """
    settings = Settings()
    args, before = list(argv), ""
    while args:
        flag, equals, text = args.pop(0).partition("=")
        option = flag.removeprefix("--").replace("-", "_")
        negated = option.replace(".no_", ".", 1)
        has_value = bool(equals) or (bool(args) and not args[0].startswith("--"))
        if not flag.startswith("--"):
            settings.problems.append(_no_option(flag, before))
        elif OPTIONS.get(option) is bool:
            is_next = not equals and bool(args) and args[0].lower() in ("true", "false")
            settings.set(option, text if equals else args.pop(0) if is_next else "true", flag, read=from_flag)
        elif OPTIONS.get(negated) is bool and not equals:
            settings.set(negated, "false", flag, read=from_flag)
        elif option not in OPTIONS:
            settings.problems.append(f"{flag}: there is no such option{_did_you_mean(option, '--')}")
            if has_value and not equals:
                args.pop(0)
        elif has_value:
            settings.set(option, text if equals else args.pop(0), flag, read=from_flag)
        else:
            settings.refused.add(option)
            settings.problems.append(f"{flag}: needs a value, {describe(OPTIONS[option])}")
        before = option
    return settings


def _no_option(word: str, before: str) -> str:
    """Return the problem of a word without hyphens; ``before`` is the option before it."""
    if before in OPTIONS and describe(OPTIONS[before]) == "a list of names":
        return f"{word}: a list has commas and no spaces, as in --{before} one,two"
    return f"{word}: an option's name begins with --, as in --training.steps 100"


def read_toml(path: Path) -> Settings:
    """Read a TOML file of ``[section]`` tables."""
    settings = Settings()
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a mark at the beginning
        tables = tomllib.loads(text)
    except OSError as error:
        found = near(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"; did you mean {path.parent / found}?" if found else ""
        settings.problems.append(f"--job.config_file {path}: {error.strerror or error}{hint}")
        return settings
    except (ValueError, RecursionError) as error:
        settings.problems.append(f"{path}: this is not TOML: {error!s:.200}")
        return settings
    lines = _line_numbers(text)
    for section, table in tables.items():
        origin = f"{path}:{lines.get(section, 1)}"
        if section not in SECTIONS:
            found = near(section, SECTIONS)
            settings.problems.append(
                f"{origin}: there is no section [{section}]"
                + (f"; did you mean [{found}]?" if found else f"; sections are {', '.join(SECTIONS)}")
            )
        elif not isinstance(table, dict):
            settings.problems.append(f"{origin}: {section} is a section and must be a table, [{section}]")
        else:
            for key, value in table.items():
                _set_from_toml(settings, f"{section}.{key}", value, f"{path}:{lines.get(f'{section}.{key}', 1)}")
    return settings


def _set_from_toml(settings: Settings, option: str, value: object, origin: str) -> None:
    if option == "job.config_file":
        settings.problems.append(f"{origin}: {option} is a flag; a file can't name another")
    elif option in OPTIONS:
        settings.set(option, value, origin, read=from_toml)
    else:
        settings.problems.append(f"{origin}: there is no option {option}{_did_you_mean(option, '')}")


def _line_numbers(text: str) -> dict[str, int]:
    """Return the line of the first mention of each ``section`` and ``section.key``, which tomllib does not provide."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([\w.\"'-]+)\s*\]", line):
            section = header[1].strip("\"'")
            lines.setdefault(section, number)
            lines.setdefault(section.partition(".")[0], number)
        elif key := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            name = key[1].replace('"', "").replace("'", "")
            lines.setdefault(f"{section}.{name}" if section else name, number)
            lines.setdefault(section or name.partition(".")[0], number)
    return lines


PATHS = (
    "job.config_file",
    "job.dump_folder",
    "model.hf_assets_path",
    "training.dataset_path",
    "checkpoint.folder",
    "checkpoint.remote_folder",
    "checkpoint.initial_load_path",
    "metrics.save_tb_folder",
)
"""Options in which ``~`` and ``$VARIABLE`` are expanded: a shell does not do so in a file or after ``=``."""


OTHER_NAMES = {
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.last_save_in_safetensors_format": "checkpoint.last_save_in_hf",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.interval_type": "checkpoint.interval",
    "model.tokenizer_path": "model.hf_assets_path",
    "training.batch_size": "training.local_batch_size",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "config": "job.config_file",
    "module": "model.name",
}
"""Names of other releases of torchtitan, and the option that stands for them here; for suggestions."""


def _did_you_mean(option: str, prefix: str) -> str:
    key = option.rpartition(".")[2]
    elsewhere = next((name for name in OPTIONS if name.rpartition(".")[2] == key), None)
    found = OTHER_NAMES.get(option) or elsewhere or _nearest(option)
    return f"; did you mean {prefix}{found}?" if found else "; --help lists all"


def _nearest(option: str) -> str | None:
    """Return the option nearest to an unknown one: of its section, if that exists, else of all."""
    section, _, key = option.partition(".")
    if section not in SECTIONS:
        return near(option, OPTIONS)
    keys = [name.partition(".")[2] for name in OPTIONS if name.startswith(f"{section}.")]
    found = near(key, keys) or near(key.removeprefix("no_"), keys)
    return f"{section}.{found}" if found else None


def from_flag(text: str, hint: Any) -> object:
    """Parse ``text`` as the type ``hint``. Raises ValueError with the expected type."""
    for choice in _choices(hint):
        if isinstance(choice, str) and text == choice:
            return text
        if typing.get_origin(choice) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if choice is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if choice in (int, float, str):
            with contextlib.suppress(ValueError):
                return _checked(cast(Any, choice)(text), hint)
    raise ValueError(describe(hint))


def from_toml(value: object, hint: Any) -> object:
    """Convert ``value`` to the type ``hint``; accepts a whole number for a float, and text with commas for a list."""
    for choice in _choices(hint):
        if isinstance(choice, str) and value == choice:
            return value
        if typing.get_origin(choice) is tuple:
            if isinstance(value, list) and all(isinstance(part, str) for part in value):
                return tuple(value)
            if isinstance(value, str):
                return from_flag(value, hint)
        if choice is float and type(value) is int:
            return float(_checked(value, hint))
        if type(value) is choice:
            return _checked(value, hint)
    raise ValueError(describe(hint))


def _checked(value: object, hint: Any) -> Any:
    """Return ``value``; raises ValueError for an integer of more than 63 bits."""
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"{describe(hint)} of at most 63 bits")
    return value


def _meant(value: object, hint: Any) -> str:
    """Suggest the word that a rejected ``value`` may stand for."""
    words = [choice for choice in _choices(hint) if isinstance(choice, str)]
    found = meant_word(value, words)
    return f"; did you mean {found}?" if found else ""


def _choices(hint: Any) -> list[Any]:
    """Return the choices for a value: types, and the words of a Literal. None means that the option is not given."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [choice for arg in typing.get_args(hint) for choice in _choices(arg) if choice is not type(None)]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else [hint]


def describe(hint: Any) -> str:
    """Name a type for a message."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    choices = _choices(hint)
    words = [choice for choice in choices if isinstance(choice, str)]
    kinds = [names.get(choice, "a list of names") for choice in choices if not isinstance(choice, str)]
    if words and not kinds:
        return "one of " + ", ".join(words)
    return " or ".join([*kinds, *words])


def print_help(config: TrainConfig) -> NoReturn:
    """Print all options with their values in ``config``, and exit with 0."""
    import tyro  # imported here: ranks do not need it

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def comma_list(kind: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if kind.type != tuple[str, ...]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="NAME,NAME",
            instance_from_str=lambda args: tuple(args[0].split(",")),
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda value: [",".join(value)],
        )

    with registry:
        tyro.cli(TrainConfig, default=config, args=["--help"], prog="run_train.sh", use_underscores=True)
    raise SystemExit(0)


def to_toml(config: TrainConfig) -> str:
    """Format ``config`` as the TOML file that yields it (without ``job.config_file``, which is a flag)."""
    blocks = []
    for section, cls in SECTIONS.items():
        values = {f.name: getattr(getattr(config, section), f.name) for f in fields(cls)}
        values.pop("config_file", None)
        lines = [f"{name} = {_toml_value(value)}" for name, value in values.items() if value is not None]
        blocks.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(blocks)


def _shown(value: object) -> str:
    """Format ``value`` for a message, shortened if it is long."""
    try:
        text = _toml_value(value)
    except (RecursionError, ValueError):  # Python refuses to print numbers of thousands of digits
        return "a number of that many digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _toml_value(value: object) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(part) for part in value) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)  # JSON's escapes are valid in TOML
    return str(value)
