"""The device meshes of a run: one root mesh for the dense weights, a second view of the same ranks for the experts.

`Degrees` numbers the ranks in both. FSDP and tensor parallelism must come from one root mesh (DTensor refuses to
combine two); context parallelism does not split weights, so its ranks shard them together with FSDP's.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from milepost.parallelism.degrees import Degrees

__all__ = ["Meshes"]


class Meshes:
    """This rank's coordinates in every degree, and its process groups. Built on all ranks together."""

    def __init__(self, degrees: Degrees, dense: DeviceMesh):
        self.degrees = degrees
        self.dense = dense
        """Axes ``pp``, ``dp_replicate``, ``fsdp`` (= data shard x context), ``tp``."""

    @classmethod
    def build(cls, degrees: Degrees, device_type: str) -> Meshes:
        """Build the meshes over all ranks of the default process group (collective)."""
        axes = ("pp", "dp_replicate", "fsdp", "tp")
        return cls(degrees, init_device_mesh(device_type, degrees.dense_mesh, mesh_dim_names=axes))

    @property
    def device_type(self) -> str:
        return self.dense.device_type

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.device_type, torch.accelerator.current_device_index())

    @property
    def dp_degree(self) -> int:
        """The number of ranks that read different samples of one batch."""
        return self.degrees.data_parallel_degree

    @property
    def dp_rank(self) -> int:
        """This rank's share of a batch, of ``dp_degree``; equal for ranks that work on the same samples."""
        replica = self.dense.get_local_rank("dp_replicate")
        shard = self.dense.get_local_rank("fsdp") // self.degrees.context_parallel_degree
        return replica * self.degrees.data_parallel_shard_degree + shard

    @property
    def cp_rank(self) -> int:
        """The index of this rank's part of every sequence."""
        return self.dense.get_local_rank("fsdp") % self.degrees.context_parallel_degree

    @property
    def pp_rank(self) -> int:
        return self.dense.get_local_rank("pp")

    @property
    def last_stage(self) -> bool:
        """True if this rank computes the loss."""
        return self.pp_rank == self.degrees.pipeline_parallel_degree - 1

    @property
    def data(self) -> DeviceMesh:
        """The mesh for FSDP of the dense weights: 1-D, or 2-D (replicas, shards) where there are replicas."""
        return self._with_replicas(self.dense, "fsdp")

    @property
    def tensor(self) -> DeviceMesh:
        return self.dense["tp"]

    @cached_property
    def _experts(self) -> DeviceMesh:
        axes = ("pp", "dp_replicate", "efsdp", "ep")
        return init_device_mesh(self.device_type, self.degrees.expert_mesh, mesh_dim_names=axes)

    @property
    def expert(self) -> DeviceMesh:
        """The mesh over which the experts are sharded (collective at first use)."""
        return self._experts["ep"]

    @property
    def expert_data(self) -> DeviceMesh:
        """The mesh for FSDP of the experts: the ranks with the same experts (collective at first use)."""
        return self._with_replicas(self._experts, "efsdp")

    @cached_property
    def context_group(self) -> dist.ProcessGroup:
        """The ranks that hold the parts of one sequence (collective at first use)."""
        cp, tp = self.degrees.context_parallel_degree, self.degrees.tensor_parallel_degree
        shape = (self.dense.size() // (cp * tp), cp, tp)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=("rest", "cp", "tp")).get_group("cp")

    def _with_replicas(self, mesh: DeviceMesh, axis: str) -> DeviceMesh:
        return mesh["dp_replicate", axis] if self.degrees.data_parallel_replicate_degree > 1 else mesh[axis]
