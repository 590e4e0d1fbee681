"""``LocalStorage``: the common suite on a disk and in memory, and the errors that only a file system has."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from milepost.errors import ConfigError, StorageError
from milepost.storage import LocalStorage, open_storage, syscalls, write_back
from milepost.storage.base import ReadHandle, format_nbytes
from milepost.storage.system_errors import storage_error
from milepost.testing.storage_suite import StorageSuite


class TestOnDisk(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        return LocalStorage(tmp_path / "root")


class TestInMemory(StorageSuite):
    @pytest.fixture
    def storage(self, memory_path: Path) -> LocalStorage:
        return LocalStorage(memory_path / "root")


class TestWithoutModernSystemCalls(StorageSuite):
    """A file system that knows neither renameat2 nor fallocate nor O_DIRECT (an old kernel, NFS)."""

    @pytest.fixture
    def storage(self, memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
        monkeypatch.setattr(syscalls, "_renameat2", lambda src, dst, flags: False)
        monkeypatch.setattr(syscalls, "reserve", lambda fd, nbytes: False)
        monkeypatch.setattr(syscalls, "lives_in_memory", lambda fd: True)
        return LocalStorage(memory_path)


class TestWithATimidDirectWrite(StorageSuite):
    """O_DIRECT is accepted at opening, and then refuses every range."""

    @pytest.fixture
    def storage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
        real = os.pwritev

        def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "pwritev", pwritev)
        return LocalStorage(tmp_path, page_cache="direct")


class TestPastThePageCache(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        return LocalStorage(tmp_path, page_cache="direct")


class TestWithoutEarlyWriteBack(StorageSuite):
    """A kernel or a file system that does not know ``sync_file_range`` (NFS, FUSE), or takes no advice."""

    @pytest.fixture
    def storage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
        def refused(*_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(syscalls, "_sync_file_range", lambda fd, offset, nbytes, flags: False)
        monkeypatch.setattr(os, "posix_fadvise", refused)
        return LocalStorage(tmp_path, page_cache="drop")


class TestWithShortCalls(StorageSuite):
    """A system that moves only a part of each request: both loops must continue."""

    @pytest.fixture
    def storage(self, memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
        pwritev, preadv = os.pwritev, os.preadv

        def short(buffers: list[memoryview]) -> list[memoryview]:
            return [buffers[0][: max(1, len(buffers[0]) * 2 // 3)]]

        monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, short(buffers), offset))
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, short(buffers), offset))
        return LocalStorage(memory_path)


def test_large_files_that_go_past_the_cache_ask_for_pages_and_small_ones_for_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, page_cache="direct")
    probe = os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY | os.O_DIRECT)
    os.close(probe)
    with storage.open_write("big", 64 << 20) as big, storage.open_write("small", 1000) as small:
        assert big.alignment == 4096
        assert small.alignment == 1


def resident_share(path: Path) -> float:
    """Return the share of a file's pages in the page cache, by ``mincore``."""
    nbytes = path.stat().st_size
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), nbytes) as mapped:
        pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), pages) == 0
        return sum(page & 1 for page in pages) / len(pages)


def write_pieces(storage: LocalStorage, name: str, nbytes: int, *, piece: int = 1 << 20) -> None:
    data = bytes(range(256)) * (piece // 256)
    with storage.open_write(name, nbytes) as handle:
        for offset in range(0, nbytes, piece):
            handle.write(offset, [data])
        handle.sync()


def test_pages_are_kept_or_dropped_as_asked(tmp_path: Path) -> None:
    for mode, least, most in (("keep", 0.99, 1.0), ("drop", 0.0, 0.1), ("direct", 0.0, 1.0)):
        write_pieces(LocalStorage(tmp_path, page_cache=mode), mode, 48 << 20)  # type: ignore[arg-type]
        assert (tmp_path / mode).read_bytes()[: 1 << 20] == bytes(range(256)) * 4096
        if mode != "direct":
            (tmp_path / f"{mode}-2").unlink(missing_ok=True)
            write_pieces(LocalStorage(tmp_path, page_cache=mode), f"{mode}-2", 48 << 20)  # type: ignore[arg-type]
            assert least <= resident_share(tmp_path / f"{mode}-2") <= most


def test_write_back_begins_before_sync_and_what_is_in_flight_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    finished: list[tuple[int, int]] = []
    monkeypatch.setattr(syscalls, "begin_write_back", lambda fd, at, n: begun.append((at, n)) or True)
    monkeypatch.setattr(syscalls, "finish_write_back", lambda fd, at, n: finished.append((at, n)) or True)
    monkeypatch.setattr(write_back, "IN_FLIGHT_NBYTES", 24 << 20)
    write_pieces(LocalStorage(tmp_path, page_cache="keep"), "x", 64 << 20)
    assert begun == [(at << 20, 8 << 20) for at in range(0, 64, 8)]
    assert finished == begun[:5]  # all but the last three, which are 24 MiB


@pytest.mark.parametrize("call", ["begin_write_back", "finish_write_back"])
def test_a_device_that_fails_early_fails_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The kernel reports an error of write-back once for each descriptor: the call that gets it must raise it."""

    def failed(fd: int, offset: int, nbytes: int) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(syscalls, call, failed)
    monkeypatch.setattr(write_back, "IN_FLIGHT_NBYTES", 8 << 20)
    with pytest.raises(StorageError, match="input/output error while writing"):
        write_pieces(LocalStorage(tmp_path, page_cache="keep"), "x", 64 << 20)


def test_a_device_that_fails_late_fails_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failed)
    with pytest.raises(StorageError, match="input/output error while syncing"):
        write_pieces(LocalStorage(tmp_path, page_cache="keep"), "x", 16 << 20)


def test_a_file_that_memory_has_no_room_for_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    available = psutil.virtual_memory().available
    assert write_back.page_cache_for("auto", available // 4) == "keep"
    assert write_back.page_cache_for("auto", available * 2) == "drop"
    assert write_back.page_cache_for("direct", 1) == "direct"


def test_a_system_that_writes_nothing_is_an_error_not_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: 0)
    with LocalStorage(tmp_path).open_write("x", 10) as handle, pytest.raises(StorageError, match="wrote 0 bytes"):
        handle.write(0, [b"abc"])


def test_a_full_disk_says_what_where_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = LocalStorage(tmp_path)
    with storage.open_write("x", 10) as handle:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(StorageError) as caught:
            handle.write(16, [bytearray(8 << 20)])
    error = caught.value
    assert str(error) == (
        f"no space left on device while writing 8.0 MiB at offset 16 of {tmp_path}/x; "
        "free some space, or write elsewhere"
    )
    assert (error.operation, error.path, error.errno) == ("write", f"{tmp_path}/x", errno.ENOSPC)


def test_space_that_is_not_there_is_found_before_the_first_write() -> None:
    """A file larger than all of memory can't be reserved on a tmpfs; nothing is left behind."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        storage = LocalStorage(folder)
        free = os.statvfs(folder)
        with pytest.raises(StorageError) as caught:
            storage.open_write("huge", 2 * free.f_blocks * free.f_frsize)
        assert caught.value.errno == errno.ENOSPC
        assert "reserving" in str(caught.value)
        assert storage.list("") == []


def test_a_file_size_limit_surfaces_and_leaves_no_torn_small_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes a real short write, then EFBIG: what a quota does on a live system."""
    code = f"""
import resource, signal
from milepost.storage import LocalStorage
from milepost.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
storage = LocalStorage({str(tmp_path)!r})
try:
    storage.write("note", bytes(3000))
except StorageError as error:
    print(error.operation, error.errno, [e.name for e in storage.list("")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split(" ", 1)[0] == "write", done.stderr
    assert done.stdout.strip() == f"write {errno.EFBIG} []"


def test_links_are_not_read_through(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "link").symlink_to("secret")
    storage = LocalStorage(tmp_path)
    with pytest.raises(StorageError, match="symbolic link"):
        storage.read("link")
    found = storage.stat("link")
    assert found is not None
    assert found.is_link
    assert [(e.name, e.is_link) for e in storage.list("")] == [("link", True), ("secret", False)]


def test_links_are_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    storage = LocalStorage(tmp_path)
    for name in ("link", "dangling"):
        with pytest.raises(StorageError):
            storage.write(name, b"x")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_anything_but_a_regular_file_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    storage = LocalStorage(tmp_path)
    for name in ("pipe", "folder"):
        with pytest.raises(StorageError, match="not a regular file"):
            storage.open_read(name)


def test_remove_tree_removes_links_but_not_what_they_point_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    tree = tmp_path / "run" / "sub"
    tree.mkdir(parents=True)
    (tree / "to_folder").symlink_to(outside)
    (tree / "to_file").symlink_to(outside / "precious")
    storage = LocalStorage(tmp_path)
    storage.remove_tree("run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").symlink_to(outside)
    storage.remove_tree("run")
    assert not (tmp_path / "run").is_symlink()
    assert (outside / "precious").read_text() == "x"


def test_every_new_folder_is_synced_into_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    LocalStorage(tmp_path / "a").make_folder("b/c")
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]


def test_a_failed_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    storage = LocalStorage(tmp_path)
    with storage.open_write("x", 10) as handle, pytest.raises(StorageError, match="do not trust this disk"):
        handle.sync()
    with pytest.raises(StorageError):
        storage.sync_folder("")


def test_too_many_open_files_says_how_to_raise_the_limit(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("x", b"1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    handles: list[ReadHandle] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
        with pytest.raises(StorageError, match="ulimit -n"):
            handles.extend(storage.open_read("x") for _ in range(highest + 20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in handles:
            handle.close()


def test_pages_go_around_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned memory is written by the direct descriptor, the tail by the other one."""
    calls: list[tuple[bool, int, int]] = []
    real = os.pwritev

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = real(fd, buffers, offset)
        calls.append((bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT), offset, count))
        return count

    monkeypatch.setattr(os, "pwritev", pwritev)
    size = (6 << 20) + 100
    with (
        mmap.mmap(-1, size) as arena,
        memoryview(arena) as view,
        LocalStorage(tmp_path, page_cache="direct").open_write("x", size) as handle,
    ):
        handle.write(0, [view])
        handle.write(0, [view[100:4196]])
    assert calls == [(True, 0, 6 << 20), (False, 6 << 20, 100), (False, 0, 4096)]


def test_open_storage_roots_at_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage, name = open_storage("outputs/step-5/")
    assert (storage.root, name) == (str(tmp_path / "outputs"), "step-5")
    storage, name = open_storage(".")
    assert (storage.root, name) == (str(tmp_path.parent), tmp_path.name)
    for host in ("", "localhost"):
        storage, name = open_storage(f"file://{host}{tmp_path}/run")
        assert (storage.root, name) == (str(tmp_path), "run")
    (tmp_path / "s3:" / "run").mkdir(parents=True)
    assert open_storage("s3:/run")[0].root == str(tmp_path / "s3:")  # odd, but there


def test_open_storage_follows_a_link_at_the_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "step-5").mkdir()
    (tmp_path / "latest").symlink_to("real/step-5")
    storage, name = open_storage(tmp_path / "latest")
    assert (storage.root, name) == (str(tmp_path / "real"), "step-5")


@pytest.mark.parametrize(
    "path", ["hdfs://host/run", "http://host/run", "s3://", "", "s3:/bucket/run", "GS:bucket", "file://outputs/run"]
)
def test_open_storage_refuses_what_it_does_not_know(path: str) -> None:
    with pytest.raises(ConfigError):
        open_storage(path)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (8 << 20, "8.0 MiB"),
        (1 << 50, "1.0 PiB"),
    ],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


@pytest.mark.parametrize(
    ("fstype", "is_network"), [("ext4", False), ("nfs4", True), ("fuse.weedfs", True), ("ceph", True), ("tmpfs", False)]
)
def test_a_failing_server_is_not_called_a_failing_disk(
    fstype: str, is_network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=fstype)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    error = storage_error(OSError(errno.EIO, "Input/output error"), "write", f"{tmp_path}/run/x", "writing x")
    assert ("do not trust this disk" in error.message) != is_network
    assert ("network file system" in error.message) == is_network
    elsewhere = storage_error(OSError(errno.EIO, "Input/output error"), "write", f"{tmp_path}-2/x", "writing x")
    assert "do not trust this disk" in elsewhere.message


def test_mapping_pages_ahead_changes_no_byte() -> None:
    """Whether the pages are new or not, whole or not; memory that can't be written is left alone."""
    memory = bytearray(b"x" * (1 << 20))
    for part in (memoryview(memory)[5:-7], memoryview(memory)[:0], memoryview(b"constant"), memoryview(bytearray(1))):
        syscalls.map_pages(part)
    assert memory == b"x" * (1 << 20)
