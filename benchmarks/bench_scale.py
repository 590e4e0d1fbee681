"""What the commit record of a large world costs: fabricated layouts, no processes and no data.

Each rank holds one shard of every tensor, as with FSDP. For each size, in a process of its own: the bytes of the
record's files; the processor time to write one rank's segment, to commit (on rank 0: read all segments, put them
together, prove that nothing is missing or stored twice, and make every file of the record), to read the head, to read
and check the whole record, and to plan one rank's load; and the memory that the commit takes at its peak.

Then, with ``--commands``, the processor time of ``ls``, ``inspect``, ``verify`` and ``plan-resume`` on a step of each
size, whose data files are holes (start of Python included); and what each rank spends before it reads data.

What comes before, the plan, is measured by ``scale_plans.py``; ``scale_plot.py`` draws both.

Run: python benchmarks/bench_scale.py [--ranks 64 256 1024] [--tensors 291 3411 10000] [--commands] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from milepost.errors import StateMismatchError
from milepost.format.box import Box
from milepost.format.columns import ObjectColumns, ShardTable, Tiling, coordinates, with_table
from milepost.format.columns_check import table_faults
from milepost.format.dcp_writer import dump_metadata
from milepost.format.digest import crc32, dump_digests
from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME, SHARDS_NAME, FileEntry, Manifest
from milepost.format.manifest_json import from_json, parse_head, to_json
from milepost.format.record import tensor_record
from milepost.format.segments import Segment, dump_segment, merge_segments, parse_segment
from milepost.format.shard_crcs import shard_crcs
from milepost.format.shards_file import dump_shards
from milepost.run import checkpoint_record
from milepost.storage import open_storage
from milepost.tensors.plan import TensorSpec, plan_load

SAVE_ID = "0123456789abcdef0123456789abcdef"
SHAPES = [(16384, 16384), (16384, 53248), (53248, 16384), (16384,), (2048, 16384), (128256, 16384)]
PARTS = ("", "optimizer.state.", "optimizer.state.")
SUFFIX = ("", ".exp_avg", ".exp_avg_sq")
GOALS = {"commit_s": 10.0, "read_s": 0.5}
"""For ten million shards."""


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
    none, no_u4 = np.empty(0, np.int64), np.empty(0, np.uint32)
    table = ShardTable(
        files=(f"__{rank}_0.distcp",),
        keys=keys,
        tilings=tilings,
        tiling=tiling,
        file=np.zeros(len(keys), np.uint32),
        record_offset=np.concatenate(([0], stops[:-1])),
        crc32=np.zeros(len(keys), np.uint32),
        objects=ObjectColumns((), no_u4, none, none, no_u4),
        paths={},
    )
    blocks = table.spread([one.num_blocks(4 << 20) for one in tilings])
    crcs = np.random.default_rng(rank).integers(0, 1 << 32, int(blocks.sum()), dtype=np.uint32)
    table = replace(table, crc32=shard_crcs(table, crcs, 4 << 20))
    return Segment(table, {f"__{rank}_0.distcp": FileEntry(int(stops[-1]), 7)}, crcs)


class Clock:
    """Processor seconds of this process by what they went for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, act: Callable[[], Any]) -> Any:
        started = time.process_time()
        found = act()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        return found


@dataclass(frozen=True)
class Committed:
    """The files of a record, as far as they are read again, and the bytes of all."""

    document: bytes
    shards: bytes
    digests: bytes
    metadata: bytes
    files: Mapping[str, FileEntry]
    """Of the data."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each file of the record."""
        names = {"json": self.document, "shards": self.shards, "digests": self.digests, "metadata": self.metadata}
        return {name: len(data) for name, data in names.items()}


def commit(clock: Clock, written: Sequence[tuple[bytes, Mapping[str, FileEntry]]]) -> Committed:
    """What rank 0 does once all have signed off, but for the storage."""
    segments = clock(
        "commit parse",
        lambda: [parse_segment(memoryview(data), files, SAVE_ID, "sign-off") for data, files in written],
    )
    table, crcs = clock("commit merge", lambda: merge_segments(segments, range(len(segments)), {}))
    files = {name: entry for segment in segments for name, entry in segment.files.items()}
    faults = clock("commit prove", lambda: table_faults(table, files))
    assert not faults, faults
    segments.clear()
    bare = Manifest(7, SAVE_ID, 1.7e9, "full", len(written), {"fsdp": len(written)}, {}, {}, {}, files)
    manifest = with_table(bare, table)
    shards = clock("commit shards", lambda: bytes(dump_shards(table, SAVE_ID)))
    digests = clock("commit digests", lambda: dump_digests(SAVE_ID, [crcs.data]))
    metadata = clock("commit .metadata", lambda: dump_metadata(manifest))
    data_files = dict(files)
    for name, content in ((SHARDS_NAME, shards), (DIGESTS_NAME, digests), (METADATA_NAME, metadata)):
        files[name] = FileEntry(len(content), clock("commit crc", lambda one=content: crc32(one)))
    document = clock("commit json", lambda: to_json(manifest))
    return Committed(document, shards, digests, metadata, data_files)


def sign_offs(clock: Clock, num_ranks: int, num_tensors: int) -> list[tuple[bytes, Mapping[str, FileEntry]]]:
    """What all ranks would have signed off."""
    keys = tuple(keys_of(num_tensors))
    written = []
    for rank in range(num_ranks):
        segment = segment_of(rank, num_ranks, keys)
        written.append((clock("segments", lambda one=segment: dump_segment(one, SAVE_ID)), segment.files))
    return written


def measure(num_ranks: int, num_tensors: int) -> dict[str, Any]:
    """One size, in this process."""
    clock = Clock()
    written = sign_offs(clock, num_ranks, num_tensors)
    base_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = commit(clock, written)
    commit_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    head = clock("head_s", lambda: parse_head(record.document[:65536]))
    assert head is not None
    found = clock("read_s", lambda: from_json(record.document, MANIFEST_NAME, lambda *_: record.shards))
    rank = num_ranks // 2
    specs = [
        TensorSpec(key, "float32", entry.shape, (box_of(entry.shape, rank, num_ranks),))
        for key, entry in found.tensors.items()
    ]
    items = clock("plan_load_s", lambda: plan_load(found, specs))
    assert len(items) == sum(math.prod(spec.boxes[0].sizes) > 0 for spec in specs)
    parts = {name.removeprefix("commit "): s for name, s in clock.seconds.items() if name.startswith("commit ")}
    return {
        "ranks": num_ranks,
        "tensors": num_tensors,
        "shards": num_ranks * num_tensors,
        **{f"{name}_mb": nbytes / 1e6 for name, nbytes in record.nbytes.items()},
        "segment_s": clock.seconds["segments"] / num_ranks,
        "commit_s": sum(parts.values()),
        "commit_parts_s": parts,
        **{name: clock.seconds[name] for name in ("head_s", "read_s", "plan_load_s")},
        "commit_peak_mb": commit_mb - base_mb,
    }


def fabricate(step: Path, num_ranks: int, num_tensors: int) -> None:
    """A committed step whose data files are holes of the right length."""
    record = commit(Clock(), sign_offs(Clock(), num_ranks, num_tensors))
    step.mkdir(parents=True)
    names = {MANIFEST_NAME: record.document, SHARDS_NAME: record.shards}
    for name, content in {**names, DIGESTS_NAME: record.digests, METADATA_NAME: record.metadata}.items():
        (step / name).write_bytes(content)
    for name, entry in record.files.items():
        with (step / name).open("wb") as file:
            file.truncate(entry.nbytes)


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
        fabricate(step, num_ranks, num_tensors)
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
