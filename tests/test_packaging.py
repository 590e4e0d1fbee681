"""The wheel, built from the tree, works with only its declared dependencies, and the command line without torch."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from packaging.requirements import Requirement

from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "src")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree: building leaves files beside the sources."""
    tree = tmp_path_factory.mktemp("tree")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, tree / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", tree / "dist", tree], check=True, timeout=200)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def declared(requirements: list[str]) -> Iterator[Requirement]:
    """Return the wheel's dependencies without extras, and theirs in turn."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def install(names: set[str], site: Path) -> None:
    """Link the packages ``names``, and all that they declare to need, into ``site``; torch alone is left out."""
    pending, done = sorted(names), {"torch"}
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in done:
            continue
        done.add(name)
        distribution = importlib.metadata.distribution(name)
        pending += [requirement.name for requirement in declared(distribution.requires or [])]
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``milepost`` of the wheel in a virtual environment with what the wheel declares, and without torch."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home)
    python = home / "bin" / "python"
    into = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*into, wheel], check=True, timeout=200)
    (site,) = (home / "lib").glob("python*/site-packages")
    install({requirement.name for requirement in declared(metadata(wheel).get_all("Requires-Dist") or [])}, site)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, timeout=60).returncode != 0
    return home / "bin" / "milepost"


def test_the_wheel_holds_the_package_and_nothing_of_the_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"milepost", next(top for top in tops if top.endswith(".dist-info"))}
    assert {"milepost/py.typed", "milepost/cli/main.py"} <= set(names)
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/milepost").rglob("*.py")}
    assert sources <= set(names)
    data = [path for suffix in ("css", "js") for path in (ROOT / "src/milepost").rglob(f"*.{suffix}")]
    assert {path.relative_to(ROOT / "src").as_posix() for path in data} <= set(names)


def test_its_metadata_renders(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Description-Content-Type"] == "text/markdown"
    body = str(found.get_payload())
    assert body.strip() == (ROOT / "README.md").read_text().strip()
    assert "<h1>Milepost</h1>" in MarkdownIt().enable("table").render(body)
    assert (found["License-Expression"], found["Requires-Python"]) == ("Apache-2.0", ">=3.11")


def test_torch_is_asked_for_in_the_version_that_the_suite_was_run_with(wheel: Path) -> None:
    (torch,) = (r for r in declared(metadata(wheel).get_all("Requires-Dist") or []) if r.name == "torch")
    (pinned,) = re.findall(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert str(torch.specifier) == f">={pinned}"


@pytest.mark.parametrize(
    "line",
    ["--version", "help", "ls run", "inspect run/step-1 --shards", "verify run", "diff run/step-1 run/step-2",
     "convert --help", "completion bash"],
)  # fmt: skip
def test_the_program_works_where_only_what_it_declares_is_installed(line: str, program: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        save_arrays(LocalStorage(tmp_path), f"run/step-{step}", {"w": np.ones(5, "float32")}, step=step)
    done = subprocess.run([program, *line.split()], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
