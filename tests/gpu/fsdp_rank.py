"""One FSDP2 rank on a GPU, started by ``test_ranks.py``: trains in every mode, resumes, compares; prints ``exact``.

The argument names the backend of the default process group: NCCL alone can't carry what ranks agree on, gloo beside it
can.
"""

from __future__ import annotations

import faulthandler
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

import milepost
from milepost import CheckpointConfig, CheckpointManager

MODES = ("disabled", "async", "async_with_pinned_mem")


def losses(folder: Path, mode: str, until: int, *, offload: bool = False) -> list[float]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    module = module if offload else module.cuda()
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
    )
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    config = CheckpointConfig(interval=1, async_mode=mode, last_save_model_only=False)  # type: ignore[arg-type]
    made = []
    with CheckpointManager(folder, config, model=module, optimizer=optimizer) as manager:
        report = manager.load()
        step = 0 if report is None else report.resumed_step or 0
        while step < until:
            loss = module(torch.randn(16, 64, device="cuda")).float().square().mean()
            loss.backward()
            manager.maybe_wait_for_staging()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            made.append(loss.item())
            manager.save(step, last_step=step == until)
    assert all(isinstance(p, DTensor) and p.is_cuda != offload for p in module.parameters())
    return made


def main(backend: str) -> None:
    faulthandler.dump_traceback_later(150, exit=True)
    torch.cuda.set_device(0)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(backend)
    with tempfile.TemporaryDirectory() as name:
        for mode in MODES:
            whole = losses(Path(name, mode, "whole"), mode, until=6)
            halves = losses(Path(name, mode, "halves"), mode, until=3) + losses(
                Path(name, mode, "halves"), mode, until=6
            )
            assert halves == whole, (mode, halves, whole)
            if "gloo" in backend:  # which gradients of offloaded parameters need, on the CPU
                whole = losses(Path(name, mode, "offloaded"), mode, until=6, offload=True)
                halves = losses(Path(name, mode, "resumed"), mode, until=3, offload=True)
                assert halves + losses(Path(name, mode, "resumed"), mode, until=6, offload=True) == whole, mode
        tensors = {"w": torch.arange(1000.0, device="cuda")}
        milepost.save(Path(name, "own"), tensors)
        into = {"w": torch.zeros(1000, device="cuda")}
        milepost.load(Path(name, "own"), into)
        assert torch.equal(into["w"], tensors["w"])
    dist.barrier()
    dist.destroy_process_group()
    print("exact", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
