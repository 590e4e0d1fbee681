"""``fake_rank``: act as any rank of a simulated world, to examine meshes of many ranks in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache, _clear_python_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Make this process ``rank`` of a default process group of ``world_size`` whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor caches results of operations by mesh, and would confuse this rank's mesh with the next one's.
        _clear_fast_path_sharding_prop_cache()
        _clear_python_sharding_prop_cache()
