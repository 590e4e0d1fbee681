"""Record what passes while reading tensors: digests, to compare what was written, and infinite values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from milepost.collective.threads import map_in_threads
from milepost.errors import ConversionError
from milepost.format import digest
from milepost.format.box import Box
from milepost.interop.weights.boxes import Array, Readable, Source, TensorInfo, array_dtype, raw_bytes
from milepost.interop.weights.stream import Advance


@dataclass(frozen=True, slots=True, eq=False)
class _Passing:
    """Wraps ``base``, whose tensors it passes on."""

    base: Readable

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See :class:`Readable`."""
        return self.base.tensors

    def unit_rows(self, key: str) -> int:
        """See :class:`Readable`."""
        return self.base.unit_rows(key)


@dataclass(frozen=True, slots=True, eq=False)
class Noted(_Passing):
    """Records the CRC-32 of each part read: the expected content on storage."""

    crcs: dict[tuple[str, Box], int] = field(default_factory=dict)

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        self.base.read_into(key, box, out)
        self.crcs[key, box] = digest.crc32(raw_bytes(out))


@dataclass(frozen=True, slots=True, eq=False)
class Infinite(_Passing):
    """Records the tensors with infinite values, as casts to float16 make of those above 65,504."""

    keys: set[str] = field(default_factory=set)

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        self.base.read_into(key, box, out)
        if key not in self.keys and out.dtype.kind == "f" and np.isinf(out).any():
            self.keys.add(key)


def compare_with_noted(noted: Noted, written: Source, num_threads: int, advance: Advance | None) -> None:
    """Read back the written data and compare it with what was computed.

    Raises:
        ConversionError: naming the first tensor that differs.
        DigestMismatchError: the data read back differs from its recorded digests.
    """

    def compare(part: tuple[tuple[str, Box], int]) -> None:
        (key, box), crc = part
        values = np.empty(box.sizes, array_dtype(noted.tensors[key].dtype))
        written.read_into(key, box, values)
        if written.tensors[key] != noted.tensors[key] or digest.crc32(raw_bytes(values)) != crc:
            raise ConversionError(
                f"verification failed: {box} of '{key}' in {written.path} differs from what was computed",
                path=written.path,
            )
        if advance is not None:
            advance(values.nbytes)

    if written.tensors.keys() != noted.tensors.keys():
        raise ConversionError(f"verification failed: {written.path} holds different keys", path=written.path)
    map_in_threads(compare, list(noted.crcs.items()), num_threads, name="milepost-verify")
    written.check_digests()
