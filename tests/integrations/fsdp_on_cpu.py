"""Lets Accelerate shard with FSDP2 on CPUs, which it does on accelerators only. What it prepares is its own."""

from __future__ import annotations

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType


def shard_on_cpu(accelerator: Accelerator, layer: str = "Linear") -> None:
    """Let ``accelerator.prepare`` shard each module of the class ``layer``, and the rest."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        state_dict_type="SHARDED_STATE_DICT",
        reshard_after_forward=True,
    )
    accelerator.state.distributed_type = DistributedType.FSDP
