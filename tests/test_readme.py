"""The README's examples work exactly as printed."""

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

SOMEBODYS_CODE = """
import os, sys
import torch

torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
num_steps = 30
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


def test_the_loop_of_the_readme_saves_and_resumes_as_if_nothing_had_happened(tmp_path: Path):
    """Three runs, each in a fork of one process that has imported torch: uninterrupted, crashed at step 25, resumed."""
    (loop,) = [block for block in code_blocks("python") if "CheckpointManager" in block]
    runs = tmp_path / "runs.py"
    runs.write_text(
        "import os, torch._dynamo, milepost; milepost.CheckpointManager\n"  # all that a run imports by and by
        f"code = {SOMEBODYS_CODE + loop + 'print(steps_made[0], steps_made[-1], model.weight.sum().item())'!r}\n"
        "for folder, crash_at in (('whole', 0), ('stopped', 25), ('stopped', 0)):\n"
        "    os.makedirs(folder, exist_ok=True)\n"
        "    if (pid := os.fork()) == 0:\n"
        "        os.chdir(folder)\n"
        "        exec(code)\n"
        "        raise SystemExit\n"
        "    os.waitpid(pid, 0)\n"
    )
    done = subprocess.run([sys.executable, "-u", runs], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole, resumed = done.stdout.splitlines()
    assert whole.split()[:2] == ["1", "30"]
    assert resumed.split() == ["21", "30", whole.split()[2]]


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
