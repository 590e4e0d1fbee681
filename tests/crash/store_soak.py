"""A soak on an object store: ranks, launcher, store and network are killed, and the run equals an undisturbed one.

    python tests/crash/store_soak.py --faults 20 --seed 7 [--tier]

As ``soak``, but the checkpoints are on SeaweedFS behind a proxy. What happens follows from the seed: a rank or the
launcher is killed, the store is killed and started again, the proxy cuts every connection for a while. With ``--tier``
the run saves to a local folder, behind which the store is its ``remote_folder``; then also that folder is wiped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from soak import Run, SoakError, check_same_state, losses, train_undisturbed

from milepost.report.diff import diff
from milepost.run import catalog
from milepost.run.step_names import step_name
from milepost.storage import open_storage
from milepost.testing.proxy import Fault, Proxy
from milepost.testing.seaweed import BUCKET, Seaweed, seaweed
from milepost.verification.verify import verify

VICTIMS = ("rank 0", "rank 1", "launcher", "store", "network")
STEPS_A_FAULT = 3
STEPS_WITHOUT_STORE = 15
CUT_S = 3.0


@contextlib.contextmanager
def store_behind_proxy() -> Iterator[tuple[Seaweed, Proxy]]:
    """A store, and the proxy that this process and its children know it by."""
    with seaweed() as server, Proxy(server.port) as proxy:
        before = dict(os.environ)
        os.environ.update(server.environment(proxy.endpoint))
        try:
            yield server, proxy
        finally:
            os.environ.clear()
            os.environ.update(before)


def soak_on_store(
    folder: Path, victims: list[str], seed: int, *, tier: bool, show: Callable[[str], None] = lambda text: None
) -> None:
    """Train below ``folder`` with the checkpoints on a store, while ``victims`` are killed one after the other.

    Raises:
        SoakError: the run did not come through as it should have.
    """
    rng = random.Random(seed)
    num_steps = STEPS_A_FAULT * len(victims) + 6
    if tier:  # training goes on while the store is away
        num_steps += STEPS_WITHOUT_STORE * sum(victim in ("store", "network") for victim in victims)
    train_undisturbed(folder / "undisturbed", num_steps)  # before the store is used: its ranks are forks
    with store_behind_proxy() as (server, proxy):
        url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        where = f"--checkpoint.remote_folder={url}" if tier else f"--checkpoint.folder={url}"
        run = Run(folder / "disturbed", num_steps, (where, "--metrics.log_freq=1"))
        run.folder.mkdir()
        modes = ("async_with_pinned_mem", "disabled", "async")
        try:
            for number, victim in enumerate(victims):
                if run.launcher is None or run.launcher.poll() is not None:
                    run.start(modes[number % len(modes)])
                steps = rng.randint(1, STEPS_A_FAULT)
                run.wait_for(f"{steps} steps", lambda steps=steps: len(run.steps_seen()) >= steps)
                time.sleep(rng.uniform(0.0, 0.4))
                _strike(run, victim, server, proxy)
                show(f"{victim} fell; {run.acknowledged} was saved")
            if run.launcher is None or run.launcher.poll() is not None:
                run.start("async")
            run.finish()
            _check_end(run, folder / "undisturbed", url)
        finally:
            run.end()


def _strike(run: Run, victim: str, server: Seaweed, proxy: Proxy) -> None:
    if victim == "store":
        server.stop(kill=True)
        time.sleep(0.5)
        server.start()
        run.num_read = len(run.log())
    elif victim == "network":
        proxy.fault = lambda request: Fault("cut" if request.number % 2 else "refuse")
        time.sleep(CUT_S)
        proxy.fault = lambda request: None
        run.num_read = len(run.log())
    elif victim == "disk":
        run.kill("everything")
        shutil.rmtree(run.checkpoints)
    else:
        run.kill(victim)


def _check_end(run: Run, undisturbed: Path, url: str) -> None:
    expected, found = dict(losses(undisturbed)), list(losses(run.folder))
    if missing := set(range(1, run.num_steps + 1)) - {step for step, _ in found}:
        raise SoakError(f"no loss was logged for steps {sorted(missing)}")
    if wrong := [(step, loss, expected[step]) for step, loss in found if loss != expected[step]]:
        raise SoakError(f"losses differ from the undisturbed run's (step, loss, expected): {wrong}")
    last = step_name(run.num_steps)
    check_same_state(diff(undisturbed / "checkpoint" / last, f"{url}/{last}"))
    storage, name = open_storage(url)
    if wrong_steps := [entry for entry in catalog.scan(storage, name) if entry.state != "committed"]:
        raise SoakError(f"steps that are not whole: {wrong_steps}")
    if not verify(f"{url}/{last}").is_sound:
        raise SoakError(f"{url}/{last} is not OK")


def victims_of(seed: int, num_faults: int, *, tier: bool) -> list[str]:
    """Return the victims of the faults, in order: each of them once before any is repeated."""
    rng = random.Random(seed)
    kinds = [*VICTIMS, *(["disk"] if tier else [])]
    found: list[str] = []
    while len(found) < num_faults:
        found += rng.sample(kinds, len(kinds))
    return found[:num_faults]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--tier", action="store_true")
    args = parser.parse_args()
    victims = victims_of(args.seed, args.faults, tier=args.tier)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="milepost-store-soak-"))
    print(f"seed {args.seed}: {', '.join(victims)}", flush=True)
    soak_on_store(folder, victims, args.seed, tier=args.tier, show=lambda text: print(text, flush=True))
    shutil.rmtree(folder)
    print(f"{len(victims)} faults in {time.monotonic() - started:.0f} s: the same losses, the same last step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
