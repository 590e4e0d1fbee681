"""Samples of each tensor to be staged, taken when the save begins and compared with the copies.

torch counts changes in place, but not those through ``.data`` or memory shared with NumPy: without samples, an
optimizer that uses these could be staged unnoticed in the middle of its step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

SAMPLE_NUMEL = 16
"""Number of sampled elements per tensor, evenly spaced."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """The concatenated samples of all tensors of one device and dtype."""

    keys: tuple[str, ...]
    copies: tuple[torch.Tensor, ...]
    flat: tuple[bool, ...]
    """True if the tensor's elements are in order, like those of its copy."""
    taken: torch.Tensor

    def changed(self) -> Iterator[str]:
        here = torch.cat([_few(copy, flat).reshape(-1) for copy, flat in zip(self.copies, self.flat, strict=True)])
        before, now = (part.cpu().contiguous().view(torch.uint8) for part in (self.taken, here))
        if torch.equal(before, now):
            return
        size = self.taken.element_size()
        start = 0
        for key, copy, flat in zip(self.keys, self.copies, self.flat, strict=True):
            stop = start + _few(copy, flat).numel() * size
            if not torch.equal(before[start:stop], now[start:stop]):
                yield key
            start = stop


class Samples:
    """Samples of tensors' current elements. On a GPU they are taken on the training stream, after the queued work."""

    def __init__(self, copies: Iterable[tuple[str, torch.Tensor, torch.Tensor]]):
        """``copies``: key, destination and tensor; both of one shape and dtype."""
        grouped = defaultdict[tuple[torch.device, torch.dtype], list[tuple[str, torch.Tensor, torch.Tensor]]](list)
        for key, copy, tensor in copies:
            if copy.numel() and copy.dtype == tensor.dtype:
                grouped[tensor.device, tensor.dtype].append((key, copy, tensor))
        with torch.no_grad():
            self._batches = [
                _Batch(
                    tuple(key for key, _, _ in group),
                    tuple(copy for _, copy, _ in group),
                    tuple(tensor.is_contiguous() for _, _, tensor in group),
                    torch.cat([_few(tensor, tensor.is_contiguous()).reshape(-1) for _, _, tensor in group]),
                )
                for group in grouped.values()
            ]

    def changed(self) -> list[str]:
        """Return the keys of tensors whose copies, now complete, differ from the samples."""
        return [key for batch in self._batches for key in batch.changed()]


def _few(tensor: torch.Tensor, flat: bool) -> torch.Tensor:
    """Sample the same elements of every tensor of a shape.

    Contiguous elements are taken from all, by one call; otherwise along the longest dim, in the middle of the others.
    """
    if flat:
        numel = tensor.numel()
        step = -(-numel // SAMPLE_NUMEL)
        return _joinable(tensor.as_strided((-(-numel // step),), (step,), tensor.storage_offset()))
    tensor = tensor.detach()
    if not tensor.ndim:
        return _joinable(tensor)
    longest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
    at = [slice(size // 2, size // 2 + 1) for size in tensor.shape]
    at[longest] = slice(None, None, -(-tensor.shape[longest] // SAMPLE_NUMEL))
    return _joinable(tensor[tuple(at)])


def _joinable(few: torch.Tensor) -> torch.Tensor:
    """View as integers if ``cat`` does not support the dtype (8-bit floats)."""
    return few.view(torch.uint8) if few.element_size() == 1 else few
