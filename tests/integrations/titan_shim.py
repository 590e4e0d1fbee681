"""Lets torchtitan 0.3 train on CPUs with gloo. Nothing that it saves, loads or computes is replaced.

Imported before torchtitan: it asks for a device when it is imported.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch._utils
from torch.distributed.fsdp import FSDPModule

KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"


class _Kernels(types.ModuleType):
    """Kernels of Triton's, for expert parallelism on GPUs: imported with the models, not called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Device(types.ModuleType):
    """``torch.cpu`` with what torchtitan asks of a GPU's module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def device_count(self) -> int:
        return 64

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def get_device_name(self, device: object = None) -> str:
        return "CPU"

    def get_device_properties(self, device: object = None) -> Any:
        return types.SimpleNamespace(total_memory=1 << 34, name="CPU")

    def memory_stats(self, device: object = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: object = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def install() -> None:
    sys.modules[KERNELS] = _Kernels(KERNELS)
    device = _Device("torch.cpu")
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: device
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda *args, device_ids=None, **kwargs: barrier(*args, **kwargs)
    divide = FSDPModule.set_gradient_divide_factor

    def divide_without_premultiplied_sums(self: FSDPModule, factor: float) -> None:
        self.set_force_sum_reduction_for_comms(True)  # gloo has no others
        divide(self, factor)

    FSDPModule.set_gradient_divide_factor = divide_without_premultiplied_sums
    if not hasattr(torch.distributed, "set_timeout"):  # of a later torch
        torch.distributed.set_timeout = lambda *args: None
    start = torch.distributed.init_process_group

    def start_once(*args: Any, **kwargs: Any) -> None:
        if not torch.distributed.is_initialized():
            start(*args, **kwargs)

    torch.distributed.init_process_group = start_once


install()


def attend_on_cpu() -> None:
    """FlexAttention has no backward on CPUs: the same causal attention, as torch computes it there."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torchtitan.models.common import attention

    def attend(q: Any, k: Any, v: Any, *, scale: Any, enable_gqa: bool, **_: Any) -> tuple[Any, None]:
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        return attended, None

    attention._compiled_create_block_mask = create_block_mask
    attention.FlexAttention.compiled_flex_attn = staticmethod(attend)
