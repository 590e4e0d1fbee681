"""What the commit record of a large world costs: fabricated layouts, no processes and no data.

Each rank holds one shard of every tensor, as with FSDP. For each size, in a process of its own: the bytes of the
record's files; the processor time to write one rank's sign-off, to commit (on rank 0: read all sign-offs, put them
together, prove that nothing is missing or stored twice, and write every file of the record), to read the head, to read
and check the whole record, and to plan one rank's load; and the memory that the commit takes at its peak. The commit is
Milepost's own, in a folder on disk; only the sign-offs and data files that it finds are made as it looks.

Then, with ``--commands``, the processor time of ``ls``, ``inspect``, ``verify`` and ``plan-resume`` on a step of each
size, whose data files are holes (start of Python included); and what each rank spends before it reads data.

What comes before, the plan, is measured by ``scale_plans.py``; ``scale_plot.py`` draws both.

Run: python benchmarks/bench_scale.py [--ranks 64 256 1024] [--tensors 291 3411 10000] [--commands] [--json FILE]
"""

from __future__ import annotations

import argparse
import builtins
import json
import math
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from milepost.errors import StateMismatchError
from milepost.format.box import Box
from milepost.format.columns import ObjectColumns, ShardTable, Tiling, coordinates
from milepost.format.manifest import (
    DIGESTS_NAME,
    MANIFEST_NAME,
    MAX_SHARDS_NBYTES,
    METADATA_NAME,
    SHARDS_NAME,
    FileEntry,
)
from milepost.format.manifest_json import from_json, parse_head
from milepost.format.record import tensor_record
from milepost.format.segment_merger import SegmentMerger
from milepost.format.segments import Segment
from milepost.format.shard_crcs import shard_crcs
from milepost.run import checkpoint_record
from milepost.run import commit as commit_module
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import begin_attempt
from milepost.run.signoff import SignOff, dump_sign_off, wait_for_sign_offs
from milepost.storage import LocalStorage, open_storage
from milepost.storage.base import Content, Entry, Storage
from milepost.tensors.plan import TensorSpec
from milepost.tensors.read_plan import plan_load
from milepost.testing.wrap import WrappedStorage

SAVE_ID = "0123456789abcdef0123456789abcdef"
SHAPES = [(16384, 16384), (16384, 53248), (53248, 16384), (16384,), (2048, 16384), (128256, 16384)]
PARTS = ("", "optimizer.state.", "optimizer.state.")
SUFFIX = ("", ".exp_avg", ".exp_avg_sq")
OWN_VALUES = ("cuda", "numpy", "python", "torch")
VALUE_NBYTES = 4096
RECORDS = {MANIFEST_NAME: "json", SHARDS_NAME: "shards", DIGESTS_NAME: "digests", METADATA_NAME: "metadata"}


def keys_of(num_tensors: int) -> list[str]:
    """Names as a model and its AdamW have them, sorted."""
    names = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2")
    keys = []
    for number in range(num_tensors):
        part, rest = number % 3, number // 3
        keys.append(f"{PARTS[part]}layers.{rest // 6}.{names[rest % 6]}.weight{SUFFIX[part]}")
    return sorted(keys)


def box_of(shape: tuple[int, ...], rank: int, num_ranks: int) -> Box:
    """A rank's rows."""
    rows = -(-shape[0] // num_ranks)
    start, stop = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
    return Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))


def segment_of(rank: int, num_ranks: int, keys: tuple[str, ...]) -> Segment:
    """What the rank would have written."""
    tilings = []
    for shape in SHAPES:
        box = box_of(shape, rank, num_ranks)
        layout = tensor_record("float32", box.sizes)
        tilings.append(
            Tiling(
                "float32",
                shape,
                coordinates([box.offsets], len(shape)),
                coordinates([box.sizes], len(shape)),
                np.array([layout.data_offset], np.int64),
                np.array([layout.nbytes], np.int64),
            )
        )
    tiling = (np.arange(len(keys)) % len(SHAPES)).astype(np.uint32)
    nbytes = np.array([one.record_nbytes[0] for one in tilings], np.int64)[tiling]
    stops = np.cumsum(-(-nbytes // 4096) * 4096)
    own = [f"rng.rank{rank}.{name}" for name in OWN_VALUES]
    places = stops[-1] + VALUE_NBYTES * np.arange(len(own))
    few = np.zeros(len(own), np.uint32)
    table = ShardTable(
        files=(f"__{rank}_0.distcp",),
        keys=keys,
        tilings=tilings,
        tiling=tiling,
        file=np.zeros(len(keys), np.uint32),
        record_offset=np.concatenate(([0], stops[:-1])),
        crc32=np.zeros(len(keys), np.uint32),
        objects=ObjectColumns(tuple(sorted(own)), few, places, np.full(len(own), VALUE_NBYTES), few),
        paths={},
    )
    blocks = table.spread([one.num_blocks(4 << 20) for one in tilings])
    crcs = np.random.default_rng(rank).integers(0, 1 << 32, int(blocks.sum()), dtype=np.uint32)
    table = replace(table, crc32=shard_crcs(table, crcs, 4 << 20))
    return Segment(table, {f"__{rank}_0.distcp": FileEntry(int(stops[-1]) + VALUE_NBYTES * len(own), 7)}, crcs)


def file_nbytes(rank: int, num_ranks: int, num_tensors: int) -> int:
    """The length of a rank's file."""
    sizes = [tensor_record("float32", box_of(shape, rank, num_ranks).sizes).nbytes for shape in SHAPES]
    blocks = [-(-sizes[number % len(SHAPES)] // 4096) * 4096 for number in range(num_tensors)]
    return sum(blocks) + VALUE_NBYTES * len(OWN_VALUES)


class Clock:
    """Processor seconds of this process by what they went for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, act: Callable[[], Any]) -> Any:
        started = time.process_time()
        found = act()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        return found


class Signed(WrappedStorage):
    """A storage in which all ranks have signed off, and their data files are: each is made as it is asked for.

    ``made_s`` are the processor seconds that went into that, which no real rank 0 would spend.
    """

    def __init__(self, inner: Storage, num_ranks: int, num_tensors: int) -> None:
        super().__init__(inner)
        self.num_ranks = num_ranks
        self.keys = tuple(keys_of(num_tensors))
        self.made_s = self.dump_s = 0.0
        self.nbytes: dict[str, int] = {}
        self._lock = threading.Lock()

    def names(self, path: str) -> Sequence[str]:
        return [f"sign-off-{rank}" for rank in range(self.num_ranks)]

    def read(self, path: str, limit: int = 1 << 30) -> bytes:
        name = path.rpartition("/")[2]
        if not name.startswith("sign-off-"):
            return super().read(path, limit)
        with self._lock:
            started = time.thread_time()
            rank = int(name.removeprefix("sign-off-"))
            segment = segment_of(rank, self.num_ranks, self.keys)
            before = time.thread_time()
            data = dump_sign_off(SignOff(rank, SAVE_ID, segment))
            self.dump_s += time.thread_time() - before
            self.made_s += time.thread_time() - started
        return data

    def list(self, path: str) -> builtins.list[Entry]:
        if not path.endswith("/data"):
            return super().list(path)
        found = super().list(path)  # `.metadata` may be there
        started = time.thread_time()
        for rank in range(self.num_ranks):
            found.append(Entry(f"__{rank}_0.distcp", False, file_nbytes(rank, self.num_ranks, len(self.keys)), 0.0))
        self.made_s += time.thread_time() - started
        return [entry for entry in found if entry.name not in RECORDS]

    def write_all(self, files: Mapping[str, Content]) -> None:
        self.inner.write_all(files)
        for path in files:
            found = self.inner.stat(path)
            assert found is not None
            self.nbytes[found.name] = found.nbytes


def commit(storage: Signed) -> dict[str, float]:
    """What rank 0 does once all have signed off: processor seconds of its parts. The step is ``step-7``."""
    attempt = begin_attempt(storage, "step-7", SAVE_ID)
    clock = Clock()
    merger = SegmentMerger()
    signed = clock(
        "sign-offs",
        lambda: wait_for_sign_offs(storage, attempt, storage.num_ranks, SAVE_ID, timeout_s=0, merger=merger),
    )
    clock.seconds["sign-offs"] -= storage.made_s
    storage.made_s = 0.0
    info = SaveInfo(step=7, kind="full", layout={"fsdp": storage.num_ranks})
    clock("publish", lambda: commit_module.publish(storage, attempt, "step-7", signed, info, now=1.7e9, merger=merger))
    clock.seconds["publish"] -= storage.made_s
    return clock.seconds


def peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(num_ranks: int, num_tensors: int) -> dict[str, Any]:
    """One size, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        local = LocalStorage(folder)
        warm = Signed(local, 1, num_tensors)
        commit(warm)
        local.remove_tree("step-7")
        storage = Signed(local, num_ranks, num_tensors)
        base_mb = peak_mb()
        parts = commit(storage)
        commit_mb = peak_mb()
        document = local.read(f"step-7/{MANIFEST_NAME}")
        clock = Clock()
        head = clock("head_s", lambda: parse_head(document[:65536]))
        assert head is not None
        shards = local.read(f"step-7/{SHARDS_NAME}", MAX_SHARDS_NBYTES)
        found = clock("read_s", lambda: from_json(document, MANIFEST_NAME, lambda *_: shards))
    rank = num_ranks // 2
    specs = [
        TensorSpec(key, "float32", entry.shape, (box_of(entry.shape, rank, num_ranks),))
        for key, entry in found.tensors.items()
    ]
    items = clock("plan_load_s", lambda: plan_load(found, specs))
    assert len(items) == sum(math.prod(spec.boxes[0].sizes) > 0 for spec in specs)
    return {
        "ranks": num_ranks,
        "tensors": num_tensors,
        "shards": num_ranks * num_tensors,
        **{f"{column}_mb": storage.nbytes[name] / 1e6 for name, column in RECORDS.items()},
        "segment_s": storage.dump_s / num_ranks,
        "commit_s": sum(parts.values()),
        "commit_parts_s": parts,
        **{name: clock.seconds[name] for name in ("head_s", "read_s", "plan_load_s")},
        "commit_peak_mb": commit_mb - base_mb,
    }


def fabricate(folder: Path, num_ranks: int, num_tensors: int) -> None:
    """A committed step, ``step-7``, whose data files are holes of the right length."""
    folder.mkdir(parents=True, exist_ok=True)
    commit(Signed(LocalStorage(folder), num_ranks, num_tensors))
    for rank in range(num_ranks):
        with (folder / "step-7" / f"__{rank}_0.distcp").open("wb") as file:
            file.truncate(file_nbytes(rank, num_ranks, num_tensors))


def _children_s() -> float:
    """Processor seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


_RUN_CLI = "import sys; from milepost.cli.main import main; sys.exit(main())"


def before_reading(step: Path, num_ranks: int) -> float:
    """Processor seconds that a rank spends on the record and its plan, before it reads the first byte of data."""
    storage, name = open_storage(step)
    rank = num_ranks // 2
    started = time.process_time()
    manifest = checkpoint_record.read_manifest(storage, name)
    digests = checkpoint_record.read_digests(storage, name, manifest)
    specs = [
        TensorSpec(key, "float32", entry.shape, (box_of(entry.shape, rank, num_ranks),))
        for key, entry in manifest.tensors.items()
    ]
    items = plan_load(manifest, specs)
    assert digests is not None
    assert all(len(digests.of_shard(item.key, item.shard_index)) for item in items)
    return time.process_time() - started


def measure_commands(num_ranks: int, num_tensors: int) -> dict[str, float]:
    """Processor seconds of each command on a step of this size; and of a rank before it reads data."""
    with tempfile.TemporaryDirectory() as folder:
        step = Path(folder) / "step-7"
        fabricate(Path(folder), num_ranks, num_tensors)
        commands = {
            "ls": ["ls", folder],
            "inspect": ["inspect", str(step)],
            "inspect *": ["inspect", str(step), "--tensors", "*"],
            "verify metadata": ["verify", str(step), "--level", "metadata"],
            "verify sizes": ["verify", str(step), "--level", "sizes"],
            "plan-resume": ["plan-resume", str(step), "--world-size", str(num_ranks)],
            "plan-resume half": ["plan-resume", str(step), "--world-size", str(num_ranks // 2)],
        }
        found = {"before reading": before_reading(step, num_ranks)}
        for name, command in commands.items():
            before = _children_s()
            done = subprocess.run(
                [sys.executable, "-c", _RUN_CLI, *command], capture_output=True, text=True, timeout=1800
            )
            found[name] = _children_s() - before
            if done.returncode not in (0, StateMismatchError.exit_status):  # there is no optimizer, and so on
                raise SystemExit(f"milepost {' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return found


def main() -> None:
    """Measure each size in a process of its own, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--tensors", type=int, nargs="+", default=[291, 3411])
    parser.add_argument("--one", action="store_true", help="measure the one size given here, and print it as JSON")
    parser.add_argument("--commands", action="store_true", help="measure the commands too")
    parser.add_argument("--json", type=Path, help="all figures, to a file")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.ranks[0], args.tensors[0])))
        return
    columns = ("ranks", "tensors", "shards", "json_mb", "shards_mb", "digests_mb", "metadata_mb")
    columns += ("segment_s", "commit_s", "head_s", "read_s", "plan_load_s", "commit_peak_mb")
    print("  ".join(f"{name:>12}" for name in columns))
    everything = []
    for num_tensors in args.tensors:
        for num_ranks in args.ranks:
            command = [sys.executable, __file__, "--one", "--ranks", str(num_ranks), "--tensors", str(num_tensors)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=True)
            found = json.loads(done.stdout)
            everything.append(found)
            print("  ".join(_cell(found[name]) for name in columns), flush=True)
            print("    commit: " + ", ".join(f"{k} {s:.2f} s" for k, s in found["commit_parts_s"].items()), flush=True)
            if args.commands:
                timed = measure_commands(num_ranks, num_tensors)
                print("    commands: " + ", ".join(f"{k} {s:.2f} s" for k, s in timed.items()), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(everything, indent=1))


def _cell(value: float) -> str:
    return f"{value:>12,}" if isinstance(value, int) else f"{value:>12.4f}" if value < 1 else f"{value:>12.1f}"


if __name__ == "__main__":
    main()
