"""A load reads the blocks that it needs, each of them once, and nothing else."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import milepost
from milepost.errors import DigestMismatchError, FormatError, StorageError
from milepost.format.box import Box
from milepost.format.manifest import BLOCK_NBYTES
from milepost.loading.reader import HandedBlocks, ReadStats, TensorReads, read_tensors
from milepost.loading.values import read_objects
from milepost.run import checkpoint_record
from milepost.storage import LocalStorage, Storage
from milepost.tensors.layout import Piece, TensorLeaf, tensor_leaf
from milepost.tensors.read_plan import Origin, plan_load
from milepost.testing.wrap import Operation, TraceStorage, WrappedStorage

ROWS, COLUMNS = 7000, 1024
BLOCK_ROWS = BLOCK_NBYTES // (4 * COLUMNS)
FRAME_NBYTES = 4096
"""No header or footer is larger."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor of seven blocks, and many small ones."""
    folder = tmp_path_factory.mktemp("reader")
    small = {f"n{n}": torch.full((5,), n) for n in range(40)}
    objects = {f"o{n}": n for n in range(40)}
    milepost.save(folder / "step-1", {"w": whole(), "small": small, "objects": objects})
    return folder


def whole() -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)


def read(storage: Storage, box: Box, local: torch.Tensor, num_threads: int = 2) -> ReadStats:
    manifest = checkpoint_record.read_manifest(storage, "step-1")
    digests = checkpoint_record.read_digests(storage, "step-1", manifest)
    leaf = TensorLeaf("w", local.dtype, (ROWS, COLUMNS), (Piece(box, Box.whole(box.sizes)),), local)
    stats = read_tensors(
        storage, "step-1", plan_load(manifest, [leaf.spec]), {"w": leaf}, digests, num_threads=num_threads
    )
    wanted = whole()[tuple(slice(a, b) for a, b in zip(box.offsets, box.stops, strict=True))]
    assert torch.equal(local, wanted.to(local.dtype))
    return stats


CASES: dict[str, tuple[Box, int]] = {
    "all of it": (Box((0, 0), (ROWS, COLUMNS)), ROWS),
    "whole blocks": (Box((BLOCK_ROWS, 0), (2 * BLOCK_ROWS, COLUMNS)), 2 * BLOCK_ROWS),
    "a row": (Box((5000, 0), (1, COLUMNS)), BLOCK_ROWS),
    "rows over a border of blocks": (Box((BLOCK_ROWS - 1, 0), (2, COLUMNS)), 2 * BLOCK_ROWS),
    "the last row": (Box((ROWS - 1, 0), (1, COLUMNS)), ROWS % BLOCK_ROWS),
    "part of a row": (Box((1, 8), (1, 8)), BLOCK_ROWS),
    # Every block holds some of these columns, so every block must be checked; none is read twice.
    "columns": (Box((0, 128), (ROWS, 128)), ROWS),
    "columns of some rows": (Box((3000, 128), (100, 128)), 2 * BLOCK_ROWS),  # over a border too
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["straight", "transposed", "cast"])
def test_each_block_that_is_needed_is_read_once(folder: Path, case: str, form: str) -> None:
    box, rows = CASES[case]
    local = {
        "straight": lambda: torch.zeros(box.sizes),
        "transposed": lambda: torch.zeros(tuple(reversed(box.sizes))).t(),
        "cast": lambda: torch.zeros(box.sizes, dtype=torch.float64),
    }[form]()
    storage = TraceStorage(LocalStorage(folder))
    stats = read(storage, box, local)
    needed = rows * COLUMNS * 4
    assert needed <= stats.read_nbytes <= needed + FRAME_NBYTES
    assert stats.wanted_nbytes == local.nbytes
    reads = [op for op in storage.operations if op.name == "read_into" and op.path.endswith(".distcp")]
    assert sum(op.nbytes for op in reads) == stats.read_nbytes


def test_small_values_are_read_together(folder: Path) -> None:
    storage = TraceStorage(LocalStorage(folder))
    manifest = checkpoint_record.read_manifest(storage, "step-1")
    found = dict(read_objects(storage, "step-1", manifest, [f"objects.o{n}" for n in range(40)]))
    assert found == {f"objects.o{n}": n for n in range(40)}
    assert sum(op.name == "read_into" and op.path.endswith(".distcp") for op in storage.operations) == 1


def test_small_tensors_that_stand_side_by_side_are_read_at_once_and_each_is_checked(tmp_path: Path) -> None:
    saved = {f"n{n:03}": torch.arange(n, n + 6.0).reshape(2, 3) for n in range(300)} | {"big": torch.zeros(1 << 20)}
    milepost.save(tmp_path / "step-1", saved)
    storage = TraceStorage(LocalStorage(tmp_path))
    manifest = checkpoint_record.read_manifest(storage, "step-1")
    digests = checkpoint_record.read_digests(storage, "step-1", manifest)
    into: dict[str, torch.Tensor] = {key: torch.zeros(2, 3) for key in saved if key != "big"}
    into |= {"n001": torch.zeros(3, 2).t(), "n002": torch.zeros(2, 3, dtype=torch.float64)}
    del into["n150"]  # between two others: read for nothing
    leaves = {key: tensor_leaf(key, tensor) for key, tensor in into.items()}
    items = plan_load(manifest, [leaf.spec for leaf in leaves.values()])
    before = len(storage.operations)
    read_tensors(storage, "step-1", items, leaves, digests)
    assert all(torch.equal(tensor, saved[key].to(tensor.dtype)) for key, tensor in into.items())
    assert sum(op.name == "read_into" for op in storage.operations[before:]) <= 3

    shard = manifest.tensors["n200"].shards[0]
    assert shard.data_offset is not None
    for offset, message in ((shard.data_offset, "digest mismatch in 'n200'"), (shard.record_offset, "damaged header")):
        path = tmp_path / "step-1" / shard.file
        stored = path.read_bytes()
        path.write_bytes(stored[:offset] + bytes([stored[offset] ^ 1]) + stored[offset + 1 :])
        with pytest.raises((DigestMismatchError, FormatError), match=message) as raised:
            read_tensors(storage, "step-1", items, leaves, digests)
        assert raised.value.key == "n200"
        path.write_bytes(stored)


def test_of_an_external_step_only_the_shards_that_are_read_are_looked_into(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "step-1", tmp_path / "step-1")
    for name in ("milepost.json", "milepost.shards", "milepost.digests"):
        (tmp_path / "step-1" / name).unlink()
    storage = TraceStorage(LocalStorage(tmp_path))
    manifest = checkpoint_record.read_manifest(storage, "step-1")
    assert len(manifest.tensors) == 41
    local = torch.zeros(5)
    leaf = TensorLeaf("small.n7", local.dtype, (5,), (Piece(Box((0,), (5,)), Box((0,), (5,))),), local)
    read_tensors(storage, "step-1", plan_load(manifest, [leaf.spec]), {leaf.key: leaf}, None)
    assert torch.equal(local, torch.full((5,), 7.0))
    reads = [op for op in storage.operations if op.name == "read_into" and op.path.endswith(".distcp")]
    assert len(reads) <= 5


class FailsLate(WrappedStorage):
    """From the third block on nothing can be read."""

    def around(self, operation: Operation, act: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        late = operation.path.endswith(".distcp") and operation.offset > 2 * BLOCK_NBYTES
        if operation.name == "read_into" and late:
            raise StorageError("input/output error", operation="read", path=operation.path, errno=errno.EIO)
        return act()


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_error_of_any_thread_is_raised(folder: Path, num_threads: int) -> None:
    with pytest.raises(StorageError, match="input/output error"):
        read(FailsLate(LocalStorage(folder)), Box.whole((ROWS, COLUMNS)), torch.zeros(ROWS, COLUMNS), num_threads)


def test_truncation_after_the_scan_is_an_error(folder: Path, memory_path: Path) -> None:
    """A file that is cut off while it is loaded: never a short read."""
    milepost.save(memory_path / "step-1", {"w": torch.ones(100_000)})
    storage = LocalStorage(memory_path)
    manifest = checkpoint_record.read_manifest(storage, "step-1")
    digests = checkpoint_record.read_digests(storage, "step-1", manifest)
    data = next((memory_path / "step-1").glob("*.distcp"))
    with data.open("r+b") as file:
        file.truncate(200_000)
    leaf = TensorLeaf(
        "w", torch.float32, (100_000,), (Piece(Box((0,), (100_000,)), Box((0,), (100_000,))),), torch.zeros(100_000)
    )
    with pytest.raises(StorageError, match="it was truncated"):
        read_tensors(storage, "step-1", plan_load(manifest, [leaf.spec]), {"w": leaf}, digests)


@pytest.mark.parametrize("sizes", [(2, 3, 5), (2, 4, 4)])
def test_blocks_that_are_shared_fill_transposed_tensors(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    stored = torch.rand(sizes)
    milepost.save(tmp_path / "ck", {"theirs": stored})
    storage = LocalStorage(tmp_path)
    manifest = checkpoint_record.read_manifest(storage, "ck")
    digests = checkpoint_record.read_digests(storage, "ck", manifest)
    assert digests is not None
    leaf = tensor_leaf("ours", torch.zeros_like(stored.mT.contiguous()))
    origin = Origin(Box.whole(leaf.shape), "theirs", Box.whole(sizes), is_transposed=True)
    items = plan_load(manifest, [leaf.spec], {"ours": [origin]})
    handed = HandedBlocks(digests, frozenset([0]), frozenset([0]))
    with TensorReads(storage, "ck", items, {"ours": leaf}, digests, handed=handed) as reads:
        block = memoryview(bytearray(stored.nbytes))
        reads.read_block(0, block)
        reads.take_block(0, block)
    assert torch.equal(leaf.local, stored.mT)
