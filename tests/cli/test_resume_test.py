"""``milepost resume-test``: kills as documented, detects an inexact resume, and reports failing runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from golden_files import compare

from milepost.cli.main import main
from milepost.report import resume_test
from milepost.report.resume_test import parse_layouts

FAKE = Path(__file__).with_name("fake_trainer.py")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(resume_test, "TRAINER", (sys.executable, str(FAKE)))
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text("[training]\nlocal_batch_size = 2\n")
    return "my.toml"


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_run_that_was_too_fast_to_be_killed_is_killed_again(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AHEAD", "once")
    status, _, err = output(capsys, "resume-test", config)
    assert status == 0
    assert "milepost: resuming from step 3 on" in err
    monkeypatch.setenv("AHEAD", "always")
    status, _, err = output(capsys, "resume-test", config)
    assert status != 0
    assert "in 3 attempts its last step 6 had been saved by then, so there was nothing to resume" in err


@pytest.mark.parametrize("option", ["", "--json"])
def test_an_exact_resume_passes(config: str, capsys: pytest.CaptureFixture[str], option: str) -> None:
    line = f"resume-test {config} --layouts 2,fsdp2 {option}".rstrip()
    status, out, err = output(capsys, *line.split())
    assert err.splitlines() == [
        "milepost: training 6 steps on 2 ranks without interruption",
        "milepost: training again, to be killed after step 4",
        "milepost: resuming from step 3 on 2 ranks",
        "milepost: resuming from step 3 on fsdp2",
    ]
    name = "resume-test.json.txt" if option else "resume-test.txt"
    compare(name, f"$ milepost {line}\n{out}(exit status {status})\n")


def test_a_resume_that_is_not_exact_is_found(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGETFUL", "1")
    status, out, _ = output(capsys, "resume-test", config, "--json", "--layouts", "1,fsdp2", "--tolerance", "1e-6")
    assert status == 9
    report = json.loads(out)
    assert (report["passed"], report["committed_step"], report["killed_after"]) == (False, 3, 4)
    same, other = report["resumed"]
    assert (same["passed"], same["differs_in"]) == (False, ["w"])
    assert (other["passed"], other["differs_in"]) == (False, [])
    assert other["max_abs"] == pytest.approx(1e-3 * 0.75**3, rel=1e-3)


def test_the_runs_can_be_kept(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, _ = output(capsys, "resume-test", config, "--folder", "kept", "--steps", "4", "--kill-at", "2")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "killed",
        "resumed-0",
        "trainer.log",
        "whole",
    ]
    killed = sorted(path.name for path in (tmp_path / "kept/killed/checkpoint").iterdir())
    assert "step-1" in killed
    assert "step-4" not in killed


def test_a_run_that_fails_is_reported_with_what_it_printed(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "import sys; print('the optimizer exploded'); sys.exit(int(sys.argv[1]))"
    monkeypatch.setattr(resume_test, "TRAINER", (sys.executable, "-c", failing, "1"))
    status, out, err = output(capsys, "resume-test", config)
    assert (status, out) == (1, "")
    assert err.endswith(
        "milepost: error: a training run ended with exit status 1. It printed:\nthe optimizer exploded\n"
    )
    monkeypatch.setattr(resume_test, "TRAINER", (sys.executable, "-c", failing, "2"))
    assert output(capsys, "resume-test", config)[0] == 2


def test_layouts_are_degrees_or_a_number_of_ranks() -> None:
    one, other, default = *parse_layouts("fsdp2xtp4,8", 2), *parse_layouts("", 3)
    assert (one.num_ranks, one.degrees) == (8, {"fsdp": 2, "tp": 4})
    assert one.flags()[:4] == [
        "--parallelism.data_parallel_replicate_degree",
        "1",
        "--parallelism.data_parallel_shard_degree",
        "2",
    ]
    assert (other.num_ranks, other.flags()) == (8, [])
    assert default.num_ranks == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_trainer_resumes_exactly(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Five runs under torchrun on two ranks: one whole, one killed, one resumed on each of three layouts."""
    config = Path(__file__).parents[2] / "configs/debug_cpu.toml"
    options = ("--set", "training.local_batch_size=2", "--set", "training.seq_len=64")
    argv = ("resume-test", str(config), "--steps", "4", "--layouts", "fsdp2,tp2,pp2", "--json", *options)
    status, out, _ = output(capsys, *argv)
    report = json.loads(out)
    assert status == 0, report
    assert [(one["layout"], one["is_same_layout"], one["passed"]) for one in report["resumed"]] == [
        ("fsdp2", True, True),
        ("tp2", False, True),
        ("pp2", False, True),
    ]
    assert report["resumed"][0]["loss_difference"] == 0
