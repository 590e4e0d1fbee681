"""Stands in for torchrun and the trainer in tests of ``resume-test``: real processes, real checkpoints, no torch.

The work is done by a child in a session of its own, as torchrun's ranks are. With ``FORGETFUL=1`` a resume begins with
a weight that is not the saved one. With ``AHEAD`` each run that is to be killed has made its last step before anybody
reads of its first; with ``AHEAD=once`` the first such run alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from milepost.format.box import Box
from milepost.interop.weights.open import open_weights
from milepost.run import catalog
from milepost.run.branches import History
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def runs_ahead(folder: str) -> bool:
    marker = Path(folder).parent / "was-ahead"
    if not os.environ.get("AHEAD") or Path(folder).name != "killed" or marker.exists():
        return False
    if os.environ["AHEAD"] == "once":
        marker.touch()
    return True


def main() -> None:
    storage = LocalStorage(option("--job.dump_folder"))
    num_steps, interval = int(option("--training.steps")), int(option("--checkpoint.interval"))
    storage.make_folder("checkpoint")
    start = History.of(catalog.scan(storage, "checkpoint")).newest_resumable
    weight = np.ones(4, "float32")
    done = 0
    is_ahead = runs_ahead(option("--job.dump_folder"))
    said: list[str] = []
    say = said.append if is_ahead else partial(print, flush=True)
    if start is not None:
        done = start.step
        with open_weights(f"{storage.root}/{start.path}").source as source:
            source.read_into("w", Box.whole((4,)), weight)
        if os.environ.get("FORGETFUL"):
            weight[2] += 1e-3
    for step in range(done + 1, num_steps + 1):
        time.sleep(0.02)
        weight *= 0.75
        say(f"12:00:00 step {step}/{num_steps}  loss {weight.sum():.6f}  grad_norm 1.0")
        if step % interval == 0 or step == num_steps:
            save_arrays(
                storage, f"checkpoint/step-{step}", {"w": weight}, objects={"train_state.step": step}, step=step
            )
            say(f"12:00:00 saved step {step} (why not)")
    if is_ahead:
        print("\n".join(said), flush=True)
        time.sleep(60)  # until it is killed


if __name__ == "__main__":
    if os.environ.get("FAKE_RANK"):
        main()
    else:
        child = subprocess.Popen(
            [sys.executable, *sys.argv], env={**os.environ, "FAKE_RANK": "1"}, start_new_session=True
        )
        sys.exit(child.wait())
