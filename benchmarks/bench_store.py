"""Saving to and loading from an S3 store, against obstore's plain parallel put and get, and against stock DCP.

Run: ``python benchmarks/bench_store.py [--nbytes 1e9] [--rounds 3] [--skip-stock]``. One process, one SeaweedFS on
this machine; each round does everything once, in turn, and the figures are medians. Stock DCP is measured with torch's
fsspec writer and reader, and, where they are installed (``pip install s3torchconnector``), with those of
s3torchconnector. Requests are counted by a proxy, with small tensors, in a part of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import obstore.store
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import milepost
from figures import Figures
from milepost.storage import open_storage
from milepost.storage.object_writer import MIN_PART_NBYTES
from milepost.storage.store_requests import NUM_STREAMS
from milepost.testing.proxy import Proxy
from milepost.testing.seaweed import BUCKET, Seaweed, seaweed
from milepost.testing.world import run_world

TENSOR_NBYTES = 16 << 20


def state_of(nbytes: int) -> dict[str, torch.Tensor]:
    """Tensors of 16 MiB, ``nbytes`` in all."""
    count = max(1, nbytes // TENSOR_NBYTES)
    return {f"layers.{number}.weight": torch.randn(2048, TENSOR_NBYTES // 4 // 2048) for number in range(count)}


def seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def measure(server: Seaweed, nbytes: int, rounds: int, *, with_stock: bool) -> dict[str, list[float]]:
    """Seconds of each kind of work, one entry a round."""
    state = state_of(nbytes)
    total = sum(tensor.nbytes for tensor in state.values())
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in state.values()]).numpy()
    options = {"timeout": "300s"} | {"allow_http": True}
    plain = obstore.store.S3Store(BUCKET, client_options=options)
    part = max(MIN_PART_NBYTES, -(-total // 9000))
    into = {key: torch.empty_like(tensor) for key, tensor in state.items()}
    found: dict[str, list[float]] = {}
    url = f"s3://{BUCKET}/bench"

    def put() -> None:
        obstore.put(plain, "plain", memoryview(flat), use_multipart=True, chunk_size=part, max_concurrency=NUM_STREAMS)

    def get() -> None:
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            starts = range(0, total, part)
            read = sum(
                pool.map(lambda at: len(obstore.get_range(plain, "plain", start=at, end=min(at + part, total))), starts)
            )
        assert read == total

    works: dict[str, Callable[[], object]] = {
        "plain put": put,
        "plain get": get,
        "milepost save": lambda: milepost.save(f"{url}/ours", state),
        "milepost load": lambda: milepost.load(f"{url}/ours", into),
    }
    if with_stock:
        stock = {"endpoint_url": server.endpoint}
        works |= {
            "stock DCP save": lambda: dcp.save(
                dict(state), storage_writer=FsspecWriter(f"{url}/stock", **stock), no_dist=True
            ),
            "stock DCP load": lambda: dcp.load(
                dict(into), storage_reader=FsspecReader(f"{url}/stock", **stock), no_dist=True
            ),
        } | connector_works(f"{url}/connector/", state, into)
    storage, folder = open_storage(url)
    for _ in range(rounds):
        for name, act in works.items():
            found.setdefault(name, []).append(seconds(act))
        assert all(torch.equal(into[key], state[key]) for key in state)
        storage.remove_tree(folder)
        obstore.delete(plain, "plain")
    return found


def connector_works(
    url: str, state: dict[str, torch.Tensor], into: dict[str, torch.Tensor]
) -> dict[str, Callable[[], object]]:
    """Stock DCP with s3torchconnector's writer and reader; nothing where that is not installed."""
    try:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageReader, S3StorageWriter
    except ImportError:
        return {}
    region = os.environ["AWS_REGION"]
    config = S3ClientConfig(force_path_style=True)

    def save() -> None:
        writer = S3StorageWriter(region, url, s3client_config=config, thread_count=NUM_STREAMS)
        dcp.save(dict(state), storage_writer=writer, no_dist=True)

    def load() -> None:
        dcp.load(dict(into), storage_reader=S3StorageReader(region, url, s3client_config=config), no_dist=True)

    return {"s3torchconnector save": save, "s3torchconnector load": load}


def requests(server: Seaweed, num_tensors: int, num_ranks: int) -> tuple[int, int]:
    """Requests that a save and a load of so many small tensors make, of all ranks together.

    The tensors are shared out among the ranks, each of which loads its own.
    """
    path = f"s3://{BUCKET}/requests-{num_tensors}-{num_ranks}"
    with Proxy(server.port) as proxy:
        counts = []
        for act in (_save_small, _load_small):
            proxy.forget()
            run_world(act, num_ranks, proxy.endpoint, path, num_tensors)
            counts.append(sum(proxy.count().values()))
        return counts[0], counts[1]


def _small(num_tensors: int) -> dict[str, torch.Tensor]:
    numbers = range(dist.get_rank(), num_tensors, dist.get_world_size())
    return {f"t.{number}": torch.full((64, 64), float(number)) for number in numbers}


def _save_small(endpoint: str, path: str, num_tensors: int) -> None:
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    milepost.save(path, _small(num_tensors))


def _load_small(endpoint: str, path: str, num_tensors: int) -> None:
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    milepost.load(path, _small(num_tensors))


def stalls(nbytes: int, num_saves: int, remote_folder: str) -> list[float]:
    """Seconds that each save stalls the training thread, with a remote folder or (empty) without."""
    model = torch.nn.Linear(2048, nbytes // 4 // 2048, bias=False)
    config = milepost.CheckpointConfig(
        enable=True, interval=1, keep_latest_k=1, async_mode="async", remote_folder=remote_folder
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        manager = milepost.CheckpointManager(f"{folder}/run", config, model=model)
        for step in range(1, num_saves + 1):
            manager.save(step)
            manager.maybe_wait_for_staging()
            time.sleep(2.0)  # steps of training
        manager.close()
        return [event.stall_s for event in manager.take_events()][1:]  # the first allocates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nbytes", type=lambda text: int(float(text)), default=10**9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-stock", action="store_true")
    parser.add_argument("--only", choices=("times", "requests", "stalls"), help="one of the three parts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    torch.set_num_threads(1)
    console = Console()
    with seaweed() as server:
        os.environ.update(server.environment())
        _give_own_priority(server.pid)
        if args.only in (None, "requests"):
            # First: ranks are forks, which must not inherit a client of the store.
            counts = Table("tensors", "ranks", "requests of a save", "requests of a load")
            for num_tensors, num_ranks in ((1, 1), (100, 1), (1000, 1), (1000, 2), (1000, 4), (1000, 8)):
                saved, loaded = requests(server, num_tensors, num_ranks)
                counts.add_row(str(num_tensors), str(num_ranks), str(saved), str(loaded))
            console.print(counts)
        if args.only in (None, "times"):
            found = measure(server, args.nbytes, args.rounds, with_stock=not args.skip_stock)
            console.print(_times(found, args.nbytes))
            figures = Figures(f"bench_store.py --only times --nbytes {args.nbytes:g} --rounds {args.rounds}")
            _hold(found, figures)
            figures.finish(args.json)
        if args.only in (None, "stalls"):
            size = args.nbytes // 4
            alone, tiered = stalls(size, 6, ""), stalls(size, 6, f"s3://{BUCKET}/tier")
            console.print(
                f"training stalled by an async save of {size / 1e6:.0f} MB to /dev/shm: "
                f"{statistics.median(alone):.3f} s; with the store behind it: {statistics.median(tiered):.3f} s"
            )


def _give_own_priority(pid: int) -> None:
    """Let the server, which is in a session of its own, be scheduled as this process is (``autogroup`` of Linux)."""
    with contextlib.suppress(OSError, IndexError):
        Path(f"/proc/{pid}/autogroup").write_text(Path("/proc/self/autogroup").read_text().split()[-1])


def _hold(found: dict[str, list[float]], figures: Figures) -> None:
    figures.note("object store", found)
    for work, plain in (("save", "plain put"), ("load", "plain get")):
        ours = f"milepost {work}"
        figures.ratio(f"{work}, object store, of a {plain}'s speed", found, plain, ours, "at least", 0.85)
        for other in ("stock DCP", "s3torchconnector"):
            if f"{other} {work}" in found:
                name = f"{work}, object store, of {other}'s speed"
                figures.ratio(name, found, f"{other} {work}", ours, "at least", 1.0)


def _times(found: dict[str, list[float]], nbytes: int) -> Table:
    table = Table("work", "median s", "MB/s", "of plain")
    for name, each in found.items():
        against = "plain put" if name.endswith(("save", "put")) else "plain get"
        # Each round against its own: a machine that is busy is so for both.
        ratios = [plain / own for plain, own in zip(found[against], each, strict=True)]
        middle = statistics.median(each)
        table.add_row(name, f"{middle:.2f}", f"{nbytes / middle / 1e6:.0f}", f"{statistics.median(ratios):.2f}")
    return table


if __name__ == "__main__":
    main()
