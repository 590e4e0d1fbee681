"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from milepost.train.options import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

LOOP_OF_SOMEBODY = """
import torch

torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
num_steps, crash_at = 30, int(sys.argv[1])
steps_made = []

def train_one_step(model, optimizer):
    if step == crash_at:
        os._exit(1)
    steps_made.append(step)
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_loop(folder: Path, *, crash_at: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the README's loop in ``folder``. It prints its first and last step and a sum of the weights."""
    folder.mkdir(exist_ok=True)
    (loop,) = [block for block in code_blocks("python") if "CheckpointManager" in block]
    told = "\nprint(steps_made[0], steps_made[-1], model.weight.sum().item())"
    command = [sys.executable, "-c", f"import os, sys\n{LOOP_OF_SOMEBODY}\n{loop}{told}", str(crash_at)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_loop_of_the_readme_saves_and_resumes_as_if_nothing_had_happened(tmp_path: Path):
    whole = run_loop(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    first, last, weights = whole.stdout.split()
    assert (first, last) == ("1", "30")

    assert run_loop(tmp_path / "crashed", crash_at=25).returncode == 1
    resumed = run_loop(tmp_path / "crashed")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split() == ["21", "30", weights]


def commands() -> list[str]:
    return [line for block in code_blocks("sh") for line in block.splitlines() if "run_train.sh" in line]


@pytest.mark.parametrize("command", commands())
def test_the_options_of_each_command_exist(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their folders are the reader's; the options and the layout must be right."""
    words = shlex.split(command.partition("#")[0])
    environment = dict(word.split("=", 1) for word in words[: words.index("./run_train.sh")])
    flags = words[words.index("./run_train.sh") + 1 :]
    config_file = (ROOT / environment.get("CONFIG_FILE", "configs/debug_cpu.toml")).resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets/hf/Llama-3.1-8B").mkdir(parents=True)
    (tmp_path / "my_text").mkdir()
    (tmp_path / "my_text" / "a.txt").touch()
    argv = ["--job.config_file", str(config_file), *flags]
    if "--help" in flags:
        with pytest.raises(SystemExit):
            load_config(argv, 2)
    else:
        load_config(argv, int(environment.get("NGPU", "2")))


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", "\n".join(code_blocks("sh")), flags=re.MULTILINE)
    assert {"setup", "train", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
