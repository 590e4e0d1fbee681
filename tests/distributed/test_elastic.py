"""A job whose ranks die, or that restarts with other ranks, equals the undisturbed job."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.run import get_args_parser

from milepost.run.catalog import scan
from milepost.run.checkpoint_record import read_manifest
from milepost.storage import LocalStorage
from milepost.testing.world import run_world
from milepost.train.config import TrainConfig
from milepost.train.loop import Trainer
from milepost.train.options import load_config
from milepost.train.process import show_log

ROOT = Path(__file__).parents[2]
NUM_STEPS = 9
GLOBAL_BATCH = 4
SEQ_LEN = 32


def flags(folder: Path, **more: Any) -> list[str]:
    """The options of a run, ``more`` with ``__`` for the dot."""
    options = {
        "job.dump_folder": folder,
        "training.steps": NUM_STEPS,
        "training.seq_len": SEQ_LEN,
        "training.global_batch_size": GLOBAL_BATCH,
        "training.local_batch_size": 1,
        "training.mixed_precision_param": "float32",
        "lr_scheduler.warmup_steps": 3,
        "metrics.log_freq": 1,
        "checkpoint.enable": "true",
        "checkpoint.interval": 3,
        "checkpoint.last_save_model_only": "false",
    }
    options |= {name.replace("__", "."): value for name, value in more.items()}
    return [f"--{name}={value}" for name, value in options.items()]


@dataclass
class Segment:
    """One rank's results of a run between two starts."""

    dp_rank: int
    samples: dict[int, int] = field(default_factory=dict)
    """Global count -> sample, of those that this rank read."""
    losses: dict[int, float] = field(default_factory=dict)


def _train(config: TrainConfig, stop_after: int | None = None) -> Segment:
    """On every rank: train to the end, or until SIGTERM comes to the last rank in step ``stop_after``."""
    show_log()
    trainer = Trainer(config)
    segment = Segment(trainer.model.meshes.dp_rank)
    samples, log = trainer.data.order.samples, trainer.meter.log

    def watched_samples(counts):
        found = samples(counts)
        segment.samples.update(zip(counts.tolist(), found.tolist(), strict=True))
        return found

    def watched_log(figures, **rest):
        segment.losses[figures.step] = figures.loss
        if figures.step == stop_after and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        log(figures, **rest)

    trainer.data.order.samples, trainer.meter.log = watched_samples, watched_log  # type: ignore[method-assign]
    trainer.run()
    return segment


def test_every_sample_comes_once_whatever_ranks_the_job_comes_back_with(
    memory_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two data-parallel ranks, then four, then none: two tensor-parallel ones. Over the end of an epoch."""
    text, num_samples, num_steps = memory_path / "words.txt", 21, 6
    text.write_text(" ".join(f"word{n}" for n in range(200))[: num_samples * SEQ_LEN + 1])
    common = {"training__dataset_path": text, "training__steps": num_steps, "checkpoint__interval": 100}

    (whole,) = run_world(_train, 1, load_config(flags(memory_path / "whole", **common), 1))
    assert sorted(whole.samples) == list(range(num_steps * GLOBAL_BATCH))
    assert sorted(whole.samples[count] for count in range(num_samples)) == list(range(num_samples))

    layouts: list[tuple[int, int | None, dict[str, int]]] = [
        (2, 2, {"data_parallel_shard": 2}),
        (4, 4, {"data_parallel_replicate": 2, "data_parallel_shard": 2}),
        (2, None, {"data_parallel_shard": 1, "tensor_parallel": 2}),
    ]
    seen: dict[int, int] = {}
    for world_size, stop_after, degrees in layouts:
        more = {f"parallelism__{axis}_degree": degree for axis, degree in degrees.items()}
        config = load_config(flags(memory_path / "elastic", **common, **more), world_size)
        ranks = run_world(_train, world_size, config, stop_after)
        readers = {segment.dp_rank: segment.samples for segment in ranks}
        assert all(readers[segment.dp_rank] == segment.samples for segment in ranks)
        for samples in readers.values():
            assert seen.keys().isdisjoint(samples), "a sample was used twice"
            seen |= samples
        for segment in ranks:
            assert segment.losses == pytest.approx({n: whole.losses[n] for n in segment.losses}, abs=1e-5)
        is_logged = (
            "saved under other degrees of parallelism: each rank's random generators were reseeded"
            in capfd.readouterr().out
        )
        assert is_logged == (world_size != 2 or stop_after is None)
    assert seen == whole.samples


# Jobs under torchrun, whose ranks are killed.


@dataclass
class Agent:
    """A running ``run_train.sh``: torchrun's agent of one node, and its ranks. Its output goes to a file."""

    process: subprocess.Popen[bytes]
    output: Path

    def ranks(self) -> list[int]:
        """The processes of its ranks, in their order."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sorted(int(pid) for thread in threads for pid in (thread / "children").read_text().split())

    def kill(self) -> None:
        """Kill it and its ranks at once, like a power cut of the machine."""
        if self.process.poll() is None:
            for pid in [self.process.pid, *self.ranks()]:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, text: str, timeout_s: float = 100.0) -> None:
        """Return as soon as ``text`` is in the output."""
        deadline = time.monotonic() + timeout_s
        while text not in (output := self.output.read_text()):
            assert self.process.poll() is None, f"it ended before '{text}':\n{output}"
            assert time.monotonic() < deadline, f"no '{text}' in {timeout_s:.0f} s:\n{output}"
            time.sleep(0.005)

    def finish(self, timeout_s: float = 100.0) -> str:
        """All output of an agent, which must exit with status 0."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not done in {timeout_s:.0f} s:\n{self.output.read_text()}")
        assert status == 0, self.output.read_text()
        return self.output.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Starts agents of one job, whose folder is ``tmp_path``; none outlives the test."""
    agents: list[Agent] = []

    def start_agent(num_ranks: int, torchrun_args: str, **options: Any) -> Agent:
        environment = {**os.environ, "NGPU": str(num_ranks), "PYTHON": sys.executable, "TORCHRUN_ARGS": torchrun_args}
        output = tmp_path / f"agent{len(agents)}.txt"
        command = [ROOT / "run_train.sh", *flags(tmp_path, **options)]
        with output.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        agents.append(Agent(process, output))
        return agents[-1]

    yield start_agent
    for agent in agents:
        agent.kill()


@dataclass(frozen=True)
class Undisturbed:
    """The undisturbed run on two ranks."""

    folder: Path
    losses: dict[int, float]
    contents: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = load_config([f"--job.config_file={ROOT}/configs/debug_cpu.toml", *flags(folder)], 2)
    return Undisturbed(folder, run_world(_train, 2, config)[0].losses, contents(folder))


def contents(folder: Path) -> dict[str, Any]:
    """Everything in the last checkpoint by its digests: weights, optimizer, random generators, data, loss.

    What is attached to a step names each run's own folders and options.
    """
    manifest = read_manifest(LocalStorage(folder), f"checkpoint/step-{NUM_STEPS}")
    tensors = {key: [(s.box, s.crc32) for s in entry.shards] for key, entry in manifest.tensors.items()}
    objects = {key: entry.crc32 for key, entry in manifest.objects.items() if not key.startswith("attached.")}
    return tensors | objects


def check_losses(output: str, expected: dict[int, float]) -> None:
    """All losses that were printed, before a kill and after it, are the expected ones, and there are all of them."""
    found = [(int(step), float(loss)) for step, loss in re.findall(r"step (\d+)/\d+  loss (\d+\.\d+)", output)]
    assert {step for step, _ in found} == expected.keys(), output
    for step, loss in found:
        assert loss == pytest.approx(expected[step], abs=1e-4), output


def test_a_killed_rank_is_started_again_and_the_job_resumes_by_itself(
    start: Callable[..., Agent], tmp_path: Path, undisturbed: Undisturbed
) -> None:
    step, victim = random.randint(4, 6), random.randint(0, 1)
    agent = start(2, "--max-restarts 1")
    agent.wait_for(f"step {step}/")
    os.kill(agent.ranks()[victim], signal.SIGKILL)
    output = agent.finish()
    assert f"local rank {victim} was killed by SIGKILL\nrestarting all ranks; restarts left: 0\n" in output
    assert re.search(r"resumed from .*/step-\d \(full\): [36] steps are done", output), output
    check_losses(output, undisturbed.losses)
    assert contents(tmp_path) == undisturbed.contents


def test_load_step_begins_a_branch_once_in_a_job_that_is_started_again(
    start: Callable[..., Agent], tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """Back from the last step to the third; a rank is killed after the sixth, and all ranks are started again."""
    shutil.copytree(undisturbed.folder / "checkpoint", tmp_path / "checkpoint", dirs_exist_ok=True)
    abandoned = {entry.step: entry.save_id for entry in scan(LocalStorage(tmp_path), "checkpoint")}
    assert sorted(abandoned) == [3, 6, 9]
    back = {"checkpoint__load_step": 3, "checkpoint__restart_branch": "true", "checkpoint__keep_latest_k": 2}
    agent = start(2, "--max-restarts 1", **back)
    agent.wait_for("step 7/")
    os.kill(agent.ranks()[0], signal.SIGKILL)
    output = agent.finish()
    assert re.findall(r"resumed from .*/step-(\d) ", output) == ["3", "6"], output
    assert "checkpoint.load_step = 3: resuming from a later step that descends from it" in output
    check_losses(output, {step: loss for step, loss in undisturbed.losses.items() if step > 3})
    assert contents(tmp_path) == undisturbed.contents
    left = {entry.step: entry.save_id for entry in scan(LocalStorage(tmp_path), "checkpoint")}
    assert sorted(left) == [6, 9]
    assert all(abandoned[step] != left[step] for step in left)


def meeting(nodes: str) -> Iterator[str]:
    """The options of each agent of a job of N nodes, all on this machine; the first hosts the rendezvous."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{sock.getsockname()[1]}"
    for number in itertools.count():
        yield (
            f"--nnodes {nodes} --max-restarts 3 --rdzv_id test --rdzv_endpoint {endpoint} --local-addr 127.0.0.1 "
            f"--rdzv-conf last_call_timeout=2,is_host={number == 0}"
        )


def test_a_rank_killed_on_another_node_is_started_again_on_both(
    start: Callable[..., Agent], tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """Saved in the background, by processes that outlive the rank."""
    step, options = random.randint(4, 6), meeting("2")
    agents = [start(1, next(options), checkpoint__async_mode="async_with_pinned_mem") for _ in range(2)]
    agents[0].wait_for(f"step {step}/")
    os.kill(agents[1].ranks()[0], signal.SIGKILL)
    outputs = [agent.finish() for agent in agents]
    assert "local rank 0 was killed by SIGKILL" in outputs[1]
    assert all("resumed from" in output for output in outputs)
    check_losses(outputs[0], undisturbed.losses)
    assert contents(tmp_path) == undisturbed.contents


@pytest.mark.slow
def test_a_job_continues_without_a_lost_node_and_takes_in_another(
    start: Callable[..., Agent], undisturbed: Undisturbed
) -> None:
    """On two nodes, on one, and on two again; shards and samples are redistributed each time."""
    options = meeting("1:2")
    agents = [start(1, next(options)) for _ in range(2)]
    agents[0].wait_for("step 4/")
    agents[1].kill()
    agents[0].wait_for("on 1 x cpu")
    agents[0].wait_for("step 6/")
    (rank,) = agents[0].ranks()
    os.kill(rank, signal.SIGSTOP)  # or it might be done before the next node has come
    agents.append(start(1, next(options)))
    agents[0].wait_for("1 more node joins: the ranks save, and all are restarted")
    os.kill(rank, signal.SIGCONT)
    output, other = agents[0].finish(), agents[2].finish()
    assert re.search(r"saved step \d \(SIGTERM", output), output
    assert "on 2 x cpu" in other
    check_losses(output, undisturbed.losses)


def test_nodes_that_can_not_meet_say_so_without_a_traceback(start: Callable[..., Agent]) -> None:
    agent = start(1, "--nnodes 2 --rdzv_endpoint 127.0.0.1:1 --rdzv-conf is_host=false,read_timeout=1")
    assert agent.process.wait(100) == 1
    output = agent.output.read_text()
    assert "error: rendezvous of this job's nodes failed: The connection to the C10d store has failed" in output
    assert "Restarted, it resumes" in output
    assert "Traceback" not in output


SLURM = """#!/usr/bin/env bash
case "$(basename "$0") $1" in
    "scontrol show") printf 'node7\\n'; printf 'node%s\\n' $(seq 8 30000) ;;
    "scontrol "*) echo "scontrol: $*" ;;
    "srun "*) printf '%s\\n' "$NGPU" "$TORCHRUN_ARGS" "srun: $*"; exit "$STATUS" ;;
esac
"""
"""Stands in for the commands of Slurm."""


@pytest.mark.parametrize(
    ("status", "extra", "nodes", "requeued"), [(0, {}, "2", False), (143, {"MIN_NODES": "1"}, "1:2", True)]
)
def test_slurm_script_starts_an_agent_on_each_node_and_comes_back_after_the_time_limit(
    tmp_path: Path, status: int, extra: dict[str, str], nodes: str, requeued: bool
) -> None:
    for name in ("srun", "scontrol"):
        command = tmp_path / name
        command.write_text(SLURM)
        command.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "4711"}
    job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "STATUS": str(status), **extra}
    done = subprocess.run(
        [ROOT / "scripts" / "multinode.slurm", "--training.steps", "7"],
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    num_ranks, torchrun_args, srun, *rest = done.stdout.splitlines()
    assert num_ranks == "4"
    assert srun.endswith("./run_train.sh --training.steps 7")
    args = get_args_parser().parse_args([*torchrun_args.split(), "train.py"])
    assert (args.nnodes, args.rdzv_endpoint, args.rdzv_id) == (nodes, "node7:24711", "4711-0")
    assert (args.max_restarts, args.shutdown_timeout) == (10, 270)
    assert ("scontrol: requeue 4711" in rest) == requeued
