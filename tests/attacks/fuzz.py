"""The fuzzer: ``python tests/attacks/fuzz.py --inputs 100000``, or ``make fuzz``.

Inputs are changed copies of valid ones (``fuzz_mutations``), given to every reader of ``fuzz_targets`` in processes of
their own, which have little memory, little time for each input, and an audit hook that lets them do nothing but read.
An input whose outcome is new (another error, another kind of value) is kept to make further ones from.

An input fails its target if anything but a value or a ``MilepostError`` comes out of it. It is then saved;
``python tests/attacks/fuzz.py --replay FILE`` shows what it does. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import encodings
import faulthandler
import hashlib
import importlib
import json
import mmap
import os
import pkgutil
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

sys.path.append(str(Path(__file__).parents[1] / "format"))  # its samples, which pytest finds by its configuration

from fuzz_mutations import MAX_NBYTES
from fuzz_targets import TARGETS, Target

from milepost.errors import MilepostError

INPUT_S = 5.0
"""Seconds of CPU that one input may take."""
SILENCE_S = 90.0
"""A process that does not get to its next input in this time hangs (in C code, where no timer reaches it)."""
MEMORY_NBYTES = 256 << 20
"""Address space that a target may take beside what its process has at the start."""
MAX_FAILURES = 5
"""A target with this number of failures is not tried further."""
MAX_CORPUS = 500
_HARMLESS = {
    *("builtins.id", "array.__new__", "socket.gethostname"),
    *("os.listdir", "os.scandir", "pathlib.Path.glob", "pathlib.Path.rglob"),
}
"""Audit events of what changes nothing: who we are, lookups of names."""
_PYTHON = tuple({os.path.realpath(path) + "/" for path in (sys.prefix, sys.base_prefix)})
_IDENTITY = ("/proc/", "/etc/machine-id")
_OWN_FAULT = 99
_SLOT = struct.Struct("<qq")  # number of the input that is being tried, its length; then its bytes


@dataclass
class Failure:
    """An input with a forbidden effect. ``file`` is where it was saved."""

    target: str
    number: int
    what: str
    data: str
    """Hexadecimal."""
    file: str = ""


@dataclass
class Outcome:
    """The outcome of a target's inputs."""

    target: str
    tried: int = 0
    accepted: int = 0
    refused: int = 0
    outcomes: int = 0
    """Different ones that were seen."""
    slowest_s: float = 0.0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


class Forbidden(BaseException):
    """An input made a reader do something other than read."""


class TooSlow(BaseException):
    """An input took more than ``INPUT_S``."""


# ---- the process that tries inputs ----


class Guard:
    """An audit hook that refuses everything but opening files in ``scratch`` while it is armed."""

    def __init__(self, scratch: Path, may: frozenset[str]):
        self.armed = False
        self.seen: list[str] = []
        self._scratch = str(scratch)
        self._may = may
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.armed and event not in self._may and not self._is_harmless(event, args):
            self.armed = False  # or the report would be refused as well
            self.seen.append(f"{event}{args!r:.200}")
            raise Forbidden(self.seen[-1])

    def _is_harmless(self, event: str, args: tuple[Any, ...]) -> bool:
        if event in _HARMLESS or (event == "import" and str(args[0]).startswith("encodings.")):
            return True  # all encodings are loaded: what is imported from now on does not exist
        path = os.fsdecode(args[0]) if args and isinstance(args[0], str | bytes | os.PathLike) else ""
        inside = path.startswith(self._scratch + "/")
        if event == "open":
            flags = args[2] if isinstance(args[2], int) else os.O_RDWR
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                return inside and "write" in self._may
            return inside or path.startswith(_PYTHON) or ("identity" in self._may and path.startswith(_IDENTITY))
        return inside and "write" in self._may and event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def _try_inputs(
    target: Target, seed: int, first: int, count: int, slot: mmap.mmap, scratch: Path, out: int
) -> NoReturn:
    """Try inputs ``first`` to ``first + count`` of a target, and write an Outcome to the file descriptor ``out``."""
    seeds = list(target.make_seeds(scratch) if target.make_seeds is not None else target.seeds)
    for data in seeds:
        _once(target, data, scratch)  # all imports happen here
    warnings.simplefilter("ignore")
    faulthandler.disable()  # a crash is reported by the parent, with the input
    for module in pkgutil.iter_modules(encodings.__path__, "encodings."):
        with contextlib.suppress(ImportError):  # some are for other systems
            importlib.import_module(module.name)
    importlib.import_module("torch.nested._internal.ops")  # torch does it when it first compares a nested tensor
    importlib.import_module("torch._subclasses.schema_check_mode")  # and this one when it first prints a tensor
    guard = Guard(scratch, target.may)
    _limit(guard)
    outcome = Outcome(target.name)
    corpus = [*seeds, *target.shapes]
    num_given = len(corpus)
    shapes: Counter[str] = Counter()
    started = time.monotonic()
    for number in range(first, first + count):
        data = corpus[number] if number < num_given else _make_input(target, seed, number, corpus)
        _SLOT.pack_into(slot, 0, number, len(data))
        slot[_SLOT.size : _SLOT.size + len(data)] = data
        shape, failure, cpu_s = _attempt(target, data, scratch, guard)
        outcome.tried += 1
        outcome.slowest_s = max(outcome.slowest_s, cpu_s)
        if failure is not None:
            outcome.failures.append(Failure(target.name, number, failure, data.hex()))
            if len(outcome.failures) >= MAX_FAILURES:
                break
            continue
        outcome.accepted += shape.startswith("value")
        outcome.refused += not shape.startswith("value")
        shapes[shape] += 1
        if shapes[shape] <= 2 and len(corpus) < MAX_CORPUS and len(data) <= 16 << 10:
            corpus.append(data)
    outcome.outcomes = len(shapes)
    outcome.seconds = time.monotonic() - started
    with os.fdopen(out, "w") as pipe:
        json.dump(asdict(outcome), pipe)
    os._exit(0)


def _make_input(target: Target, seed: int, number: int, corpus: Sequence[bytes]) -> bytes:
    rng = random.Random(f"{seed} {target.name} {number}")
    return target.mutate(rng, rng.choice(corpus), corpus)[:MAX_NBYTES]


def _once(target: Target, data: bytes, scratch: Path) -> object:
    if target.prepare is not None:
        target.prepare(data, scratch)
    return target.parse(data, scratch)


def _limit(guard: Guard) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + MEMORY_NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def too_slow(*_: object) -> None:
        if guard.armed:  # else the reader has ended this very moment
            raise TooSlow(f"more than {INPUT_S:g} s of CPU")

    signal.signal(signal.SIGPROF, too_slow)


def _attempt(target: Target, data: bytes, scratch: Path, guard: Guard) -> tuple[str, str | None, float]:
    """A short name for the outcome of an input; the fault in it, or None; and the seconds it took."""
    if target.prepare is not None:
        target.prepare(data, scratch)
    guard.seen.clear()
    failure = None
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, INPUT_S)
    guard.armed = True
    try:
        shape = f"value {target.parse(data, scratch)!r:.100}"
    except MilepostError as error:
        shape = f"{type(error).__name__} {_shape_of(error.message)}"
    except BaseException:  # noqa: BLE001 - the very thing that is looked for
        guard.armed = False
        shape, failure = "", traceback.format_exc(limit=-6)
    finally:
        guard.armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
    if guard.seen and failure is None:
        failure = f"it did something forbidden, and hid it: {guard.seen[0]}"
    return shape, failure, time.process_time() - started


def _shape_of(message: str) -> str:
    """A message without the parts that differ from input to input."""
    return re.sub(r"'[^']*'?|\"[^\"]*\"?|[0-9a-fx.,-]*\d[0-9a-fx.,-]*", "#", message[:400])[:120]


# ---- the process that looks after them ----


def fuzz(
    names: Sequence[str], *, inputs: int, seed: int, save_to: Path, num_jobs: int = 1, targets: Any = TARGETS
) -> Iterator[Outcome]:
    """Try about ``inputs`` inputs, shared out among the targets. Failing ones are saved in the folder ``save_to``."""
    shares = {name: targets[name].share for name in names}
    counts = {name: -(-inputs * share // sum(shares.values())) for name, share in shares.items()}
    waiting = list(names)
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                name = waiting.pop(0)
                running.append(_Job(targets[name], counts[name], seed))
            select.select([job.pipe for job in running], [], [], 1.0)
            for job in list(running):
                if job.is_done():
                    running.remove(job)
                    _save(job.outcome.failures, save_to)
                    yield job.outcome
    finally:
        for job in running:
            job.stop()


class _Job:
    """One target's inputs, in a process that is started again after one that kills it or that it hangs on."""

    def __init__(self, target: Target, count: int, seed: int):
        self.outcome = Outcome(target.name)
        self._target = target
        self._count = count
        self._seed = seed
        self._slot = mmap.mmap(-1, _SLOT.size + MAX_NBYTES)
        self._scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self._start(0)

    def _start(self, first: int) -> None:
        _SLOT.pack_into(self._slot, 0, first - 1, 0)
        self.pipe, out = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it never outlives its parent
            try:
                _try_inputs(self._target, self._seed, first, self._count - first, self._slot, self._scratch, out)
            except BaseException:  # noqa: BLE001 - the fuzzer itself is at fault: say so, and don't return into the parent
                traceback.print_exc()
                os._exit(_OWN_FAULT)
        os.close(out)
        self._number, self._since = first - 1, time.monotonic()

    def is_done(self) -> bool:
        """Return whether all inputs were tried; call it every second."""
        if select.select([self.pipe], [], [], 0)[0]:
            with os.fdopen(self.pipe) as pipe:
                text = pipe.read()
            _, status = os.waitpid(self._pid, 0)
            if text:
                self._add(Outcome(**json.loads(text)))
                return self._end()
            if status == _OWN_FAULT << 8:
                raise RuntimeError("the fuzzer itself failed: see above")
            return self._after_death(f"the process died: {os.waitstatus_to_exitcode(status)}")
        number, _ = _SLOT.unpack_from(self._slot)
        if number != self._number:
            self._number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SILENCE_S:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            os.close(self.pipe)
            return self._after_death(f"no end after {SILENCE_S:g} s")
        return False

    def _after_death(self, what: str) -> bool:
        number, nbytes = _SLOT.unpack_from(self._slot)
        data = self._slot[_SLOT.size : _SLOT.size + nbytes]
        self.outcome.tried = number + 1
        self.outcome.failures.append(Failure(self._target.name, number, what, data.hex()))
        if number < 0 or len(self.outcome.failures) >= MAX_FAILURES or number + 1 >= self._count:
            return self._end()
        self._start(number + 1)
        return False

    def _add(self, found: Outcome) -> None:
        mine = self.outcome
        mine.tried = max(mine.tried, 0) + found.tried
        mine.accepted += found.accepted
        mine.refused += found.refused
        mine.outcomes = max(mine.outcomes, found.outcomes)
        mine.slowest_s = max(mine.slowest_s, found.slowest_s)
        mine.seconds += found.seconds
        mine.failures += [Failure(**vars(f)) if isinstance(f, Failure) else Failure(**f) for f in found.failures]

    def _end(self) -> bool:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._slot.close()
        return True

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        shutil.rmtree(self._scratch, ignore_errors=True)


def _save(failures: Sequence[Failure], folder: Path) -> None:
    for failure in failures:
        data = bytes.fromhex(failure.data)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{failure.target.replace(' ', '_')}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
        (folder / name).write_bytes(data)
        failure.file = str(folder / name)


def replay(file: Path) -> int:
    """Try one saved input again, under the same limits, and print the outcome; 1 if it fails."""
    target = TARGETS[file.name.rpartition("-")[0].replace("_", " ")]
    data = file.read_bytes()
    once = replace(target, mutate=lambda *_: data)
    inputs = len(target.seeds) + len(target.shapes) + 10  # after those that are given
    (outcome,) = fuzz([target.name], inputs=inputs, seed=0, save_to=file.parent, targets={target.name: once})
    for failure in outcome.failures:
        print(failure.what)
    print(f"{target.name}, {len(data)} bytes: {'fails' if outcome.failures else 'is handled'}")
    return bool(outcome.failures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many inputs, over all targets")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; by default a new one, which is printed")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS), help="which readers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--save-to", type=Path, default=Path("build/fuzz"), help="folder for inputs that fail")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try one saved input again")
    args = parser.parse_args(argv)
    if args.replay is not None:
        return replay(args.replay)
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}; repeat with --seed {seed}", flush=True)
    started, total, failures = time.monotonic(), 0, 0
    print(f"{'target':16} {'inputs':>8} {'taken':>8} {'refused':>8} {'outcomes':>8} {'slowest':>8} {'failed':>6}")
    for found in fuzz(args.targets, inputs=args.inputs, seed=seed, save_to=args.save_to, num_jobs=args.jobs):
        total += found.tried
        failures += len(found.failures)
        print(
            f"{found.target:16} {found.tried:8,} {found.accepted:8,} {found.refused:8,} {found.outcomes:8,} "
            f"{found.slowest_s:7.2f}s {len(found.failures):6}",
            flush=True,
        )
        for failure in found.failures:
            print(f"  input {failure.number}, saved as {failure.file}:\n{failure.what}", flush=True)
    print(f"{total:,} inputs in {time.monotonic() - started:.0f} s with seed {seed}: {failures} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
