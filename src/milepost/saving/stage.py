"""Convert tensors to the bytes to write: in place if the memory is suitable, else through a bounded copy."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from milepost.collective.threads import map_in_threads
from milepost.config import NUM_IO_THREADS
from milepost.errors import SaveError
from milepost.format.box import cut_into_slabs
from milepost.saving.samples import Samples
from milepost.tensors.devices import devices_of, wait_for_devices
from milepost.tensors.layout import TensorLeaf
from milepost.tensors.plan import WriteItem, WritePlan

SLAB_NBYTES = 8 << 20
"""Approximate maximum size of slabs in which tensors that are not contiguous on the CPU are copied."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View the memory of a contiguous CPU tensor as writable bytes. Keeps the tensor alive.

    ``view(torch.uint8)`` does not support all dtypes and 0-d tensors. A byte tensor over the same storage takes eight
    times as long to create, which matters for thousands of tensors.
    """
    nbytes = tensor.numel() * tensor.element_size()
    raw = _bytes_type(nbytes).from_address(tensor.data_ptr() or 1)  # empty tensors may have a null address
    raw.storage = tensor.untyped_storage()
    return memoryview(raw).cast("B")


@lru_cache(maxsize=4096)
def _bytes_type(nbytes: int) -> Any:
    return ctypes.c_ubyte * nbytes


class TensorBlocks:
    """A ``BlockSource`` that reads the leaves directly: the caller must not change them meanwhile."""

    def __init__(self, leaves: Mapping[str, TensorLeaf]):
        self._leaves = leaves
        wait_for_devices(devices_of(leaf.local for leaf in leaves.values()))  # the blocks are copied by other threads

    def blocks(self, item: WriteItem) -> Iterator[memoryview]:
        leaf = self._leaves[item.key]
        return tensor_blocks(leaf.view_of(item.box), leaf.dtype)


def tensor_blocks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the row-major bytes of a tensor as ``dtype``, in order.

    In one block if host memory has them in this form, else in copies of at most ``SLAB_NBYTES``. Each block is valid as
    long as it is referenced.
    """
    if tensor.numel() == 0:
        return
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype == dtype:
        yield tensor_bytes(tensor)
        return
    for slab in cut_into_slabs(tensor.shape, dtype.itemsize, SLAB_NBYTES):
        # Both calls release the GIL while they copy, so that other threads write meanwhile.
        yield tensor_bytes(tensor[slab.box.index()].to(device="cpu", dtype=dtype).contiguous())


class _Copy(NamedTuple):
    """A copy to make: from a part of the state to its place in the image."""

    key: str
    dst: torch.Tensor
    src: torch.Tensor
    memory_nbytes: int
    """Size of the memory that ``src`` is a view of."""


class Staging:
    """Copies the planned boxes of a save into its file image.

    Created on the training thread at the time of the save; :meth:`run` may be called from another thread. Until it
    returns, the tensors must not change: this is checked by their version counters, and by a sample of their elements
    if :meth:`run` ``is_deferred``. Those with keys in ``at_once`` are copied at once, so that training may continue up
    to ``optimizer.step()``.
    """

    def __init__(
        self,
        leaves: Mapping[str, TensorLeaf],
        plan: WritePlan,
        image: memoryview,
        *,
        at_once: Collection[str] = (),
        is_deferred: bool = True,
    ):
        self._copies: list[_Copy] = []
        self._watched: list[tuple[str, torch.Tensor, int]] = []
        # torch does not accept an empty buffer; an empty plan needs no image.
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        memory = torch.frombuffer(image, dtype=torch.uint8) if plan.num_items else empty
        devices = set()
        sampled = []
        for item, start in ((item, start + item.data_offset) for file, start in plan.images for item in file.items):
            leaf = leaves[item.key]
            src = leaf.view_of(item.box)
            raw = memory[start : start + item.data_nbytes]
            dst = raw.view(leaf.dtype).view(src.shape)
            if src.device.type == "cuda":
                devices.add(src.device)
            if item.key in at_once:
                # On a GPU this queues the copy on the training stream, ahead of the kernels that will change it.
                dst.copy_(src, non_blocking=True)
                continue
            self._copies.append(_Copy(item.key, dst, src, src.untyped_storage().nbytes()))
            sampled.append((item.key, dst, src))
            if not leaf.local.is_inference():
                self._watched.append((item.key, leaf.local, leaf.local._version))
        self._samples = Samples(sampled if is_deferred else ())
        self.nbytes = plan.data_nbytes
        self._ready = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def run(self, *, num_threads: int = NUM_IO_THREADS) -> None:
        """Copy everything; on return, training may change the tensors again.

        From a GPU, copies use a separate stream that starts after the work queued at construction, so the training
        stream is not blocked. (Source: the side-stream staging of torch's ``distributed.checkpoint.staging`` and of
        torchsnapshot.)

        Raises:
            SaveError: a tensor was changed in place meanwhile, so the copy may be torn.
        """
        if self._ready:
            self._copy_from_cuda()
        on_cpu = [copy for copy in self._copies if copy.src.device.type != "cuda"]
        # `copy_` releases the GIL; biggest first, so that the threads end together.
        on_cpu.sort(key=lambda copy: -copy.dst.nbytes)
        map_in_threads(_copy_on_cpu, on_cpu, num_threads, name="milepost-stage")
        self._check_versions()

    def _copy_from_cuda(self) -> None:
        done = []
        for device, ready in self._ready.items():
            stream = torch.cuda.Stream(device)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                for copy in self._copies:
                    if copy.src.device == device:
                        copy.dst.copy_(copy.src, non_blocking=True)
            done.append(stream.record_event())
        for event in done:
            event.synchronize()

    def _check_versions(self) -> None:
        changed = [key for key, tensor, version in self._watched if tensor._version != version]
        changed = changed or self._samples.changed()
        if changed:
            count = "1 tensor was" if len(changed) == 1 else f"{len(changed)} tensors were"
            raise SaveError(
                f"{count} changed during staging, first '{changed[0]}': the copy may mix old and new values and was "
                "discarded. Call maybe_wait_for_staging() before optimizer.step()",
                key=changed[0],
            )


def _copy_on_cpu(copy: _Copy) -> None:
    if copy.src.untyped_storage().nbytes() < copy.memory_nbytes:  # reading it would end this process
        raise SaveError(
            f"the memory of '{copy.key}' was freed during staging, so this save is lost. Call maybe_wait_for_staging() "
            "before",
            key=copy.key,
        )
    copy.dst.copy_(copy.src)
