"""The layers of imports, and a command line that never imports torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TORCH_FREE = [
    "milepost",
    "milepost.errors",
    "milepost.config",
    "milepost.run.catalog",
    "milepost.run.retention",
    "milepost.verification.verify",
    "milepost.format.box",
    "milepost.format.dcp_metadata",
    "milepost.format.dcp_writer",
    "milepost.format.digest",
    "milepost.format.dtype",
    "milepost.format.manifest",
    "milepost.format.manifest_json",
    "milepost.format.record",
    "milepost.format.safetensors",
    "milepost.storage",
    "milepost.testing.wrap",
    "milepost.training.schedule",
    "milepost.tensors.plan",
    "milepost.tensors.read_plan",
    "milepost.saving.writer",
    "milepost.run.signoff",
    "milepost.run.commit",
    "milepost.saving.job",
    "milepost.saving.background",
    "milepost.saving.writer_process",
    "milepost.interop.hf.form",
    "milepost.train.process",
    "milepost.testing.faulty",
    "milepost.testing.sample",
    "milepost.cli.main",
    "milepost.cli.ls_cmd",
    "milepost.cli.verify_cmd",
    "milepost.cli.prune_cmd",
]


def test_the_contracts_of_the_architecture_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_torch_free_modules_do_not_bring_torch_along() -> None:
    """Each in turn, in one process: the first that brings torch is named."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *TORCH_FREE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, milepost; print([m for m in ('torch', 'numpy', 'rich', 'milepost.errors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("argv", [["--version"], ["ls", "/nowhere"], ["verify", "/nowhere"], ["prune", "--help"]])
def test_commands_start_without_torch(argv: list[str]) -> None:
    code = (
        "import sys\n"
        "from milepost.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
