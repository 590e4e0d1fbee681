"""Conversions against ``cp`` of as many bytes, in one run: time, and the peak memory of the whole process.

    python benchmarks/bench_convert.py [--folder DIR] [--flavor 1B] [--rounds 3] [--json FILE]

Weights are random, of the shape of Llama 3.2 1B in bfloat16 (2.5 GB) in three files. Every contender ends with its
bytes on the disk (``sync``). Times are the median of the rounds; the ratios are what counts, as disks differ.

``--stand-ins 8B,70B,405B`` runs the command lines of docs/conversion.md on models of published sizes in 128 files that
are all holes. Holes stay holes: what is zero is not written, and no space is reserved, so that neither the disk's size
nor its speed counts. They are compared with ``dd conv=sparse``, which does the same without converting: it reads every
byte, and writes none that is zero (``cp`` would not even read the holes). ``--minutes`` ends each early: rates and
memory are then those of what had passed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from figures import Figures
from milepost.format.huggingface import CONFIG_NAME, INDEX_NAME, shard_file_name
from milepost.format.safetensors import plan_layout
from milepost.interop.hf.config import make_config
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


_STAND_IN_CHILD = """
import os, sys, threading, time
import numpy as np
from milepost.cli.main import main
from milepost.storage import local_files

once = threading.Lock()
limit_s, passed, started = float(sys.argv[1]), 0, time.perf_counter()

def reserve(fd, nbytes):
    os.ftruncate(fd, nbytes)
    return False

def pwritev(fd, views, offset, write=os.pwritev):
    global passed
    passed += sum(map(len, views))
    if time.perf_counter() - started > limit_s:
        once.acquire()
        tell()
        os._exit(0)
    if any(np.frombuffer(view, np.uint64 if len(view) % 8 == 0 else np.uint8).any() for view in views):
        return write(fd, views, offset)
    return sum(map(len, views))

def tell():
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(time.perf_counter() - started, passed, int(peak.split()[1]) * 1024, "torch" in sys.modules, flush=True)

local_files._reserve = reserve
os.pwritev = pwritev
assert main(sys.argv[2:]) == 0
tell()
"""
STAND_IN_FILES = 128
MAX_STAND_IN_NBYTES = 400_000_000


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
    Case("HF -> DCP, same dtype", "hf", "dcp", "", False, 1.1),
    Case("HF -> DCP --dtype float32", "hf", "dcp", "float32", True, 1.1),
    Case("DCP -> HF", "dcp", "hf", "", False, 1.1),
    Case("DCP float32 -> .pt", "dcp32", "pt", "", False, 1.1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="where to work (needs about 20 GB for 1B); default: a temporary one"
    )
    parser.add_argument("--model", default="llama3")
    parser.add_argument("--flavor", default="1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stand-ins", metavar="FLAVORS", help="only convert models of these flavors, all of holes")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop each of those after so many minutes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-convert-") as name:
        if args.stand_ins:
            print(
                "| command | bytes passed | time | Milepost | `dd conv=sparse` | ratio | peak memory |\n"
                + "|---" * 7
                + "|"
            )
            for flavor in args.stand_ins.split(","):
                run_stand_in(Path(name), args.model, flavor, args.minutes * 60)
        else:
            figures = Figures(f"bench_convert.py --model {args.model} --flavor {args.flavor} --rounds {args.rounds}")
            run(Path(name), args.model, args.flavor, args.rounds, figures)
            figures.finish(args.json)


def run(folder: Path, model: str, flavor: str, rounds: int, figures: Figures) -> None:
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
        times = {case.name: ours, "cp": copies}
        figures.note(case.name, times)
        figures.ratio(f"{case.name}, seconds of cp of as many bytes", times, case.name, "cp", "at most", case.goal)
        mine, copy = statistics.median(ours), statistics.median(copies)
        print(
            f"{case.name:28}{mine:8.2f}s{copy:8.2f}s{mine / copy:8.2f}{case.goal:6.1f}{max(peaks) / 1e6:7.0f} MB",
            flush=True,
        )


_SEED_CHILD = """
import functools
import milepost.format.digest as digest
from milepost.interop import sinks
from milepost.interop.weights import boxes, stream

of_zeros = functools.cache(lambda nbytes: digest.crc32(bytes(nbytes)))

def write_image(handle, tensors, reader, **options):
    found = {}
    for placed in tensors:
        nbytes = boxes.total_nbytes([reader.content.tensors[placed.key]])
        found[placed.key] = passed = stream.PassedBytes()
        for start in range(0, nbytes, stream.BLOCK_NBYTES):
            size = min(stream.BLOCK_NBYTES, nbytes - start)
            passed._parts[start] = size, of_zeros(size)
    return found

sinks.write_image = write_image
"""
"""Before ``_STAND_IN_CHILD``: data is known to be zeros, so a checkpoint of holes is written without passing any."""


def run_stand_in(folder: Path, model: str, flavor: str, limit_s: float) -> None:
    """Print a row of the table for each of the two directions.

    If the first was stopped by the limit, the source of the second is made without reading that of the first.
    """
    hub, step, back = f"Llama-3.1-{flavor}", f"seed-{flavor}/step-0", f"my-{flavor}-model"
    write_random_weights(folder / hub, model, flavor, num_files=STAND_IN_FILES, sparse=True)
    (folder / step).parent.mkdir()
    chosen = ["--model", model, "--flavor", flavor]
    for command in (
        ["convert", hub, step, "--to", "dcp", *chosen],
        ["convert", step, back, "--to", "hf", *chosen, "--hf-assets", hub],
    ):
        if not (folder / command[1]).exists():
            stand_in(folder, ["convert", hub, step, "--to", "dcp", *chosen], math.inf, _SEED_CHILD)
        seconds, nbytes, peak_nbytes = stand_in(folder, command, limit_s)
        rate, plain = nbytes / seconds, copy_rate(folder, folder / hub, limit_s / 4)
        total = sum(path.stat().st_size for path in (folder / hub).iterdir())
        print(
            f"| `milepost {' '.join(command)}` | {nbytes / 1e9:,.0f} of {total / 1e9:,.0f} GB | {seconds:,.0f} s "
            f"| {rate / 1e9:.2f} GB/s | {plain / 1e9:.2f} GB/s | {plain / rate:.2f} | {peak_nbytes / 1e6:.0f} MB |",
            flush=True,
        )
        assert peak_nbytes <= MAX_STAND_IN_NBYTES, "memory grows with the model"
    for made in folder.iterdir():
        remove(made)


def stand_in(folder: Path, command: list[str], limit_s: float, before: str = "") -> tuple[float, int, int]:
    """Seconds, bytes written and peak memory of a command of ``milepost``, run in ``folder`` with holes kept."""
    whole = [sys.executable, "-c", before + _STAND_IN_CHILD, str(limit_s), *command]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, nbytes, peak_nbytes, has_torch = done.stdout.splitlines()[-1].split()
    assert has_torch == "False"
    return float(seconds), int(nbytes), int(peak_nbytes)


def copy_rate(folder: Path, source: Path, limit_s: float) -> float:
    """Bytes a second that ``dd conv=sparse`` passes, file by file for about ``limit_s``."""
    started, nbytes = time.perf_counter(), 0
    for path in sorted(source.glob("*.safetensors")):
        command = ["dd", f"if={path}", "of=copy", "conv=sparse", "bs=16M"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        nbytes += path.stat().st_size
        if time.perf_counter() - started > limit_s:
            break
    return nbytes / (time.perf_counter() - started)


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


def write_random_weights(folder: Path, model: str, flavor: str, *, num_files: int = 3, sparse: bool = False) -> None:
    """A Hugging Face folder of random bfloat16 weights in about ``num_files`` files; ``sparse``: of holes."""
    folder.mkdir()
    sizes = model_args(model, flavor)
    family = family_of(model, sizes)
    shapes = correspond(family, family.scheme("hf"), sizes).theirs
    tensors = {key: TensorInfo("bfloat16", shape) for key, shape in shapes.items()}
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    groups = _split(tensors, num_files)
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


def _split(tensors: Mapping[str, TensorInfo], num_files: int) -> list[list[str]]:
    """The tensors, in order, in ``num_files`` files, made by joining the smallest neighbours."""
    files = [[key] for key in tensors]
    sizes = [2 * int(np.prod(info.shape)) for info in tensors.values()]
    while len(files) > num_files:
        place = min(range(len(files) - 1), key=lambda index: sizes[index] + sizes[index + 1])
        files[place] += files.pop(place + 1)
        sizes[place] += sizes.pop(place + 1)
    return files


def _write_random(write: Callable[[bytes], object], generator: np.random.Generator, numel: int) -> None:
    for start in range(0, numel, 1 << 22):
        # The upper halves of float32 numbers are bfloat16 numbers.
        values = generator.standard_normal(min(1 << 22, numel - start), dtype=np.float32) * np.float32(0.02)
        write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


if __name__ == "__main__":
    main()
