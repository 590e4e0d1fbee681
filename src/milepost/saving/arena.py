"""The arena: a host buffer in the form of the file. Staging is one pass of copies into it, writing a few big writes.

Its memory is a memfd: nameless shared memory that a writer process can map too, and that is gone with its last user,
however that ends. It is allocated once and reused by every save.
"""

from __future__ import annotations

import mmap
import os
import weakref

from milepost.tensors.plan import LARGE_ALIGNMENT, WritePlan, align


class Arena:
    """Memory for the file image of one rank, all but the objects at its end. Grows when a plan needs more.

    ``memory`` is valid until the next :meth:`fit` that grows it.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("milepost-arena", os.MFD_CLOEXEC)
        self._close_fd = weakref.finalize(self, os.close, self.fd)
        self.memory = memoryview(b"")

    @property
    def nbytes(self) -> int:
        """Size of the host memory held."""
        return len(self.memory)

    def fit(self, plan: WritePlan) -> bool:
        """Make room for the image of ``plan``; returns whether the memory was allocated anew."""
        needed = max(align(plan.objects_offset, LARGE_ALIGNMENT), LARGE_ALIGNMENT)
        if needed <= self.nbytes:
            return False
        os.ftruncate(self.fd, needed)
        # The old mapping goes when its last view does.
        self.memory = memoryview(mmap.mmap(self.fd, needed))
        return True

    def close(self) -> None:
        """Give the memory back. A writer process that still maps it keeps it until it is done."""
        self.memory = memoryview(b"")
        self._close_fd()
        self.fd = -1
