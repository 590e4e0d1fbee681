"""The trainer, and FSDP2 over NCCL, on the GPU that this machine has: killed, resumed, compared bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

ROOT = Path(__file__).parents[2]
ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_fsdp_resumes_over_nccl(backend: str):
    command = [sys.executable, str(Path(__file__).with_name("fsdp_rank.py")), backend]
    ended = subprocess.run(
        command, env={**os.environ, **ALONE}, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.strip().endswith("exact")


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_the_trainer_resumes_on_the_gpu_as_if_it_had_not_been_killed(mode: str, tmp_path: Path):
    settings = ["training.deterministic=true", "training.mixed_precision_param=bfloat16"]
    command = [sys.executable, "-m", "milepost.cli.main", "resume-test", "configs/debug_cpu.toml"]
    command += ["--layouts", "1", "--steps", "8", "--folder", str(tmp_path / "runs")]
    for setting in [*settings, f"checkpoint.async_mode={mode}"]:
        command += ["--set", setting]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert "1 x cuda" in (tmp_path / "runs" / "trainer.log").read_text()
