"""``make demo-s3``: train the debug model onto an S3 store on this machine, kill it, resume, verify what is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from milepost.testing.seaweed import BUCKET, seaweed

ROOT = Path(__file__).parents[1]
MILEPOST = (sys.executable, "-m", "milepost")
KILL_AFTER = "saved step 20"


def main() -> int:
    """Do it, and print each command. Returns the exit status of the last."""
    with seaweed() as store, tempfile.TemporaryDirectory(prefix="milepost-demo-") as scratch:
        environment = {
            **os.environ,
            **store.environment(),
            "PYTHON": sys.executable,
            "NGPU": os.environ.get("NGPU", "2"),
        }
        url = f"s3://{BUCKET}/demo"
        print(f"a store at {store.endpoint}; checkpoints go to {url}", flush=True)
        train = [
            str(ROOT / "run_train.sh"),
            *(f"--checkpoint.folder={url}", f"--job.dump_folder={scratch}"),
            *("--training.seq_len=64", "--checkpoint.interval=10"),
        ]
        _train_until(KILL_AFTER, train, environment)
        for command in (train, [*MILEPOST, "ls", url], [*MILEPOST, "verify", url]):
            print(f"$ {' '.join(command)}", flush=True)
            status = subprocess.run(command, env=environment, check=False).returncode
            if status:
                return status
    return 0


def _train_until(sign: str, command: list[str], environment: dict[str, str]) -> None:
    """Train, and kill everything as soon as the log has ``sign`` in it."""
    print(f"$ {' '.join(command)}", flush=True)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if sign in line:
                os.killpg(process.pid, signal.SIGKILL)
                print("*** killed everything with SIGKILL", flush=True)
                break
    time.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main())
