"""Every block of code in the documentation runs: Python and commands, one after the other, as a reader would."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reader
import yaml
from pages import PAGES, REFERENCE, ROOT, Block, blocks, commands, name_of, shell_commands

from milepost.report import resume_test

NOT_RUN_HERE = {
    "make": "sets up, trains, tests or formats the repository itself; the targets exist (test_docs.py)",
    "sbatch": "needs a Slurm cluster; tests/distributed/test_elastic.py runs the script with several agents",
    "./run_train.sh": "takes minutes; its configuration is checked (test_docs.py), one is run below, and "
    "tests/train/test_launch.py and tests/distributed run resumes, layouts, seed checkpoints and restarts",
    "DeepSeek-V3": "tests/interop/test_families.py and test_quantized.py convert small models of its class",
    "gpt-oss-20b": "likewise",
}
"""Commands that are parsed and checked, but not run by this test, and why."""
SHOWN_ELSEWHERE = {
    "README.md": {"python": "tests/test_readme.py runs it as it stands, stopped and resumed"},
    **{
        f"docs/howto/{page}.md": {"python": "tests/integrations/test_pages.py runs it, with the frameworks"}
        for page in ("transformers", "lightning", "torchtitan", "more")
    },
    "docs/format.md": {"json": "tests/format/test_format_doc.py", "text": "tests/format/test_format_doc.py"},
    "docs/design.md": {"text": "a diagram"},
    "docs/reference/cli.md": {"text": "an excerpt of the help; test_docs.py holds the page to the code"},
}
LAYOUT = ("", "{toctree}")
"""Output of programs, and directives of Sphinx: nothing to run."""
ALLOWED = {"diff": {0, 9}, "verify": {0, 11}}
"""Exit statuses of what the pages show: two steps of a run do differ, and stock DCP records too few digests."""
FAKE_TRAINER = ROOT / "tests/cli/fake_trainer.py"


@pytest.fixture(scope="module")
def settled() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        reader.settle(Path(folder))
        yield Path(folder)


@pytest.fixture
def place(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's working directory. ``resume-test`` trains with the stand-in that its own tests use."""
    monkeypatch.chdir(memory_path)
    monkeypatch.setattr(resume_test, "TRAINER", (sys.executable, str(FAKE_TRAINER)))
    return memory_path


def is_run_here(words: list[str]) -> bool:
    """Return whether a command is run by this test.

    Not those on a bucket (tests/cli/test_urls.py runs every command on a real store), nor ``--watch``, which never
    ends (see tests/cli/test_watch.py).
    """
    is_out_of_reach = any(word.startswith("s3://") or word == "--watch" for word in words)
    return not any(name in words for name in NOT_RUN_HERE) and not is_out_of_reach


def check(words: list[str]) -> None:
    status = reader.run(words)
    assert status in ALLOWED.get(words[1], {0}), f"{' '.join(words)} ended with status {status}"


WRITTEN = [page for page in PAGES if page.parent != REFERENCE and blocks(page)]


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in WRITTEN])
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, place: Path, settled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [words for words in shell_commands(page) if is_run_here(words)]
    if any("outputs" in word or "Llama" in word for words in lines for word in words):
        reader.copy(settled, place)
    elif lines:
        (place / "configs").symlink_to(ROOT / "configs")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown_elsewhere = SHOWN_ELSEWHERE.get(name_of(page), {})
    for number, block in enumerate(blocks(page), start=1):
        if block.language == "sh":
            for words in filter(is_run_here, commands(block)):
                check(words)
        elif block.language in shown_elsewhere or block.language in LAYOUT:
            continue
        elif block.language == "python":
            run_python(block, f"{name_of(page)}, block {number}", namespace)
        elif block.language == "yaml":
            check_torchtune(block.text)
        elif block.language == "json":
            json.loads(block.text)
        else:
            pytest.fail(f"{name_of(page)}, block {number}: nothing runs {block.language!r}")
    assert "Traceback" not in capsys.readouterr().err


def run_python(block: Block, name: str, namespace: dict[str, Any]) -> None:
    code = compile(block.text, name, "exec")
    if block.only_compiled:
        imports = [line for line in block.text.splitlines() if line.startswith(("import ", "from "))]
        code = compile("\n".join(imports), name, "exec")
    exec(code, namespace)


def check_torchtune(text: str) -> None:
    """The component that a recipe's section names exists, and takes these arguments."""
    for section in yaml.safe_load(text).values():
        module, _, name = section.pop("_component_").rpartition(".")
        inspect.signature(getattr(importlib.import_module(module), name)).bind(**section)


EXAMPLES = [words for words in shell_commands(REFERENCE / "cli.md") if is_run_here(words)]


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words[1:])) for words in EXAMPLES])
def test_every_example_of_the_reference_runs(
    words: list[str], place: Path, settled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples of ``--help`` are these."""
    reader.copy(settled, place)
    reader.prepare(words)
    check(words)


def test_what_is_not_run_is_still_checked() -> None:
    """Every command is run here, or named in the table and checked by test_docs.py."""
    shown = [words for page in PAGES for words in shell_commands(page)]
    assert {words[0] for words in shown if is_run_here(words)} == {"milepost", "python"}
    assert all(any(name in words for words in shown) for name in NOT_RUN_HERE)


@pytest.mark.timeout(300)
def test_the_first_training_of_the_quickstart_runs_and_is_looked_at(place: Path) -> None:
    """Its command with a smaller batch and fewer steps; then the commands with which the page inspects it."""
    (line, *_) = [words for words in shell_commands(ROOT / "docs/quickstart.md") if "./run_train.sh" in words]
    shown = subprocess.list2cmdline(line).replace("./", f"{ROOT}/")
    cheap = "--training.steps=2 --training.seq_len=32 --training.local_batch_size=1 --checkpoint.interval=1"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = f"{shown} {cheap} --checkpoint.no_last_save_model_only"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (place / "outputs/checkpoint").glob("step-*")) == ["step-1", "step-2"]
    check(["milepost", "ls", "outputs"])
    check(["milepost", "inspect", "outputs/checkpoint/step-2"])
    check(["milepost", "verify", "outputs"])
