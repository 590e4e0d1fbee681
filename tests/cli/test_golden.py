"""The exact output of each command, against golden files that a person has reviewed."""

from __future__ import annotations

import itertools
import os
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from golden_files import compare
from zoo import NOW, age_by_a_version, make_branched, make_zoo, save, save_model, stable

from milepost.cli.main import COMMANDS, main
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

RESULTS = {
    "ls": "ls run",
    "ls.json": "ls run --json",
    "inspect": "inspect run/step-600",
    "inspect-tensors": "inspect run/step-600 --tensors 'layers.*'",
    "inspect-shards": "inspect run/step-600 --tensors 'layers.0.attention.w?.weight' --shards",
    "inspect-external": "inspect run/step-300 --tensors '*norm*' --shards",
    "inspect.json": "inspect run/step-600 --tensors 'norm.*' --shards --json",
    "verify": "verify run/step-600",
    "verify-run": "verify run --level sizes",
    "verify.json": "verify run/step-400 --level sizes --json",
    "diff": "diff run/step-100 run/step-600 --quick",
    "diff-same": "diff run/step-600 run/step-600 --values",
    "diff-values": "diff run/step-100 run/step-600 --values",
    "diff-kinds": "diff run/step-600 other/step-1 --values",
    "diff-external": "diff run/step-300 run/step-600 --quick",
    "diff.json": "diff run/step-100 run/step-600 --values --json",
    "stats": "stats run/step-600 'layers.*' norm.weight",
    "stats.json": "stats run/step-600 norm.weight --json",
    "show": "show run/step-600 layers.0.attention.wq.weight '0:2, -3:'",
    "show.json": "show run/step-600 norm.weight --json",
    "report": "report run -o report.html",
    "plan-resume": "plan-resume run/step-600 --world-size 4 --degrees tp=2",
    "plan-resume-same": "plan-resume run/step-600 --world-size 2",
    "plan-resume-misfit": "plan-resume run/step-700 --world-size 3 --model llama3 --flavor debugmodel",
    "plan-resume.json": "plan-resume run/step-600 --world-size 2 --json",
    "pin": "pin run/step-600 run/step-200",
    "pin.json": "pin run/step-600 run/step-200 --json",
    "unpin": "unpin run/step-200",
    "unpin.json": "unpin run/step-200 --json",
    "prune": "prune run --keep-latest 1",
    "prune-dry-run": "prune run --keep-latest 1 --keep-every 600 --keep-daily 2 --dry-run",
    "ls-branches": "ls branched",
    "prune-branches": "prune branched --keep-latest 1 --keep-best 2 --metric loss --dry-run",
    "prune.json": "prune run --keep-latest 2 --dry-run --json",
    "convert": "convert model/step-7 out.pt --to pt --model llama3 --flavor debugmodel --verify",
    "convert.json": "convert model/step-7 out --to hf --model llama3 --flavor debugmodel --json",
    "merge": "merge run/step-600 run/step-200 --to merged --weights 3,1",
    "merge-base": "merge run/step-600 run/step-200 --base run/step-100 --to merged.pt --method ties --dtype bf16",
    "merge.json": "merge branched --last 2 --to merged --method slerp --json",
    "sync": "sync run/step-600 copies",
    "sync.json": "sync run/step-600 copies --json",
    "export.json": "export model exported --to dcp --model llama3 --flavor debugmodel --json",
    "export": "export model exported --model llama3 --flavor debugmodel --dtype bfloat16",
}

MISTAKES = [
    "ls nowhere",
    "ls ftp://host/run",
    "ls model/step-7/milepost.json",
    "inspect run",
    "inspect run/step-800",
    "inspect run/step-999",
    "inspect run/step-500",
    "inspect run/step-600 --tensors 'no.such.*'",
    "verify run/step-999",
    "verify run --threads 0",
    "diff run/step-600",
    "diff run run/step-600",
    "diff run/step-600 nothing",
    "diff run/step-600 run/step-100 --model llama3",
    "diff run/step-600 run/step-400",
    "stats run/step-600 norms.weight",
    "stats nowhere",
    "show run/step-600 norm.weight 9",
    "show run/step-600 norm.weight 0:2,1",
    "report run/notes",
    "report run -o nowhere/report.html",
    "pin run/step-999",
    "pin run",
    "unpin run/step-600",
    "unpin run/notes",
    "prune run",
    "prune run --keep-latest 0 --keep-every -1 --keep-hourly -2 --keep-within soon",
    "prune nowhere --keep-latest 1",
    "plan-resume run/step-600",
    "plan-resume run/step-600 --world-size 3 --degrees tp=2",
    "plan-resume run/step-600 --world-size 4 --degrees tp=2,tp=4,xp=1,pp=many",
    "plan-resume run/step-600 --world-size 0 --stages-per-rank 0",
    "plan-resume run/step-600 --world-size 1000000",
    "plan-resume run/step-600 --world-size 2 --model llama4 --flavor 8B",
    "convert run/step-600 out --to hf",
    "convert run/step-600 out --to onnx",
    "convert model/step-7 out --to hf --model llama3 --flavor 9B",
    "convert model/step-7 model --to hf --model llama3 --flavor debugmodel",
    "convert model/step-7 out --to hf --model llama3 --flavor debugmodel --max-shard-size huge",
    "merge run/step-600 --to out --weights 1,2 --decay 0.5",
    "merge run/step-600 model/step-7 other/step-1 --to out",
    "merge run/step-600 run/step-100 --to out --weights heavy",
    "merge run/step-600 run/step-400 --to out",
    "merge run --to out --last 20",
    "merge run run/step-600 --to out",
    "merge run/step-600 run/step-100 --to run",
    "sync run/step-600 copies/step-500",
    "sync run/step-300 copies",
    "sync nowhere copies",
    "export run out --step 5",
    "export nowhere out",
    "resume-test no-such.toml --steps 3 --kill-at 3 --tolerance -1 --set seq_len",
    "resume-test notes.toml --layouts fsdp2xqp3",
    "completion tcsh",
    "no-such-command",
]


@pytest.fixture
def root(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(memory_path)
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setenv("COLUMNS", "100")
    ids = (f"{number:016x}" for number in itertools.count())  # sizes depend on the CRCs of files that name them
    monkeypatch.setattr("milepost.testing.sample.new_save_id", lambda: next(ids))
    storage = make_zoo(memory_path)
    for step in (300,):
        os.utime(f"run/step-{step}/.metadata", (NOW - 5 * 3600, NOW - 5 * 3600))
    save_arrays(storage, "other/step-1", {"norm.weight": np.ones(8, "float16"), "w": np.ones((2, 3), "int8")}, now=NOW)
    save_model(storage, "model/step-7")
    make_branched(storage)
    Path("notes.toml").write_text("[training]\n")
    return memory_path


def run(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as ended:  # argparse ends the program itself
        return int(ended.code or 0)


@pytest.mark.parametrize("name", RESULTS)
def test_what_a_command_prints(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(shlex.split(RESULTS[name]))
    captured = capsys.readouterr()
    assert captured.err == ""
    shown = f"$ milepost {RESULTS[name]}\n{captured.out}(exit status {status})\n"
    compare(f"{name}.txt", stable(shown, root))


def test_what_a_users_mistake_is_answered_with(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for line in MISTAKES:
        status = run(shlex.split(line))
        captured = capsys.readouterr()
        assert (status > 0, captured.out) == (True, "")
        assert "Traceback" not in captured.err
        complaint = captured.err.partition("milepost: error: ")[2] or captured.err.rpartition("error: ")[2]
        answers.append(f"$ milepost {line}\n{complaint}(exit status {status})\n")
    compare("mistakes.txt", stable("\n".join(answers), root))


def test_every_command_is_shown() -> None:
    shown = {line.split()[0] for line in RESULTS.values()} | {"resume-test", "completion"}  # have tests of their own
    assert shown == set(COMMANDS)
    wrong = {line.split()[0] for line in MISTAKES if line}
    assert set(COMMANDS) <= wrong


def test_every_command_with_a_result_prints_it_as_json_too() -> None:
    as_json = {line.split()[0] for name, line in RESULTS.items() if name.endswith(".json")} | {"resume-test"}
    assert as_json == set(COMMANDS) - {"completion", "report"}  # the page is the result


def test_a_step_of_a_newer_version_is_distinguished_from_damage(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(LocalStorage(root), "new/step-1", 1, NOW)
    age_by_a_version(Path("new/step-1/milepost.json"))
    assert run(["verify", "new/step-1"]) == 11
    assert "written by a newer Milepost (format 3; this one reads up to 2): upgrade Milepost" in capsys.readouterr().out
    assert run(["ls", "new"]) == 0
    listed = capsys.readouterr().out
    assert "newer" in listed
    assert "damaged" not in listed
    assert run(["inspect", "new/step-1"]) == 5
    assert "upgrade Milepost" in capsys.readouterr().err
