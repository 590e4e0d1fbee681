"""A few elements of each tensor that is to be staged, taken when the save begins and looked for in the copies.

Changes in place are counted by torch, but not those through ``.data`` or through memory that is shared with NumPy: an
optimizer that steps so would be staged in the middle of its step, unnoticed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

SAMPLE_NUMEL = 16
"""Elements of a tensor that are taken, evenly spaced."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """The elements taken of all tensors of one device and dtype, one after the other."""

    keys: tuple[str, ...]
    copies: tuple[torch.Tensor, ...]
    flat: tuple[bool, ...]
    """Whether the tensor's elements lie in order, as those of its copy always do."""
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
    """Elements of tensors as they are now. On a GPU the training stream takes them, behind the work that is queued."""

    def __init__(self, copies: Iterable[tuple[str, torch.Tensor, torch.Tensor]]):
        """``copies``: key, where the elements are to be copied to, and the tensor; both of one shape and dtype."""
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
        """The keys of tensors whose copies, which are complete now, do not have those elements."""
        return [key for batch in self._batches for key in batch.changed()]


def _few(tensor: torch.Tensor, flat: bool) -> torch.Tensor:
    """Some elements, the same ones of every tensor of a shape: of all in their order, by one call, where they lie so;
    else along the longest dim, in the middle of the others.
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
    """As integers where ``cat`` does not know the dtype (8-bit floats)."""
    return few.view(torch.uint8) if few.element_size() == 1 else few
