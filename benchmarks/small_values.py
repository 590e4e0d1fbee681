"""Many small values: time, size and memory of a save beside ``torch.save``, and how long training waits for it.

``python benchmarks/small_values.py [case ...]``: each case and way in a process of its own, the better of two.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES: dict[str, Callable[[], Any]] = {
    "10 M ints": lambda: list(range(10_000_000)),
    "dict of 100k small tensors": lambda: _tensors(100_000),
    "100k small dicts": lambda: [{"id": n, "loss": n / 7, "name": f"sample {n}"} for n in range(100_000)],
}
WAYS = ("torch.save", "disabled", "async", "async_with_pinned_mem")


def _tensors(count: int) -> Any:
    import torch

    return {f"key {n}": torch.full((4,), float(n)) for n in range(count)}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(case: str, way: str) -> dict[str, float]:
    """Seconds until it is committed and until training goes on, MB written, MB of memory more at the peak."""
    import torch

    import milepost
    from milepost.training.manager import CheckpointManager

    class State:
        def state_dict(self) -> dict[str, Any]:
            return {"values": value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

    value = CASES[case]()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        best = {"seconds": 1e9, "waited": 1e9, "CPU s": 1e9}
        config = None
        if way != "torch.save":
            config = milepost.CheckpointConfig(interval=1, last_save_model_only=False, async_mode=way)  # type: ignore[arg-type]
        manager = (
            CheckpointManager(folder, config, model=torch.nn.Linear(1, 1), train_state=State()) if config else None
        )
        torch.save(torch.ones(1), Path(folder) / "first.pt")
        before = _peak_mb()
        for step in range(1, 3):
            began, cpu = time.perf_counter(), time.process_time()
            if manager is None:
                with open(Path(folder) / "values.pt", "wb") as file:
                    torch.save({"train_state": {"values": value}}, file)
                    file.flush()
                    os.fsync(file.fileno())
                waited = time.perf_counter() - began
            else:
                manager.save(step)
                manager.maybe_wait_for_staging()
                waited = time.perf_counter() - began
                manager.maybe_wait_for_saving()
            best["seconds"] = min(best["seconds"], time.perf_counter() - began)
            best["waited"] = min(best["waited"], waited)
            best["CPU s"] = min(best["CPU s"], time.process_time() - cpu)
        more = _peak_mb() - before
        if manager is not None:
            manager.close()
        files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "first.pt"]
        per_save = sum(path.stat().st_size for path in files) / (2 if manager is not None else 1) / 1e6
        return best | {"MB": per_save, "peak MB": more}


def main() -> None:
    """Print a table."""
    for case in sys.argv[1:] or CASES:
        for way in WAYS:
            command = [sys.executable, __file__, "--one", case, way]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            figures = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"{case:28} {way:24} {figures}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
