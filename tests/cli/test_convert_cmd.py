"""``milepost convert`` and ``export``, and torchtitan's command lines for them."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from milepost.cli.convert_cmd import parse_size
from milepost.cli.main import COMMANDS, build_parser, main
from milepost.errors import ConfigError
from milepost.saving.save import save
from milepost.train.models import build_model

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODEL = ["--model", "llama3", "--flavor", "debugmodel"]


@pytest.fixture
def run_folder(memory_path: Path) -> Path:
    """A run with the steps 10 and 20 of the debug model, as the trainer saves them."""
    folder = memory_path / "outputs" / "checkpoint"
    model = build_model("llama3", "debugmodel", vocab_size=256, seq_len=16)
    for step in (10, 20):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, step)
        save(folder / f"step-{step}", {**model.state_dict(), "train_state": {"step": step}}, step=step)
    return folder


def test_convert_prints_what_it_did(run_folder: Path, memory_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(memory_path / "hf")
    assert main(["convert", str(run_folder / "step-20"), out, "--to", "hf", *MODEL, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: llama3 debugmodel, 57 tensors, ")
    assert "matched their digests" in printed
    assert "verified: converted back, every tensor equals the source" in printed
    assert "note: the vocabulary has 256 entries; the published model's has 2048" in printed
    assert json.loads((memory_path / "hf" / "config.json").read_text())["vocab_size"] == 256


def test_convert_reports_as_json(run_folder: Path, memory_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["convert", str(run_folder / "step-20"), str(memory_path / "m.pt"), "--to", "pt", *MODEL, "--json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source_kind"], report["num_tensors"], report["verified"]) == ("dcp", 57, False)
    assert set(torch.load(memory_path / "m.pt", weights_only=True)["norm.weight"].tolist()) == {20.0}


def test_export_takes_the_newest_step_or_the_one_asked_for(
    run_folder: Path, memory_path: Path, capsys: pytest.CaptureFixture[str]
):
    (run_folder / "step-30").mkdir()  # never committed
    for options, step in (([], 20.0), (["--step", "10"], 10.0)):
        out = memory_path / f"{step}.pt"
        assert main(["export", str(run_folder.parent), str(out), "--to", "pt", *MODEL, *options]) == 0
        assert torch.load(out, weights_only=True)["norm.weight"][0] == step
    assert main(["export", str(run_folder), str(memory_path / "x"), *MODEL, "--step", "30"]) == 3
    assert "no usable step 30; usable are 10, 20" in capsys.readouterr().err


def test_what_does_not_fit_ends_with_status_8_and_no_traceback(
    run_folder: Path, memory_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["convert", str(run_folder / "step-20"), str(memory_path / "x"), "--to", "hf"]
    assert main([*argv, "--model", "llama3", "--flavor", "8B"]) == 8
    assert "does not hold this llama3 model" in capsys.readouterr().err
    assert main(argv) == 2
    assert main([*argv, "--model", "llama3", "--flavor", "9B"]) == 2
    assert "8B" in capsys.readouterr().err
    assert not (memory_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("512MiB", 512 << 20), ("1.5 kb", 1500), ("100", 100), ("2TiB", 2 << 40)],
)
def test_sizes_are_read(text: str, nbytes: int):
    assert parse_size("--max-shard-size", text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0"])
def test_an_invalid_size_is_refused(text: str):
    with pytest.raises(ConfigError, match="such as 5GB"):
        parse_size("--max-shard-size", text)


@pytest.mark.parametrize("folder", ["checkpoint_conversion", "."])
def test_the_command_lines_of_torchtitans_docs_work(run_folder: Path, memory_path: Path, folder: str):
    def run(script: str, *args: str) -> None:
        command = [sys.executable, str(SCRIPTS / folder / script), *args]
        names = ["--model_name", "llama3", "--model_flavor", "debugmodel"]
        done = subprocess.run([*command, *names], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    hf, back = str(memory_path / "hf"), str(memory_path / "step-0")
    run("convert_to_hf.py", str(run_folder / "step-20"), hf, "--export_dtype", "bfloat16")
    assert json.loads((memory_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    run("convert_from_hf.py", hf, back)
    again = str(memory_path / "again")
    run("convert_to_hf.py", back, again, "--hf_assets_path", hf)
    assert sorted(os.listdir(again)) == sorted(os.listdir(hf))


@pytest.mark.skipif(not (SCRIPTS.parent / ".venv").is_dir(), reason="installed elsewhere than in .venv")
@pytest.mark.parametrize("script", ["convert_from_hf.py", "checkpoint_conversion/convert_to_hf.py"])
def test_the_scripts_find_the_environment_of_the_repository_by_themselves(script: str):
    """Started by a Python that has no milepost, from anywhere."""
    command = [sys.executable, "-S", str(SCRIPTS / script), "/nowhere", "/x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    assert done.returncode == 3, done.stderr
    assert "/nowhere does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_line_of_the_documentation_is_understood():
    text = (SCRIPTS.parent / "docs" / "conversion.md").read_text()
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("milepost ")]
    assert len(lines) >= 5
    for argv in lines:
        args = build_parser({argv[0]: importlib.import_module(COMMANDS[argv[0]].module)}).parse_args(argv)
        assert args.command == argv[0]
    for option in re.findall(r"`(--[a-z-]+)", text):
        assert any(
            option in (SCRIPTS.parent / "src/milepost/cli" / f).read_text() for f in ("convert_cmd.py", "export_cmd.py")
        )
