"""Order between the streams of a GPU: this package's threads use other streams than the thread that calls it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_WITHOUT_QUEUE = ("cpu", "meta")


def devices_of(tensors: Iterable[object]) -> tuple[torch.device, ...]:
    """Return the devices of ``tensors`` on which work is queued: none for the CPU. Other values are ignored."""
    devices = {tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return tuple(sorted((device for device in devices if device.type not in _WITHOUT_QUEUE), key=str))


def wait_for_devices(devices: Iterable[torch.device]) -> None:
    """Wait until the work that is queued on ``devices`` is done, on all their streams.

    Threads copy on their devices' default stream. Without this, a save in a ``torch.cuda.stream(...)`` block could copy
    weights before the kernels queued there have written them, and a load could be overwritten by such kernels, or be
    read by later ones before its own copies are complete.
    """
    for device in devices:
        torch.accelerator.synchronize(device)
