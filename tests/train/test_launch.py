"""``run_train.sh`` from outside: its exit status and its output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from milepost.errors import ConfigError
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


def send_at(run: subprocess.Popen[str], *signals: tuple[str, signal.Signals]) -> str:
    """Send each signal when a line with its text comes, in this order; all that was printed."""
    assert run.stdout is not None
    lines, waiting = [], list(signals)
    for line in run.stdout:
        lines.append(line)
        if waiting and waiting[0][0] in line:
            run.send_signal(waiting.pop(0)[1])
            if not waiting:
                break
    rest, _ = run.communicate(timeout=60)
    return "".join(lines) + rest


def test_ctrl_c_saves_and_a_save_request_to_the_launcher_reaches_the_ranks(tmp_path: Path):
    """SIGUSR1, Ctrl-C, the same command again, then the signal that a cluster sends before it reclaims the machine."""
    run = start(tmp_path, *SMALL)
    # The first one is sent long before it can be handled.
    out = send_at(run, ("data: ", signal.SIGUSR1), ("saved step 1 (SIGUSR1, full)", signal.SIGINT))
    assert run.returncode == 130, out
    (stopped,) = re.findall(r"stopped by SIGINT after step (\d+); the same command resumes from there", out)
    assert re.search(rf"SIGINT: saving (after step {stopped}|at the next step), then stopping; Ctrl-C again", out), out
    assert f"saved step {stopped} (SIGINT, full)" in out
    assert "Traceback" not in out

    run = start(tmp_path, *SMALL)
    out = send_at(run, (f"step {int(stopped) + 1}/", signal.SIGTERM))
    assert run.returncode == 143, out
    assert re.search(rf"resumed from \S+/step-{stopped} \(full\): {stopped} steps? (is|are) done", out), out
    assert out.count("stopped by SIGTERM after step") == 1
    assert re.search(r"saved step \d+ \(SIGTERM", out)
    assert "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_lost_connection_saves_first_and_under_nohup_changes_nothing(tmp_path: Path, ignored: bool):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # inherited by the run
    try:
        run = start(tmp_path, *SMALL, "--training.steps=8", "--checkpoint.interval=100")
    finally:
        signal.signal(signal.SIGHUP, before)
    out = send_at(run, ("step 2/", signal.SIGHUP))
    assert run.returncode == (0 if ignored else 129), out
    assert ("stopped by SIGHUP after step" in out) is not ignored
    assert ("saved step 8 (last step" in out) is ignored


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path):
    run = start(tmp_path, *SMALL, "--checkpoint.interval=1000", NGPU="1")
    assert run.stdout is not None
    lines = iter(run.stdout)
    assert any("step 1/" in line for line in lines)
    (rank,) = psutil.Process(run.pid).children()
    rank.suspend()  # stuck, as in a collective that never ends
    run.send_signal(signal.SIGINT)
    time.sleep(0.5)
    started = time.monotonic()
    run.send_signal(signal.SIGINT)
    out = "".join(lines)
    assert run.wait(30) == 130
    assert time.monotonic() - started < 10
    assert "stopped at once by a second SIGINT" in out
    assert "Traceback" not in out


def test_an_error_on_every_rank_is_reported_once_whichever_rank_is_shown(tmp_path: Path):
    (tmp_path / "checkpoint" / "step-5").mkdir(parents=True)
    run = start(tmp_path, *SMALL, "--checkpoint.load_step=7", LOG_RANK="1")
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 3, out
    assert out.count("error: ") == 1
    assert out.count("checkpoint.load_step = 7") == 1
    assert "Traceback" not in out
    assert "exitcode" not in out, "torchrun's own log"


def test_a_mistake_in_the_configuration_is_reported_before_anything_is_started(tmp_path: Path):
    started = time.monotonic()
    run = start(tmp_path / "out", "--training.stepz=4", "--parallelism.tensor_parallel_degree=3")
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert out.startswith("error: 2 problems:\n  - --training.stepz: there is no such option; did you mean")
    assert "2 ranks can't be divided by 3" in out
    assert "Traceback" not in out
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - started < 30


def test_under_plain_torchrun_a_mistake_is_reported_by_one_rank_before_torch_is_loaded():
    command = [sys.executable, "-X", "importtime", "-m", "milepost.train", "--training.steps", "0"]
    outputs = []
    for rank in ("0", "1"):
        environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        outputs.append(done.stderr)
    assert "error: --training.steps: training.steps must be at least 1, not 0" in outputs[0]
    assert "error" not in outputs[1].replace("milepost.errors", "").replace("system_errors", "").replace(
        "store_errors", ""
    )
    assert not any(line.endswith("| torch") for line in "".join(outputs).splitlines())


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ("--nproc_per_node two", r"NGPU \(--nproc_per_node\) must be the number of processes .*, not 'two'"),
        ("--nproc_per_node 0", r"at least 1, .* not '0'"),
        ("--nproc_per_node -1", r"at least 1, .* not '-1'"),
        ("--nproc_per_node 1.5", r"at least 1, .* not '1.5'"),
        ("--nnodes 0", r"--nnodes must be a number of nodes, or MIN:MAX, not '0'"),
        ("--nnodes 4:2", r"--nnodes must be a number of nodes, or MIN:MAX, not '4:2'"),
    ],
)
def test_a_number_of_ranks_that_is_none_is_refused(args: str, problem: str):
    with pytest.raises(ConfigError, match=problem):
        world_size(args.split())


@pytest.mark.parametrize("shown", ["2", "one", "0;1", ""])
def test_a_log_rank_that_shows_nothing_is_refused(shown: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOG_RANK", shown)
    with pytest.raises(ConfigError, match="LOG_RANK"):
        world_size(["--nproc_per_node", "2"])


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


def test_options_that_torchrun_does_not_have_are_refused_in_a_line(tmp_path: Path):
    run = start(tmp_path, *SMALL, TORCHRUN_ARGS="--max-restart 3 --nnodesz 1")
    out, _ = run.communicate(timeout=60)
    assert (run.returncode, out) == (
        2,
        "error: torchrun does not understand its options (TORCHRUN_ARGS): unrecognized arguments: --nnodesz\n",
    )


def test_the_options_of_torchrun_and_of_the_trainer_are_distinguished():
    assert split_args(["--nnodes", "2", "--", "--a.b", "--"]) == (["--nnodes", "2"], ["--a.b", "--"])
    assert split_args(["--nnodes"]) == (["--nnodes"], [])
