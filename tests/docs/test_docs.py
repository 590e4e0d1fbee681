"""The documentation agrees with the code: generated pages are current, and commands and options exist."""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pages import PAGES, REFERENCE, ROOT, name_of, shell_commands

from milepost import errors
from milepost.cli.main import COMMANDS, build_parser
from milepost.train.launch import split_args, world_size
from milepost.train.options import load_config, read_flags

WRITTEN_BY_HAND = [page for page in PAGES if page.parent != REFERENCE]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "docs"))  # as for a script: it imports house.py beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def parser_of(command: str) -> argparse.ArgumentParser:
    return build_parser({command: importlib.import_module(COMMANDS[command].module)})


def test_the_reference_is_what_the_code_says() -> None:
    for path, text in generator().pages().items():
        assert path.read_text() == text, f"{path.name} is stale: run `python docs/generate.py`"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_a_page_written_by_hand_and_every_option_in_the_reference(command: str) -> None:
    if command != "completion":
        assert any(f"milepost {command} " in page.read_text() for page in WRITTEN_BY_HAND)
    reference = (ROOT / "docs/reference/cli.md").read_text()
    section = re.split(r"^## ", reference.partition(f"## milepost {command}\n")[2], flags=re.MULTILINE)[0]
    sub = next(a for a in parser_of(command)._actions if isinstance(a, argparse._SubParsersAction)).choices[command]
    for action in sub._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                assert f"`{option}" in section


def test_every_error_is_explained_with_its_exit_status() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    for name in errors.__all__:
        if name != "MilepostError":
            assert f"| `{name}` | {getattr(errors, name).exit_status} |" in page


def messages() -> str:
    """All texts of the program, with gaps where they are filled in, and those of the operating system."""
    texts = [os.strerror(number).lower() for number in errno.errorcode]
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_every_symptom_that_the_page_of_errors_quotes_is_a_message() -> None:
    """The parts between ``...``, numbers and placeholders are compared."""
    known = messages()
    rows = re.findall(r"^\| (`(?!\w+Error`).*?) \|", (ROOT / "docs/errors.md").read_text(), flags=re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall("`([^`]+)`", row)]
    assert len(quoted) > 25
    for quote in quoted:
        for part in re.split(r"\.\.\.|<\w+>|\d+", quote):
            assert part.strip() in known, quote


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES if shell_commands(page)])
def test_every_shell_command_is_one_that_the_programs_take(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folders are the reader's; commands, options and layouts must be right."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text").mkdir()
    (tmp_path / "my_text" / "a.txt").touch()
    (tmp_path / "assets/hf/Llama-3.1-8B").mkdir(parents=True)
    makefile = (ROOT / "Makefile").read_text()
    for words in shell_commands(page):
        if words[0] == "milepost":
            args = parser_of(words[1]).parse_args(words[1:])
            assert args.command == words[1]
        elif "./run_train.sh" in words:
            check_training(words)
        elif "sbatch" in words:
            script = words.index("scripts/multinode.slurm")
            assert read_flags(words[script + 1 :]).problems == []
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE)
        elif words[0] in ("python", "python3"):
            assert (ROOT / words[1]).exists() or words[1] in ("-m", "-c")
        else:
            pytest.fail(f"nothing checks the command: {' '.join(words)}")


def check_training(words: list[str]) -> None:
    """The configuration that the trainer would run with, and torchrun's options."""
    at = words.index("./run_train.sh")
    environment = dict(word.split("=", 1) for word in words[:at])
    config_file = (ROOT / environment.get("CONFIG_FILE", "configs/debug_cpu.toml")).resolve()
    torchrun = ["--nproc_per_node", environment.get("NGPU", "2"), *shlex.split(environment.get("TORCHRUN_ARGS", ""))]
    argv = ["--job.config_file", str(config_file), *words[at + 1 :]]
    before, after = split_args([*torchrun, "--", *argv])
    check_torchrun(before)
    if "--help" in argv:
        with pytest.raises(SystemExit) as ended:
            load_config(after, world_size(before))
        assert ended.value.code == 0
    else:
        load_config(after, world_size(before))


def check_torchrun(options: list[str]) -> None:
    from torch.distributed import run as torchrun

    parsed = torchrun.parse_args([*options, "-m", "milepost.train"])
    assert parsed.training_script == "milepost.train"
