"""Data parallelism: FSDP2 over the data mesh. One shard means plain replication, shards and replicas mean HSDP.

Gradients are *summed* over ranks, never averaged: the loss is already divided by the tokens of the whole batch, so
one rule holds for every product of parallelisms. Summing needs two calls on FSDP: a divide factor of one, and sum
reduction forced, since gloo has no pre-multiplied sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from milepost.parallelism.placement import expert_shard_dim
from milepost.train.models.decoder import Decoder
from milepost.train.parallel.meshes import Meshes

__all__ = ["apply_data_parallel"]


def apply_data_parallel(part: Decoder, meshes: Meshes, param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    """Shard ``part`` over the data mesh, layer by layer, and the experts over their mesh."""
    # FSDP warns about module outputs that are views, in case they are changed in place. The decoder does not.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        # A pipeline stage runs many microbatches between two steps: gathering its weights once is enough.
        "reshard_after_forward": meshes.degrees.pipeline_parallel_degree == 1,
    }
    for moe in part.mixtures():
        fully_shard(moe.experts, mesh=meshes.expert_data, shard_placement_fn=_expert_placement(meshes), **options)
    for block in part.blocks():
        fully_shard(block, mesh=meshes.data, **options)
    if part.tok_embeddings is not None and not part.args.tied_embeddings:
        fully_shard(part.tok_embeddings, mesh=meshes.data, **options)
    if part.output is not None and not part.args.tied_embeddings:
        # Its backward comes right after its forward.
        fully_shard(part.output, mesh=meshes.data, **{**options, "reshard_after_forward": False})
    fully_shard(part, mesh=meshes.data, **options)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _expert_placement(meshes: Meshes) -> Callable[[nn.Parameter], Shard | None]:
    """Shard by expert, or by an expert's rows if there are more ranks than experts."""
    return lambda weight: Shard(expert_shard_dim(weight.shape, meshes.degrees))
