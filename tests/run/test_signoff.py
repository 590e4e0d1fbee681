"""Sign-offs: every rank's record reaches rank 0 complete, or rank 0 names the ranks that are missing."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from milepost.errors import FormatError, SaveError, StorageError
from milepost.format.box import Box
from milepost.format.columns import Objects, Tensors
from milepost.format.manifest import FileEntry, ObjectEntry, ShardEntry
from milepost.run.attempts import begin_attempt
from milepost.run.signoff import (
    SignOff,
    WrittenFile,
    WrittenObject,
    WrittenTensor,
    dump_sign_off,
    parse_sign_off,
    rank_list,
    segment_of,
    sign_off,
    wait_for_sign_offs,
)
from milepost.storage import LocalStorage
from milepost.tensors.plan import WriteItem
from milepost.testing.faulty import FaultyStorage
from milepost.testing.wrap import WrappedStorage

SAVE_ID = "0123456789abcdef0123456789abcdef"


def sample(rank: int = 0, num_tensors: int = 3) -> SignOff:
    tensors = tuple(
        WrittenTensor(
            WriteItem(
                key=f"layers.{i}.w",
                dtype="bfloat16",
                shape=(8 * (i + 1), 2**20),
                box=Box((4, 0), (2 * i, 2**20)),
                record_offset=i << 40,
                record_nbytes=(i << 22) + 1024,
                data_offset=(i << 40) + 512,
                data_nbytes=i << 22,
            ),
            crc32=0xFFFFFFFF - i,
            block_crcs=tuple(range(i)),  # of 4 MiB each
        )
        for i in range(num_tensors)
    )
    objects = (WrittenObject("train_state.step", 1 << 41, 300, 17),)
    return SignOff(rank, SAVE_ID, segment_of([WrittenFile(f"__{rank}_0.distcp", 1 << 42, tensors, objects, crc32=5)]))


def same(one: SignOff, other: SignOff) -> bool:
    """Return whether two sign-offs are equal, byte for byte."""
    return dump_sign_off(one) == dump_sign_off(other)


@pytest.mark.parametrize(
    "signed",
    [
        sample(),
        SignOff(3, SAVE_ID, segment_of([])),
        SignOff(3, SAVE_ID),
        SignOff(3, SAVE_ID, error="OSError: [Errno 28] naïve – full"),
    ],
)
def test_a_sign_off_survives_the_way_through_storage(signed: SignOff) -> None:
    found = parse_sign_off(dump_sign_off(signed), "x")
    assert same(found, signed)
    assert (found.rank, found.save_id, found.error) == (signed.rank, signed.save_id, signed.error)
    assert (found.segment is None) == (signed.segment is None)


def test_a_segment_says_what_its_rank_wrote() -> None:
    segment = parse_sign_off(dump_sign_off(sample(7)), "x").segment
    assert segment is not None
    assert segment.files == {"__7_0.distcp": FileEntry(1 << 42, 5)}
    tensors = Tensors(segment.table)
    assert list(tensors) == ["layers.0.w", "layers.1.w", "layers.2.w"]
    assert tensors["layers.2.w"].shape == (24, 2**20)
    assert list(tensors["layers.2.w"].shards) == [
        ShardEntry(
            box=Box((4, 0), (4, 2**20)),
            file="__7_0.distcp",
            record_offset=2 << 40,
            record_nbytes=(2 << 22) + 1024,
            data_offset=(2 << 40) + 512,
            data_nbytes=2 << 22,
            crc32=0xFFFFFFFD,
        )
    ]
    assert segment.block_crcs.tolist() == [0, 0, 1]
    assert Objects(segment.table)["train_state.step"] == ObjectEntry("__7_0.distcp", 1 << 41, 300, 17)


def test_every_damaged_byte_and_every_cut_is_noticed() -> None:
    data = dump_sign_off(sample())
    for position in range(len(data)):
        with pytest.raises(FormatError):
            parse_sign_off(data[:position], "x")
        with pytest.raises(FormatError):
            parse_sign_off(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :], "x")


def test_all_sign_offs_come_back_by_rank(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)
    for rank in (2, 0, 1):
        sign_off(storage, attempt, sample(rank))
    signed = wait_for_sign_offs(storage, attempt, 3, SAVE_ID, timeout_s=0)
    assert all(same(found, sample(rank)) for rank, found in enumerate(signed))
    assert len(signed) == 3


def test_late_ranks_are_waited_for_and_missing_ones_named(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)
    time_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal time_s
        time_s += seconds
        if time_s > 20 and storage.stat(f"{attempt}/sign-off-1") is None:
            sign_off(storage, attempt, sample(1))

    sign_off(storage, attempt, sample(0))
    signed = wait_for_sign_offs(storage, attempt, 2, SAVE_ID, timeout_s=30, clock=lambda: time_s, sleep=sleep)
    assert [found.rank for found in signed] == [0, 1]
    with pytest.raises(SaveError, match=r"ranks 2-4 of 5 did not finish writing within 30 s") as caught:
        wait_for_sign_offs(storage, attempt, 5, SAVE_ID, timeout_s=30, clock=lambda: time_s, sleep=sleep)
    assert caught.value.rank == 2


def test_waiting_does_not_hammer_the_storage(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)
    pauses: list[float] = []
    with pytest.raises(SaveError):
        wait_for_sign_offs(storage, attempt, 1, SAVE_ID, timeout_s=100, clock=lambda: sum(pauses), sleep=pauses.append)
    assert pauses[0] < 0.01
    assert max(pauses) == 0.5
    assert len(pauses) < 230


def test_a_failed_rank_is_named_at_once_with_its_message(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)
    sign_off(storage, attempt, SignOff(2, SAVE_ID, error="no space left on device"))
    with pytest.raises(SaveError, match="rank 2: no space left on device") as caught:
        wait_for_sign_offs(storage, attempt, 4, SAVE_ID, timeout_s=1e9)
    assert caught.value.rank == 2


def test_a_full_disk_still_lets_a_rank_report_that_it_failed(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)

    class Full(WrappedStorage):
        def write(self, path: str, data: bytes) -> None:  # type: ignore[override]
            if len(data):
                raise StorageError("full", operation="write", path=path, errno=errno.ENOSPC)
            self.inner.write(path, data)

    sign_off(Full(storage), attempt, SignOff(1, SAVE_ID, error="no space left on device"))
    with pytest.raises(SaveError, match="rank 1: it failed and could not record the reason"):
        wait_for_sign_offs(storage, attempt, 2, SAVE_ID, timeout_s=1e9)
    with pytest.raises(StorageError):  # but a rank that succeeded must not be taken for one that failed
        sign_off(Full(storage), attempt, sample(0))


def test_a_sign_off_of_another_save_is_refused(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", "ab")
    sign_off(storage, attempt, sample(0))
    with pytest.raises(SaveError, match=SAVE_ID):
        wait_for_sign_offs(storage, attempt, 1, "ab", timeout_s=0)


def test_an_attempt_deleted_under_our_feet_is_noticed(memory_path: Path) -> None:
    with pytest.raises(SaveError, match="gone"):
        wait_for_sign_offs(LocalStorage(memory_path), ".attempt-ab", 1, "ab", timeout_s=1e9)


def test_a_torn_sign_off_is_never_seen(memory_path: Path) -> None:
    """It is written under another name first."""
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)
    for k in range(2):
        with pytest.raises(StorageError):
            sign_off(FaultyStorage(storage, fail_at=k, tear=True), attempt, sample(k))
    assert [e.name for e in storage.list(attempt) if e.name.startswith("sign-off") and ".part" not in e.name] == []


def test_rank_0_may_commit_and_remove_the_attempt_as_soon_as_it_sees_the_last_sign_off(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)

    class Quick(WrappedStorage):
        def rename(self, src: str, dst: str) -> None:
            self.inner.rename(src, dst)
            (found,) = wait_for_sign_offs(self.inner, attempt, 1, SAVE_ID, timeout_s=0)
            assert same(found, sample(0))
            self.inner.remove_tree(attempt)

    sign_off(Quick(storage), attempt, sample(0))
    assert storage.list("") == []


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([0, 2, 3, 4, 9], "ranks 0, 2-4, 9")],
)
def test_ranks_for_people(ranks: list[int], text: str) -> None:
    assert rank_list(ranks) == text


def test_ranks_are_named_with_their_hosts_up_to_ten_and_the_number_of_the_rest() -> None:
    hosts = [f"node-{rank // 8}" for rank in range(16384)]
    assert rank_list([3], hosts) == "rank 3 (node-0)"
    assert rank_list([6, 7, 8, 9, 20], hosts) == "ranks 6-7 (node-0), 8-9 (node-1), 20 (node-2)"
    late = rank_list(range(8, 16384), hosts)
    assert late.startswith("ranks 8-15 (node-1), 16-23 (node-2), ")
    assert late.endswith("80-87 (node-10) and 16296 more")
    assert rank_list(range(0, 40, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14, 16, 18 and 10 more"
    assert rank_list([0, 1, 2], ["here"] * 3) == "ranks 0-2"


def test_a_rank_that_does_not_sign_off_is_named_with_its_host(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)
    sign_off(storage, attempt, sample(0))
    with pytest.raises(SaveError, match=r"^rank 1 \(far-away\) of 2 did not finish writing within 0 s"):
        wait_for_sign_offs(storage, attempt, 2, SAVE_ID, timeout_s=0, hosts=("here", "far-away"))


class FarStorage(WrappedStorage):
    """A network file system: a read of a sign-off returns once eight are under way."""

    is_remote = True

    def __init__(self, inner: LocalStorage) -> None:
        super().__init__(inner)
        self.under_way = threading.Barrier(8, timeout=30)

    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        self.under_way.wait()
        return super().read(path, limit)


def test_over_a_network_sign_offs_are_read_many_at_a_time(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    attempt = begin_attempt(storage, "step-1", SAVE_ID)
    for rank in range(32):
        sign_off(storage, attempt, sample(rank))
    found = wait_for_sign_offs(FarStorage(storage), attempt, 32, SAVE_ID, timeout_s=0)
    assert all(same(one, sample(rank)) for rank, one in enumerate(found))
