"""Save, load and verify in one process, against other programs and against the machine's own limits.

Run: ``python benchmarks/bench_engine.py [--gb 0.1 0.4 1.6] [--rounds 5] [--folder DIR] [--json FILE]``. The state is
fp32 tensors of 2048 x 2048 (16.8 MB each). Contenders take turns in each round: each saves into a fresh folder, synced,
then loads what it has just saved (the process died, the machine lives), then loads it again. Of each size it prints
minima and medians; ratios are of medians, those of minima beside them. The largest size is verified too, and read in
slices. Memory needed: the largest size five times, the page cache included.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import milepost
import peers
import plain
from figures import Figures, race, show
from milepost.saving.stage import tensor_bytes

SIDE = 2048
TENSOR_NBYTES = SIDE * SIDE * 4
OURS, STOCK = "Milepost", "stock DCP"
VARIANTS = {
    "plain: page cache, early write-back, one thread": {"num_threads": 1, "early": True},
    "plain: page cache, early write-back, two threads": {"num_threads": 2, "early": True},
    "plain: page cache, fsync at the end": {"num_threads": 2, "early": False},
    "plain: past the page cache (O_DIRECT)": {"num_threads": 2, "early": False, "direct": True},
}
PLAIN_READ = next(iter(VARIANTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.1, 0.4, 1.6], help="sizes, in GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    figures = Figures(f"bench_engine.py --gb {' '.join(f'{gb:g}' for gb in args.gb)} --rounds {args.rounds}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for gb in sorted(args.gb):
        count = max(1, round(gb * 1e9 / TENSOR_NBYTES))
        state = {f"layers.{i}.weight": torch.randn(SIDE, SIDE) for i in range(count)}
        is_last = gb == max(args.gb)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            save_and_load(state, Path(folder), f"{gb:g} GB", args.rounds, figures, with_goals=is_last)
            if is_last:
                bench_verify(state, Path(folder), args.rounds, figures)
                slice_of_columns(Path(folder), len(state), figures)
    figures.finish(args.json)


def contenders() -> dict[str, peers.Peer]:
    """Those that save and load, ourselves first."""
    found = {
        OURS: peers.Peer(lambda path, state: milepost.save(path, state), lambda path, into: milepost.load(path, into)),
        STOCK: peers.stock_dcp(),
        "torch.save, fsync; torch.load(mmap), copy": peers.torch_save(),
    }
    other = peers.torch_checkpointing()
    if other is not None:
        found["torch_checkpointing, sync"] = other
    for name, how in VARIANTS.items():
        found[name] = peers.Peer(
            lambda path, state, how=how: plain.write([*map(tensor_bytes, state.values())], path / "data", **how),
            lambda path, into: plain.read([*map(tensor_bytes, into.values())], path / "data", 2),
        )
    return found


def save_and_load(
    state: peers.State, folder: Path, size: str, rounds: int, figures: Figures, *, with_goals: bool
) -> None:
    """Let all contenders save and load, and hold ourselves to the goals."""
    into = {key: torch.zeros_like(value) for key, value in state.items()}
    works = {work: {name: [] for name in contenders()} for work in ("save", "load after the save", "load again")}
    works["load after the save"] = {name: [] for name in works["save"] if name == PLAIN_READ or "plain" not in name}
    works["load again"] = {name: [] for name in works["load after the save"]}
    memory: dict[str, int] = {"save": 0, "load again": 0}

    def timed(work: str, name: str, act: Callable[[], object]) -> None:
        gc.collect()
        with PeakRss() as peak:
            started = time.perf_counter()
            act()
            works[work][name].append(time.perf_counter() - started)
        if name == OURS and work in memory:
            memory[work] = max(memory[work], peak.grown_nbytes)

    peers_by_name = contenders()
    names = list(peers_by_name)
    for number in range(rounds):
        # Another is first in each round, and each begins a second after the last: what was removed is discarded by the
        # device in the background.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            peer, path = peers_by_name[name], folder / "".join(filter(str.isalnum, name))
            os.sync()
            time.sleep(1.0)
            timed("save", name, lambda peer=peer, path=path: peer.save(path, state))
            for work in ("load after the save", "load again") if name in works["load again"] else ():
                into["layers.0.weight"].zero_()
                timed(work, name, lambda peer=peer, path=path: peer.load(path, into))
                assert torch.equal(into["layers.0.weight"], state["layers.0.weight"]), name
            if name != OURS or number < rounds - 1:
                shutil.rmtree(path)
    nbytes = sum(tensor.nbytes for tensor in state.values())
    for work, times in works.items():
        show(f"{work}, {size}", times, nbytes)
        figures.note(f"{work}, {size}", times)
    if not with_goals:
        return
    best = min(VARIANTS, key=lambda name: statistics.median(works["save"][name]))
    figures.ratio(f"save {size}, of stock DCP's speed", works["save"], STOCK, OURS, "at least", 2.3)
    figures.ratio(f"save {size}, of the best plain write ({best[7:]})", works["save"], best, OURS, "at least", 0.9)
    after, again = works["load after the save"], works["load again"]
    figures.ratio(f"load {size} right after the save, of stock DCP's speed", after, STOCK, OURS, "at least", 4.0)
    figures.ratio(f"load {size} again, of stock DCP's speed", again, STOCK, OURS, "at least", 4.0)
    figures.ratio(f"load {size} again, of plain reads without digests", again, PLAIN_READ, OURS, "at least", 0.6)
    for work, goal in (("save", 19.0), ("load again", 10.0)):
        figures.hold(
            f"MB of memory above the tensors, {work.removesuffix(' again')}", "at most", goal, memory[work] / 1e6
        )


def bench_verify(state: peers.State, folder: Path, rounds: int, figures: Figures) -> None:
    """Verify what was saved last, from the disk and from the page cache, against plain reads of the same files."""
    path = folder / OURS
    size = sum(file.stat().st_size for file in path.iterdir())

    def verify() -> Callable[[], None]:
        report = milepost.verify(path)
        assert report.verdict == "ok", report.problems
        return forget

    def read() -> Callable[[], None]:
        plain.read_files(path, 2)
        return forget

    def forget() -> None:
        if is_cold:
            plain.forget(path)

    for is_cold, goal in ((True, 0.9), (False, 0.5)):
        forget()
        if not is_cold:
            plain.read_files(path, 2)
        times = race("verify every byte", {OURS: verify, "plain read": read}, rounds, size, cold=is_cold)
        figures.note(f"verify{', cold' if is_cold else ''}", times)
        where = "cold, of plain reads of the disk" if is_cold else "from the page cache, of plain reads"
        figures.ratio(f"verify every byte {where}", times, "plain read", OURS, "at least", goal)


def slice_of_columns(folder: Path, num_tensors: int, figures: Figures) -> None:
    """Load columns 0 to 255 of each tensor, as a rank of an 8-way row-parallel layer would."""
    from milepost.format.box import Box
    from milepost.loading.reader import read_tensors
    from milepost.run import checkpoint_record
    from milepost.storage import open_storage
    from milepost.tensors.layout import Piece, TensorLeaf
    from milepost.tensors.read_plan import plan_load

    columns = {f"layers.{i}.weight": torch.zeros(SIDE, SIDE // 8) for i in range(num_tensors)}
    storage, path = open_storage(folder / OURS)
    manifest = checkpoint_record.read_manifest(storage, path)
    box = Box((0, 0), (SIDE, SIDE // 8))
    leaves = {
        key: TensorLeaf(key, t.dtype, (SIDE, SIDE), (Piece(box, Box.whole(t.shape)),), t) for key, t in columns.items()
    }
    items = plan_load(manifest, [leaf.spec for leaf in leaves.values()])
    stats = read_tensors(storage, path, items, leaves, checkpoint_record.read_digests(storage, path, manifest))
    # Every 4 MiB digest block holds rows, and each row a wanted column: rounded to blocks, all bytes are wanted.
    rounded = sum(shard.data_nbytes for entry in manifest.tensors.values() for shard in entry.shards)
    figures.hold("1/8 slice of columns: bytes read, of the blocks", "at most", 1.05, stats.read_nbytes / rounded)


class PeakRss:
    """The highest resident set size seen while the block runs, sampled every 5 ms."""

    def __enter__(self) -> PeakRss:
        self._before = self._most = _rss_nbytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._most = max(self._most, _rss_nbytes())

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def grown_nbytes(self) -> int:
        """Above what was there at the beginning."""
        return self._most - self._before


def _rss_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
