"""Save, load and verify against stock DCP and against plain system calls, as ratios of one run.

Run: ``python benchmarks/bench_engine.py [--gib 1.5] [--rounds 5] [--folder DIR]``. Contenders are interleaved, so that
a noisy machine slows all of them; each line gives the minimum and the median, and ratios are of medians.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import shutil
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table

import milepost
from milepost.saving.stage import tensor_bytes

SIDE = 2048
BLOCK_NBYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=96, help="fp32 tensors of 2048 x 2048 (16.8 MB each)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm/milepost-bench"))
    parser.add_argument("--threads", type=int, default=2, help="threads of the plain writer and reader, as ours")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    state = {f"layers.{i}.weight": torch.randn(SIDE, SIDE) for i in range(args.tensors)}
    print(f"{args.tensors} fp32 tensors of {SIDE} x {SIDE}: {nbytes(state) / 1e9:.2f} GB, {args.rounds} rounds")
    for folder, name in ((args.folder, "disk"), (args.tmpfs, "tmpfs")):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            bench_save(state, folder, name, args)
            if name == "disk":
                bench_load(state, folder, args)
                bench_verify(folder, args)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def nbytes(state: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


def bench_save(state: dict[str, torch.Tensor], folder: Path, name: str, args: argparse.Namespace) -> None:
    def fresh(kind: str) -> str:
        path = folder / kind
        shutil.rmtree(path, ignore_errors=True)
        return str(path)

    peaks: list[int] = []

    def ours() -> None:
        before = rss_nbytes()
        with PeakRss() as peak:
            milepost.save(fresh("milepost"), state)
        peaks.append(peak.value - before)

    race(
        f"sync save, {name}, synced",
        {
            "milepost.save": ours,
            "dcp.save (stock)": lambda: dcp.save(state, checkpoint_id=fresh("stock")),
            "plain pwrite + fsync": lambda: plain_write(
                state, Path(fresh("plain")), args.threads, direct=name == "disk"
            ),
        },
        args.rounds,
        nbytes(state),
    )
    print(f"peak memory above the tensors while saving: {max(peaks) / 1e6:.0f} MB")


def bench_load(state: dict[str, torch.Tensor], folder: Path, args: argparse.Namespace) -> None:
    milepost.save(folder / "milepost", state)
    dcp.save(state, checkpoint_id=str(folder / "stock"))
    plain_write(state, folder / "plain", args.threads, direct=False)
    into = {key: torch.zeros_like(value) for key, value in state.items()}
    columns = {key: torch.zeros(SIDE, SIDE // 8) for key in state}
    warm(folder)
    peaks: list[int] = []

    def ours() -> None:
        before = rss_nbytes()
        with PeakRss() as peak:
            milepost.load(folder / "milepost", into)
        peaks.append(peak.value - before)

    race(
        "load into existing tensors, warm page cache, digests on",
        {
            "milepost.load": ours,
            "dcp.load (stock)": lambda: dcp.load(into, checkpoint_id=str(folder / "stock")),
            "plain preadv": lambda: plain_read(into, folder / "plain", args.threads),
        },
        args.rounds,
        nbytes(state),
    )
    print(f"peak memory above the tensors while loading: {max(peaks) / 1e6:.0f} MB")
    for key in state:
        assert torch.equal(into[key], state[key]), key
    slice_of_columns(folder, columns)


def slice_of_columns(folder: Path, columns: dict[str, torch.Tensor]) -> None:
    """Load columns 0 to 255 of each tensor, as a rank of an 8-way row-parallel layer would."""
    from milepost.format.box import Box
    from milepost.loading.reader import read_tensors
    from milepost.run import catalog
    from milepost.storage import open_storage
    from milepost.tensors.layout import Piece, TensorLeaf
    from milepost.tensors.plan import plan_load

    storage, path = open_storage(folder / "milepost")
    manifest = catalog.read_manifest(storage, path)
    box = Box((0, 0), (SIDE, SIDE // 8))
    leaves = {
        key: TensorLeaf(key, t.dtype, (SIDE, SIDE), (Piece(box, Box.whole(t.shape)),), t) for key, t in columns.items()
    }
    started = time.perf_counter()
    items = plan_load(manifest, [leaf.spec for leaf in leaves.values()])
    stats = read_tensors(storage, path, items, leaves, catalog.read_digests(storage, path, manifest))
    seconds = time.perf_counter() - started
    # Every 4 MiB digest block holds rows, and each row a wanted column: rounded to blocks, all bytes are wanted.
    rounded = sum(shard.data_nbytes for entry in manifest.tensors.values() for shard in entry.shards)
    print(
        f"1/8 column slice: wanted {stats.wanted_nbytes / 1e6:.0f} MB, in digest blocks {rounded / 1e6:.0f} MB, "
        f"read {stats.read_nbytes / 1e6:.0f} MB ({stats.read_nbytes / rounded:.3f} of the blocks) in {seconds:.2f} s"
    )


def bench_verify(folder: Path, args: argparse.Namespace) -> None:
    path = folder / "milepost"

    def verify() -> None:
        report = milepost.verify(path)
        assert not report.problems, report.problems

    race(
        "verify every byte, warm page cache",
        {"milepost.verify": verify, "plain read of the same files": lambda: read_files(path, args.threads)},
        args.rounds,
        sum(f.stat().st_size for f in path.iterdir()),
    )


def race(title: str, contenders: dict[str, Callable[[], None]], rounds: int, size: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, act in contenders.items():
            gc.collect()
            os.sync()
            started = time.perf_counter()
            act()
            times[name].append(time.perf_counter() - started)
    first = statistics.median(next(iter(times.values())))
    table = Table(title=title, title_justify="left")
    for column in ("", "min s", "median s", "GB/s", "milepost is"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in times.items():
        median = statistics.median(values)
        table.add_row(
            name, f"{min(values):.2f}", f"{median:.2f}", f"{size / median / 1e9:.2f}", f"{median / first:.2f}x as fast"
        )
    Console().print(table)


def plain_write(state: dict[str, torch.Tensor], folder: Path, num_threads: int, *, direct: bool) -> None:
    """The same bytes in one file, without format or digests: from aligned memory where the disk takes it directly."""
    folder.mkdir(parents=True, exist_ok=True)
    views = [tensor_bytes(t) for t in state.values()]
    total = sum(len(v) for v in views)
    flags = os.O_CREAT | os.O_WRONLY | (os.O_DIRECT if direct else 0)
    fd = os.open(folder / "data", flags, 0o644)
    os.posix_fallocate(fd, 0, total)
    on_threads(num_threads, lambda worker: _write_share(fd, views, worker, num_threads, direct))
    os.fsync(fd)
    os.close(fd)


def _write_share(fd: int, views: list[memoryview], worker: int, num_threads: int, direct: bool) -> None:
    import mmap

    import numpy as np

    buffer = mmap.mmap(-1, BLOCK_NBYTES) if direct else None
    for index in range(worker, len(views), num_threads):
        view, base = views[index], sum(len(v) for v in views[:index])
        for start in range(0, len(view), BLOCK_NBYTES):
            block = view[start : start + BLOCK_NBYTES]
            if buffer is not None:
                np.copyto(np.frombuffer(buffer, dtype=np.uint8)[: len(block)], np.frombuffer(block, dtype=np.uint8))
                block = memoryview(buffer)[: len(block)]
            assert os.pwrite(fd, block, base + start) == len(block)


def plain_read(into: dict[str, torch.Tensor], folder: Path, num_threads: int) -> None:
    fd = os.open(folder / "data", os.O_RDONLY)
    views = [tensor_bytes(t) for t in into.values()]

    def share(worker: int) -> None:
        for index in range(worker, len(views), num_threads):
            base = sum(len(v) for v in views[:index])
            for start in range(0, len(views[index]), BLOCK_NBYTES):
                block = views[index][start : start + BLOCK_NBYTES]
                assert os.preadv(fd, [block], base + start) == len(block)

    on_threads(num_threads, share)
    os.close(fd)


def read_files(folder: Path, num_threads: int) -> None:
    for path in folder.iterdir():
        size = path.stat().st_size
        fd = os.open(path, os.O_RDONLY)

        def share(worker: int, fd: int = fd, size: int = size) -> None:
            buffer = bytearray(BLOCK_NBYTES)
            for start in range(worker * BLOCK_NBYTES, size, num_threads * BLOCK_NBYTES):
                os.preadv(fd, [buffer], start)

        on_threads(num_threads, share)
        os.close(fd)


def on_threads(count: int, act: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=act, args=(worker,)) for worker in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def warm(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def rss_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class PeakRss:
    """The highest resident set size seen while the block runs, sampled every 5 ms."""

    def __enter__(self) -> PeakRss:
        self.value = rss_nbytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.value = max(self.value, rss_nbytes())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
