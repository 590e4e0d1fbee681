"""Conversions against ``cp`` of as many bytes, in one run: time, and the peak memory of the whole process.

    python benchmarks/bench_convert.py [--folder DIR] [--flavor 1B] [--rounds 3] [--sparse 70B]

Weights are random, of the shape of Llama 3.2 1B in bfloat16 (2.5 GB) in three files. Every contender ends with its
bytes on the disk (``sync``). Times are the median of the rounds; the ratios are what counts, as disks differ.

``--sparse 70B`` streams a whole model of that size out of sparse files through the conversion to float32, and writes
nothing: its memory is to be that of the 1B.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from milepost.format.huggingface import CONFIG_NAME, INDEX_NAME, shard_file_name
from milepost.format.safetensors import plan_layout
from milepost.interop.hf.config import make_config
from milepost.interop.hf.extras import split_into_files
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import model_args
from milepost.interop.names.rules import correspond
from milepost.interop.weights.boxes import TensorInfo

_CHILD = """
import sys
from milepost.interop.convert import ConvertOptions, convert
src, dst, to, model, flavor, dtype = sys.argv[1:]
report = convert(src, dst, ConvertOptions(to=to, model=model, flavor=flavor, dtype=dtype or None))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report.seconds, int(peak.split()[1]) * 1024, "torch" in sys.modules)
"""


_SPARSE_CHILD = """
import sys, time
from milepost.collective.threads import map_in_threads
from milepost.interop.convert import plan_conversion
from milepost.interop.names.match import match
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import model_args
from milepost.interop.options import DEFAULT_BUDGET_NBYTES, ConvertOptions
from milepost.interop.weights.open import open_weights
from milepost.interop.weights.stream import SlabReader
src, model, flavor = sys.argv[1:]
started = time.perf_counter()
args = model_args(model, flavor)
family = family_of(model, args)
with open_weights(src).source as source:
    found = match(source, family, args, src)
    plan = plan_conversion(found, family, ConvertOptions(to="dcp", model=model, flavor=flavor, dtype="float32"))
    reader = SlabReader(plan.content, DEFAULT_BUDGET_NBYTES)
    slabs = ((key, slab) for key in plan.content.tensors for slab in reader.slabs(key))
    map_in_threads(lambda task: reader.read(*task), slabs, reader.num_threads, name="bench")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.perf_counter() - started, plan.written_nbytes, int(peak.split()[1]) * 1024)
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A conversion, what it is compared with (``cp`` of the source or of the result), and the goal for the ratio."""

    name: str
    src: str
    to: str
    dtype: str
    against_result: bool
    goal: float


CASES = (
    Case("HF -> DCP, same dtype", "hf", "dcp", "", False, 1.5),
    Case("HF -> DCP --dtype float32", "hf", "dcp", "float32", True, 1.6),
    Case("DCP -> HF", "dcp", "hf", "", False, 1.5),
    Case("DCP float32 -> .pt", "dcp32", "pt", "", False, 1.5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="where to work (needs about 20 GB for 1B); default: a temporary one"
    )
    parser.add_argument("--model", default="llama3")
    parser.add_argument("--flavor", default="1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sparse", metavar="FLAVOR", help="only stream a sparse model of this flavor")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-convert-") as name:
        if args.sparse:
            run_sparse(Path(name), args.model, args.sparse)
        else:
            run(Path(name), args.model, args.flavor, args.rounds)


def run(folder: Path, model: str, flavor: str, rounds: int) -> None:
    """Print one line for each case."""
    sources = {"hf": folder / "hf", "dcp": folder / "dcp", "dcp32": folder / "dcp32"}
    write_random_weights(sources["hf"], model, flavor)
    convert(sources["hf"], sources["dcp"], "dcp", model, flavor, "")
    convert(sources["hf"], sources["dcp32"], "dcp", model, flavor, "float32")
    print(f"{'conversion':28}{'ours':>9}{'cp':>9}{'ratio':>8}{'goal':>6}{'memory':>10}")
    for case in CASES:
        ours, copies, peaks = [], [], []
        for _ in range(rounds):
            out = folder / ("out.pt" if case.to == "pt" else "out")
            seconds, peak = convert(sources[case.src], out, case.to, model, flavor, case.dtype)
            ours.append(seconds)
            peaks.append(peak)
            copies.append(timed_copy(out if case.against_result else sources[case.src], folder / "copy"))
            remove(out)
        mine, copy = statistics.median(ours), statistics.median(copies)
        print(
            f"{case.name:28}{mine:8.2f}s{copy:8.2f}s{mine / copy:8.2f}{case.goal:6.1f}{max(peaks) / 1e6:7.0f} MB",
            flush=True,
        )


def run_sparse(folder: Path, model: str, flavor: str) -> None:
    """Print time and memory of a conversion that reads holes and writes nothing."""
    write_random_weights(folder / "hf", model, flavor, sparse=True)
    command = [sys.executable, "-c", _SPARSE_CHILD, str(folder / "hf"), model, flavor]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, nbytes, peak = map(float, done.stdout.split())
    print(
        f"{model} {flavor}: {nbytes / 1e9:.0f} GB of float32 streamed in {seconds:.0f} s, {peak / 1e6:.0f} MB of memory"
    )


def convert(src: Path, dst: Path, to: str, model: str, flavor: str, dtype: str) -> tuple[float, int]:
    """Seconds, from the process's start to its end, and its peak memory in bytes."""
    settle()
    started = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, str(src), str(dst), to, model, flavor, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    _, peak, has_torch = done.stdout.split()
    if has_torch != "False":
        raise SystemExit("torch was imported by a conversion")
    return seconds, int(peak)


def timed_copy(src: Path, dst: Path) -> float:
    """Seconds of ``cp -r`` and the sync of what it wrote."""
    settle()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", src, dst], check=True)
    for path in [dst, *dst.rglob("*")] if dst.is_dir() else [dst]:
        subprocess.run(["sync", path], check=True)
    seconds = time.perf_counter() - started
    remove(dst)
    return seconds


def settle() -> None:
    """Nothing of a contender before may still be on its way to the disk."""
    os.sync()


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_random_weights(folder: Path, model: str, flavor: str, *, sparse: bool = False) -> None:
    """A Hugging Face folder of random bfloat16 weights in three files or more; ``sparse``: of holes."""
    folder.mkdir()
    sizes = model_args(model, flavor)
    family = family_of(model, sizes)
    shapes = correspond(family, family.scheme("hf"), sizes).theirs
    tensors = {key: TensorInfo("bfloat16", shape) for key, shape in shapes.items()}
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    groups = list(split_into_files(tensors, {}, total // 3 + 1).values())
    generator = np.random.default_rng(0)
    weight_map = {}
    for index, keys in enumerate(groups, 1):
        name = shard_file_name(index, len(groups))
        layout = plan_layout({key: ("bfloat16", shapes[key]) for key in keys})
        with open(folder / name, "wb") as file:
            file.write(layout.prefix)
            weight_map |= dict.fromkeys(keys, name)
            if sparse:
                file.truncate(layout.nbytes)
                continue
            for key in keys:
                _write_random(file.write, generator, layout.tensors[key].nbytes // 2)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / CONFIG_NAME).write_text(json.dumps(make_config(family.name, sizes, "bfloat16")))


def _write_random(write: Callable[[bytes], object], generator: np.random.Generator, numel: int) -> None:
    for start in range(0, numel, 1 << 22):
        # The upper halves of float32 numbers are bfloat16 numbers.
        values = generator.standard_normal(min(1 << 22, numel - start), dtype=np.float32) * np.float32(0.02)
        write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


if __name__ == "__main__":
    main()
