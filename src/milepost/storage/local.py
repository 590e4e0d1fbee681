"""``LocalStorage``: a folder of a POSIX file system, on a disk, on NFS or in memory."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat as stat_modes
import uuid
from collections.abc import Iterator, Mapping, Sequence

from milepost.errors import StorageError
from milepost.storage import local_tree, syscalls
from milepost.storage.base import (
    Bytes,
    Content,
    Entry,
    PageCache,
    ReadHandle,
    Storage,
    WriteHandle,
    byte_views,
    check_name,
    format_nbytes,
    pieces_of,
)
from milepost.storage.local_files import LocalRead, LocalWrite, leading, without_first
from milepost.storage.mounts import why_fixed
from milepost.storage.system_errors import explained, is_on_network

_NO_LINKS = {*syscalls.UNSUPPORTED, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOTDIR}
"""Errors of a file system that can't hard-link at all, this file, or any more."""


class LocalStorage(Storage):
    """The folder ``root``, which need not exist yet, and everything below it."""

    can_rename = True

    def __init__(self, root: str | os.PathLike[str], *, page_cache: PageCache = "auto"):
        self.root = os.path.abspath(os.fspath(root))
        self.page_cache = page_cache

    @functools.cached_property
    def is_remote(self) -> bool:
        return is_on_network(self.root)

    def _full(self, path: str) -> str:
        if path == "":
            return self.root
        return os.path.join(self.root, check_name(self.root, path))

    def list(self, path: str) -> list[Entry]:
        full = self._full(path)
        entries = []
        with explained("list", full, f"listing {full}"):
            try:
                with os.scandir(full) as found:
                    for item in found:
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            entries.append(local_tree.entry_of(item.name, item.stat(follow_symlinks=False)))
            except FileNotFoundError:
                return []
        return sorted(entries, key=lambda entry: entry.name)

    def names(self, path: str) -> Sequence[str]:
        full = self._full(path)
        with explained("names", full, f"listing {full}"):
            try:
                return sorted(os.listdir(full))
            except FileNotFoundError:
                return []

    def stat(self, path: str) -> Entry | None:
        full = self._full(path)
        with explained("stat", full, f"reading the status of {full}"):
            try:
                return local_tree.entry_of(os.path.basename(full), os.lstat(full))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def open_read(self, path: str) -> ReadHandle:
        return LocalRead(self._full(path))

    def open_write(self, path: str, nbytes: int, *, shared: bool = False) -> WriteHandle:
        return LocalWrite(self._full(path), nbytes, shared=shared, page_cache=self.page_cache)

    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        with self.open_read(path) as handle:
            if handle.nbytes > limit:
                raise StorageError(
                    f"{handle.path} has {format_nbytes(handle.nbytes)}; expected at most {format_nbytes(limit)}",
                    operation="read",
                    path=handle.path,
                    errno=errno.EFBIG,
                )
            data = bytearray(handle.nbytes)
            handle.read_into(0, [memoryview(data)])
        return bytes(data)

    def written_nbytes(self, path: str) -> int:
        full = self._full(path)
        if self.stat(path) is None:
            return 0
        with explained("stat", full, f"reading the status of {full}"):
            fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return local_tree.data_nbytes(fd)
        finally:
            os.close(fd)

    def write(self, path: str, data: Bytes) -> None:
        self.write_all({path: data})

    def write_all(self, files: Mapping[str, Content]) -> None:
        with self._made(files) as handles:
            # Start all before waiting for the first: a journal then commits once for all of them.
            for handle in handles:
                handle.begin()
            for handle in handles:
                handle.sync()

    def leave(self, path: str, data: Bytes) -> None:
        with self._made({path: data}):
            pass

    @contextlib.contextmanager
    def _made(self, files: Mapping[str, Content]) -> Iterator[Sequence[LocalWrite]]:
        """Create and write new files, and hold them open; all are deleted if anything fails, including the close."""
        made = []
        try:
            with contextlib.ExitStack() as closing:
                for path, content in files.items():
                    made.append(closing.enter_context(LocalWrite(self._full(path), 0)))
                    made[-1].write_on(pieces_of(content))
                yield made
        except StorageError:
            for handle in made:
                with contextlib.suppress(OSError):  # report the first error
                    os.unlink(handle.path)
            raise

    def replace(self, path: str, data: Bytes) -> None:
        draft = f"{path}.{uuid.uuid4().hex}.part"
        self.write(draft, data)
        full = self._full(path)
        with explained("replace", full, f"replacing {full}"):
            os.replace(self._full(draft), full)
            local_tree.sync_folder(os.path.dirname(full))

    def append(self, path: str, data: Bytes) -> None:
        full = self._full(path)
        with explained("append", full, f"appending to {full}"):
            fd = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                views = byte_views([data])
                while views:
                    views = without_first(views, os.writev(fd, leading(views)))
            finally:
                os.close(fd)

    def make_folder(self, path: str, *, synced: bool = True) -> None:
        full = wanted = self._full(path)
        with explained("make folder", full, f"creating the folder {full}"):
            missing = []
            while not os.path.isdir(full):
                missing.append(full)
                full = os.path.dirname(full)
            for folder in reversed(missing):
                try:
                    os.mkdir(folder)
                except FileExistsError:
                    if not os.path.isdir(folder):  # another process may have created the folder, but not a file
                        raise
                if synced or folder != wanted:
                    local_tree.sync_folder(os.path.dirname(folder))

    def sync_folder(self, path: str) -> None:
        full = self._full(path)
        with explained("sync folder", full, f"syncing the folder {full}"):
            local_tree.sync_folder(full)

    def rename(self, src: str, dst: str) -> None:
        full_src, full_dst = self._full(src), self._full(dst)
        with explained("rename", full_dst, f"renaming {full_src} to {full_dst}"):
            syscalls.rename_new(full_src, full_dst)

    def exchange(self, one: str, other: str) -> bool:
        full_one, full_other = self._full(one), self._full(other)
        with explained("exchange", full_other, f"exchanging {full_one} and {full_other}"):
            return syscalls.exchange(full_one, full_other)

    def why_fixed(self, path: str) -> str:
        return why_fixed(self._full(path))

    def keep_access(self, src: str, dst: str) -> None:
        full_src, full_dst = self._full(src), self._full(dst)
        with explained("keep access", full_dst, f"giving {full_dst} the mode of {full_src}"):
            wanted, found = os.stat(full_src), os.stat(full_dst)
            if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
                for uid, gid in ((wanted.st_uid, wanted.st_gid), (-1, wanted.st_gid)):
                    try:
                        os.chown(full_dst, uid, gid)
                        break
                    except PermissionError:
                        continue  # only root may change the owner, and others the group only to one of their groups
            # Last, because a change of owner clears the set-group-id bit. The owner must be able to write into it.
            os.chmod(full_dst, stat_modes.S_IMODE(wanted.st_mode) | stat_modes.S_IRWXU)

    def carry(self, src: str, dst: str) -> None:
        full_src, full_dst = self._full(src), self._full(dst)
        with explained("carry", full_dst, f"transferring {full_src} to {full_dst}"):
            try:
                os.link(full_src, full_dst, follow_symlinks=False)
            except FileExistsError:
                raise
            except OSError:  # no hard links, or not to other users' files
                shutil.copy2(full_src, full_dst, follow_symlinks=False)

    def share(self, src: str, dst: str) -> bool:
        full_src, full_dst = self._full(src), self._full(dst)
        with explained("share", full_dst, f"linking {full_src} as {full_dst}"):
            try:
                os.link(full_src, full_dst, follow_symlinks=False)
            except FileExistsError:
                # The answer to a first attempt was lost on the network; that attempt had succeeded.
                if not os.path.samestat(os.lstat(full_src), os.lstat(full_dst)):
                    raise
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return local_tree.clone_file(full_src, full_dst)
            return True

    def remove(self, path: str) -> None:
        full = self._full(path)
        with explained("remove", full, f"removing {full}"):
            local_tree.unlink(full)

    def remove_tree(self, path: str) -> None:
        full = self._full(path)
        with explained("remove", full, f"removing {full}"):
            local_tree.remove_tree(full)
