"""A process that copies one step to another place and prunes there. Never imports torch.

Its last argument is a request as JSON. Its output is lines of JSON: ``{"done": ..., "total": ...}`` at intervals,
``{"log": ..., "level": ...}``, and at the end ``{"nbytes": ..., "seconds": ...}`` or
``{"error": ..., "is_final": ..., "is_gone": ...}``. It finishes even if its parent process has died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, ConfigError, MilepostError, listed
from milepost.run.retention import Rules
from milepost.saving.copy_part import copy_part
from milepost.saving.copy_step import CopyReport, Spot, copy_step
from milepost.saving.job import Keep, prune
from milepost.storage import open_root
from milepost.storage.base import split
from milepost.verification.verify import verify_in

log = logging.getLogger("milepost")

PROGRESS_S = 0.5
_BOOT = "import sys; sys.path.insert(0, sys.argv[-2]); from milepost.saving.copy_process import main; sys.exit(main())"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRequest:
    """The source and destination of a copy, and the steps to keep there: roots and paths of storages."""

    src_root: str
    src_path: str
    dst_root: str
    dst_path: str
    keep: Keep | None
    """None: another node's process prunes there."""
    is_part: bool = False
    """True if it is one node's part of a step, combined with the others' there."""


def start(request: CopyRequest) -> subprocess.Popen[bytes]:
    """Start the process. Its messages come from ``stdout``; libraries' output goes to ``stderr``."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _BOOT, str(Path(__file__).parents[2]), json.dumps(asdict(request))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C must reach only the training process
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def messages(process: subprocess.Popen[bytes]) -> Iterator[Mapping[str, Any]]:
    """Yield the messages of the process as they arrive. What it has logged, and other lines, are logged here."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if isinstance(said, dict) and "log" in said:
            log.log(said["level"], "%s", said["log"])
        elif isinstance(said, dict):
            yield said
        elif text := line.decode(errors="replace").strip():
            log.warning("%s", text)


class _Log(logging.Handler):
    """Passes the log on to the parent."""

    def emit(self, record: logging.LogRecord) -> None:
        _say({"log": record.getMessage(), "level": record.levelno})


def main() -> int:
    """Run the request in the last argument of the command line."""
    given = json.loads(sys.argv[-1])
    keep = given.pop("keep")
    if keep is not None:
        rules = keep["rules"]  # JSON has made texts of the steps' numbers
        rules["protected"] = {int(step): reason for step, reason in rules["protected"].items()}
        keep = Keep(keep["folder"], Rules(**rules))
    request = CopyRequest(**given, keep=keep)
    logging.basicConfig(level=logging.INFO, handlers=[_Log()])
    try:
        report = _copy(request)
    except MilepostError as error:
        is_final = isinstance(error, CheckpointDamagedError | CheckpointNotFoundError | ConfigError)
        _say({"error": error.message, "is_final": is_final, "is_gone": isinstance(error, CheckpointNotFoundError)})
        return 1
    except Exception as error:  # noqa: BLE001 - the top of a process: every error is reported to the parent
        _say({"error": f"unexpected error (a bug in Milepost): {type(error).__name__}: {error}", "is_final": True})
        return 1
    _say({"nbytes": report.nbytes, "seconds": report.seconds})
    return 0


def _copy(request: CopyRequest) -> CopyReport:
    src = Spot(open_root(request.src_root), request.src_path)
    dst = Spot(open_root(request.dst_root), request.dst_path)
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_S:
            last = time.monotonic()
            _say({"done": done, "total": total})

    if request.is_part:
        report = copy_part(src, dst, progress)
    else:
        found = verify_in(src.storage, src.path)  # local, and still in the page cache
        if found.problems:
            raise CheckpointDamagedError(f"{src} is damaged: {'; '.join(listed(found.problems))}", path=src.path)
        report = copy_step(src, dst, progress)
    if request.keep is not None:
        prune(dst.storage, request.keep, where=f" in {split(str(dst))[0]}")
    return report


def _say(message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent has exited
        print(json.dumps(message), flush=True)
