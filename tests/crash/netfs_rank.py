"""One rank of a small run, as a process in the mount namespace of its client; see ``test_netfs.py``.

Arguments: the run's folder, the mode, the last step. The environment is torchrun's.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from milepost import CheckpointConfig, CheckpointManager


class Progress:
    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def main(folder: str, mode: Any, last: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Linear(300, 200, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    progress = Progress()
    config = CheckpointConfig(enable=True, interval=1, async_mode=mode, keep_latest_k=2, last_save_model_only=False)
    with CheckpointManager(folder, config, model=model, optimizer=optimizer, train_state=progress) as manager:
        manager.load()
        begun = progress.step
        weight = model.weight
        assert isinstance(weight, DTensor)
        values = weight.full_tensor()
        assert values.min() == values.max() or not begun, "a mix of two saves"
        assert not begun or values.max() == begun, "the weights are not those of the step"
        for step in range(begun + 1, last + 1):
            weight.to_local().detach().fill_(float(step))
            progress.step = step
            manager.save(step, last_step=step == last)
            manager.maybe_wait_for_staging()
    print(json.dumps({"rank": dist.get_rank(), "begun": begun}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
