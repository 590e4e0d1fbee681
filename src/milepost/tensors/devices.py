"""Order between the streams of a GPU: this package's threads use other streams than the thread that calls it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_WITHOUT_QUEUE = ("cpu", "meta")


def wait_for_devices(tensors: Iterable[object]) -> None:
    """Wait until the work that is queued on the devices of ``tensors`` is done, on all their streams.

    Threads copy on their devices' default stream. Without this, a save in a ``torch.cuda.stream(...)`` block could copy
    weights before the kernels queued there have written them, and a load could be overwritten by such kernels, or be
    read by later ones before its own copies are complete. Values that are not tensors are ignored.
    """
    devices = {tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}
    for device in sorted(devices, key=str):
        if device.type not in _WITHOUT_QUEUE:
            torch.accelerator.synchronize(device)
