"""Host memory for staging: reused by every save, allocated ahead of the first, pinned for a GPU."""

from __future__ import annotations

import logging
import mmap
import os
import threading
import weakref

import torch

from milepost.tensors.plan import LARGE_ALIGNMENT, WritePlan

log = logging.getLogger("milepost")

_PIECE_NBYTES = 64 << 20
"""Memory is touched in pieces of this size, so that :meth:`Arena.close` need not wait until all is touched."""


class Arena:
    """Host memory with the layout of one rank's files, except the objects at their end. Grows if a plan needs more.

    Staging is one pass of copies into it, and writing a few large writes from it. It is a memfd: anonymous shared
    memory that a writer process can map too, and that is freed with its last user, even a killed one. If the process
    uses CUDA the memory is pinned, so that a copy from a GPU takes a fraction of the time.

    ``memory`` is valid until the next :meth:`fit` that grows it.
    """

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self.fd = os.memfd_create("milepost-arena", os.MFD_CLOEXEC)
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        self.memory = memoryview(b"")
        # Finalizers of the arena, not of its saver: a running save keeps the arena after its saver is dropped.
        self._unpin: weakref.finalize[..., Arena] | None = None
        self._preparation: threading.Thread | None = None
        self._is_cut_short = False
        self._pid = os.getpid()

    @property
    def nbytes(self) -> int:
        """Size of the host memory held."""
        return len(self.memory)

    @property
    def is_pinned(self) -> bool:
        """True if the memory is page-locked, so that a GPU can copy into it directly."""
        return self._unpin is not None

    def prepare(self, nbytes: int) -> None:
        """Begin to allocate ``nbytes`` in a thread, before the first :meth:`fit`, which waits for its end.

        New pages are zeroed and pinned when they are first touched, which takes several times as long as copying the
        state into them. If it fails, :meth:`fit` tries again and raises the error.
        """
        if self.nbytes or self._preparation is not None or nbytes <= 0:
            return
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        # Not a daemon: it could be stopped while it touches memory that is being freed.
        thread = threading.Thread(target=self._prepare, args=(nbytes, device), name="milepost-arena")
        try:
            thread.start()
        except RuntimeError:  # no more threads are available: the first save allocates the memory
            return
        self._preparation = thread

    def _prepare(self, nbytes: int, device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread uses the first GPU by default, which may be another rank's
            os.ftruncate(self.fd, nbytes)
            memory = memoryview(mmap.mmap(self.fd, nbytes))
            pages = torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE]
            for piece in pages.split(_PIECE_NBYTES // mmap.PAGESIZE):
                if self._is_cut_short:
                    return
                piece.zero_()  # releases the GIL
            if device is not None:
                self._pin(memory)
            self.memory = memory
        except Exception as error:  # noqa: BLE001 - the first save does it again, and can raise
            log.debug("staging memory of %.1f MB was not allocated ahead: %s", nbytes / 1e6, error)

    def fit(self, plan: WritePlan) -> bool:
        """Make room for the image of ``plan``; returns whether memory was allocated for it, now or ahead."""
        if os.getpid() != self._pid:
            self._leave_to_parent()
        prepared = self._wait_for_preparation()
        needed = max(plan.image_nbytes, LARGE_ALIGNMENT)
        if needed <= self.nbytes:
            return prepared
        self._unpin_memory()  # that of the old size
        os.ftruncate(self.fd, needed)
        # The old mapping is freed with its last view.
        self.memory = memoryview(mmap.mmap(self.fd, needed))
        if torch.cuda.is_initialized():
            self._pin(self.memory)
        return True

    def close(self) -> None:
        """Free the memory. A writer process that still maps it keeps it until it is done."""
        self._is_cut_short = True
        self._wait_for_preparation()
        self._unpin_memory()
        self.memory = memoryview(b"")
        self._close_fd()
        self.fd = -1

    def _leave_to_parent(self) -> None:
        """Begin anew in a forked process: the parent's save may still be written from the memory that both share."""
        if self._unpin is not None:
            self._unpin.detach()
        self._close_fd()
        self._open()

    def _wait_for_preparation(self) -> bool:
        if self._preparation is None:
            return False
        self._preparation.join()
        self._preparation = None
        return self.nbytes > 0

    def _pin(self, memory: memoryview) -> None:
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(raw.data_ptr(), raw.nbytes, 0))
        self._unpin = weakref.finalize(self, _unpin, memory)

    def _unpin_memory(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None


def _unpin(memory: memoryview) -> None:
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(raw.data_ptr()))
