"""The documentation says what the code does: generated pages are current, and every block of code in it works."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from milepost import errors
from milepost.cli.main import COMMANDS, build_parser
from milepost.train.options import load_config, read_flags

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN_BY_HAND = [page for page in PAGES if page.parent.name != "reference"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def compiled_only(page: Path) -> set[str]:
    """Blocks that need more than a test has; their imports are run all the same."""
    return set(
        re.findall(r"<!-- only compiled: .*? -->\n```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )


def pages_with(language: str) -> list[Any]:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if blocks(page, language)]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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


def shell_commands(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, without comments and redirections."""
    commands = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for sign in (">", "|"):
                words = words[: words.index(sign)] if sign in words else words
            if words:
                commands.append(words)
    return commands


@pytest.mark.parametrize("page", pages_with("sh"))
def test_every_shell_command_is_one_that_the_programs_take(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folders are the reader's; commands, options and layouts must be right."""
    monkeypatch.chdir(tmp_path)
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
    at = words.index("./run_train.sh")
    environment = dict(word.split("=", 1) for word in words[:at])
    config_file = (ROOT / environment.get("CONFIG_FILE", "configs/debug_cpu.toml")).resolve()
    load_config(["--job.config_file", str(config_file), *words[at + 1 :]], int(environment.get("NGPU", "2")))


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run_one_after_the_other(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        code = compile(block, f"{name_of(page)}, block {number}", "exec")
        if block in compiled_only(page):
            imports = [line for line in block.splitlines() if line.startswith(("import ", "from "))]
            code = compile("\n".join(imports), name_of(page), "exec")
        exec(code, namespace)
