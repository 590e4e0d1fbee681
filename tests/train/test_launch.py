"""``run_train.sh`` from outside: its exit status and what is on the screen."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milepost.train.launch import split_args, world_size

ROOT = Path(__file__).parents[2]

SMALL = [
    "--training.seq_len=32",
    "--training.local_batch_size=1",
    "--training.steps=1000",
    "--metrics.log_freq=1",
    "--checkpoint.interval=3",
]


def start(folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "NGPU": "2", "PYTHON": sys.executable, **environment}
    return subprocess.Popen(
        [ROOT / "run_train.sh", "--job.dump_folder", folder, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop_at(run: subprocess.Popen[str], line_part: str, number: signal.Signals) -> str:
    """Send a signal when a line with ``line_part`` comes; all that was printed."""
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line_part in line:
            run.send_signal(number)
            break
    rest, _ = run.communicate(timeout=60)
    return "".join(lines) + rest


def test_stopped_by_hand_and_by_the_system_it_ends_cleanly_and_goes_on(tmp_path: Path):
    """Ctrl-C, the same command again, then what a cluster sends before it takes the machine."""
    run = start(tmp_path, *SMALL)
    out = stop_at(run, "step 4/", signal.SIGINT)
    assert run.returncode == 130, out
    assert out.count("stopped by SIGINT") == 1
    assert "Traceback" not in out

    run = start(tmp_path, *SMALL)
    out = stop_at(run, "step 5/", signal.SIGTERM)
    assert run.returncode == 143, out
    assert "resumed from" in out
    assert "3 steps are done" in out
    assert "step 3/" not in out
    assert out.count("stopped by SIGTERM after step") == 1
    assert re.search(r"saved step \d+ \(SIGTERM", out)
    assert "Traceback" not in out


def test_an_error_on_every_rank_is_told_once_whichever_rank_is_shown(tmp_path: Path):
    (tmp_path / "checkpoint" / "step-5").mkdir(parents=True)
    run = start(tmp_path, *SMALL, "--checkpoint.load_step=7", LOG_RANK="1")
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 3, out
    assert out.count("error: ") == 1
    assert out.count("checkpoint.load_step = 7") == 1
    assert "Traceback" not in out


def test_a_mistake_in_the_configuration_is_told_before_anything_is_started(tmp_path: Path):
    started = time.monotonic()
    run = start(tmp_path / "out", "--training.stepz=4", "--parallelism.tensor_parallel_degree=3")
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert out.startswith("error: 2 problems:\n  - --training.stepz: there is no such option; did you mean")
    assert "2 ranks can't be divided by 3" in out
    assert "Traceback" not in out
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - started < 30


def test_under_plain_torchrun_a_mistake_is_told_by_one_rank_before_torch_is_loaded():
    command = [sys.executable, "-X", "importtime", "-m", "milepost.train", "--training.steps", "0"]
    outputs = []
    for rank in ("0", "1"):
        environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        outputs.append(done.stderr)
    assert "error: --training.steps: training.steps must be at least 1, not 0" in outputs[0]
    assert "error" not in outputs[1].replace("milepost.errors", "")
    assert not any(line.endswith("| torch") for line in "".join(outputs).splitlines())


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ("--nproc_per_node 2", 2),
        ("--nproc-per-node=4 --nnodes 2", 8),
        ("--nproc_per_node 2 --nnodes 1 --nnodes 3", 6),
        ("--nproc_per_node gpu", None),
        ("--nnodes 1:4 --nproc_per_node 8", None),
        ("", 1),
    ],
)
def test_the_world_size_is_read_from_the_options_of_torchrun(args: str, size: int | None):
    assert world_size(args.split()) == size


def test_the_options_of_torchrun_and_of_the_trainer_are_told_apart():
    assert split_args(["--nnodes", "2", "--", "--a.b", "--"]) == (["--nnodes", "2"], ["--a.b", "--"])
    assert split_args(["--nnodes"]) == (["--nnodes"], [])
