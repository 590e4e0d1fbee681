"""``ObjectStorage`` on a real store, behind a network that fails, and in memory."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import re
import signal
import sys
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore.store
import pytest

from milepost.errors import ConfigError, StorageError
from milepost.storage import object_writer, open_root, open_storage
from milepost.storage.objectstore import ObjectStorage
from milepost.storage.retry import Retry
from milepost.testing.faulty_client import FaultyClient
from milepost.testing.proxy import Fault, FaultKind, Proxy
from milepost.testing.seaweed import ACCESS_KEY, BUCKET, SECRET_KEY, Seaweed
from milepost.testing.storage_suite import StorageSuite

pytestmark = pytest.mark.usefixtures("store_environment")

MIB = 1 << 20
QUICK = Retry(num_tries=4, deadline_s=30.0, first_wait_s=0.01, max_wait_s=0.05)


def fresh_url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


class TestInMemory(StorageSuite):
    @pytest.fixture
    def storage(self) -> ObjectStorage:
        return ObjectStorage("memory://root", store=obstore.store.MemoryStore())


class TestOnSeaweed(StorageSuite):
    @pytest.fixture
    def storage(self) -> ObjectStorage:
        return ObjectStorage(fresh_url())


class TestBehindABadNetwork(StorageSuite):
    """Every fifth request fails, in each way in turn: the same must hold, after a retry or two."""

    KINDS: tuple[FaultKind, ...] = ("refuse", "cut", "status", "drop_answer", "truncate", "twice")

    @pytest.fixture
    def storage(self, store: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
        kinds = itertools.cycle(self.KINDS)
        with Proxy(store.port, fault=lambda request: Fault(next(kinds)) if request.number % 5 == 3 else None) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            yield ObjectStorage(fresh_url(), retry=QUICK)


@pytest.fixture
def proxy(store: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A network before the store, controlled by the test."""
    with Proxy(store.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("kind", ["refuse", "cut", "status", "drop_answer", "twice"])
def test_a_file_is_created_once_whatever_happens_to_the_request(proxy: Proxy, kind: FaultKind) -> None:
    """A lost answer to a put that succeeded is no failure, and another process's file is never taken for ours."""
    storage = ObjectStorage(fresh_url(), retry=QUICK)
    storage.write("before", b"1")
    proxy.forget()
    proxy.fault = lambda request: Fault(kind) if request.number == 0 else None
    storage.write("mine", b"mine")
    assert storage.read("mine") == b"mine"
    proxy.forget()
    with pytest.raises(StorageError, match="exists") as caught:
        storage.write("mine", b"other")
    assert caught.value.errno == errno.EEXIST
    assert storage.read("mine") == b"mine"


def test_retries_are_bounded_spread_and_logged(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []
    retry = Retry(num_tries=5, first_wait_s=1.0, max_wait_s=3.0, sleep=waits.append)
    storage = ObjectStorage(fresh_url(), retry=retry)
    proxy.fault = lambda request: Fault("status", 503)
    with caplog.at_level(logging.WARNING, "milepost"), pytest.raises(StorageError) as caught:
        storage.read("x")
    assert str(caught.value) == f"the store answered 503 while reading {storage.root}/x"
    assert len(proxy.requests) == 5
    assert all(low / 2 <= wait <= low for wait, low in zip(waits, (1.0, 2.0, 3.0, 3.0), strict=True))
    assert [record.message.partition(" in ")[0] for record in caplog.records] == [
        f"reading {storage.root}/x failed (the store answered 503): try {number} of 5" for number in (2, 3, 4, 5)
    ]


def test_what_does_not_pass_is_not_repeated(proxy: Proxy) -> None:
    storage = ObjectStorage(fresh_url(), retry=QUICK)
    for status in (400, 403, 404, 501):
        proxy.forget()
        proxy.fault = lambda request, status=status: Fault("status", status)
        with pytest.raises(StorageError):
            storage.read("x")
        assert len(proxy.requests) == 1


def test_no_more_tries_begin_after_the_deadline(proxy: Proxy) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    retry = Retry(num_tries=100, deadline_s=10.0, first_wait_s=4.0, max_wait_s=4.0, clock=lambda: now[0], sleep=sleep)
    proxy.fault = lambda request: Fault("refuse")
    with pytest.raises(StorageError, match="the connection was lost"):
        ObjectStorage(fresh_url(), retry=retry).read("x")
    assert now[0] <= 10.0
    assert 3 <= len(proxy.requests) <= 6


def test_a_request_without_an_answer_is_made_again(proxy: Proxy) -> None:
    storage = ObjectStorage(fresh_url(), retry=QUICK, timeout_s=0.5)
    storage.write("x", b"1")
    proxy.forget()
    proxy.fault = lambda request: Fault("delay", seconds=2.0) if request.number == 0 else None
    assert storage.read("x") == b"1"
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("kind", ["refuse", "status", "drop_answer", "twice"])
@pytest.mark.parametrize("number", range(4))
def test_a_large_file_gets_there_whatever_happens_to_a_part(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, kind: FaultKind, number: int
) -> None:
    """Its requests: begin, two parts, end."""
    monkeypatch.setattr(object_writer, "MIN_PART_NBYTES", 5 * MIB)
    storage = ObjectStorage(fresh_url(), retry=QUICK)
    data = os.urandom(MIB) * 6
    with storage.open_write("big", len(data)) as handle:
        proxy.forget()
        proxy.fault = lambda request: Fault(kind) if request.number == number else None
        handle.write(0, [data], stable=True)
        handle.sync()
    proxy.fault = lambda request: None
    assert storage.read("big") == data
    assert proxy.num_faults == 1


def test_a_large_file_that_can_not_be_written_fails_and_leaves_nothing(proxy: Proxy) -> None:
    storage = ObjectStorage(fresh_url(), retry=QUICK)
    proxy.fault = lambda request: Fault("status", 503) if "partNumber" in request.query else None

    def write() -> None:
        with storage.open_write("big", 40 * MIB) as handle:
            for start in range(0, 40 * MIB, 4 * MIB):
                handle.write(start, [bytes(4 * MIB)])
            handle.sync()

    with pytest.raises(StorageError, match="the store answered 503 while writing"):
        write()
    proxy.fault = lambda request: None
    assert storage.list("") == []
    assert storage.abort_uploads("") == 0


def test_uploads_of_the_dead_are_aborted_and_those_of_the_living_kept() -> None:
    storage = ObjectStorage(fresh_url())
    handles = [storage.open_write(f"step-1/{who}/big", 40 * MIB) for who in ("dead", "alive")]
    for handle in handles:
        handle.write(0, [bytes(17 * MIB)])
    deadline = time.monotonic() + 30
    aborted = 0
    while not aborted and time.monotonic() < deadline:  # the uploads begin in the background
        aborted = storage.abort_uploads("step-1", lambda name: name.startswith("dead/"))
    assert aborted == 1
    handles[1].sync()
    assert storage.list_files("").keys() == {"step-1/alive/big"}
    with pytest.raises(StorageError):
        handles[0].sync()
    for handle in handles:
        handle.close()


def test_memory_stays_bounded_whatever_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data that arrives out of order waits in a temporary file, which is removed at the end."""
    monkeypatch.setattr(object_writer, "MAX_HELD_NBYTES", MIB)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = ObjectStorage("memory://root", store=obstore.store.MemoryStore())
    data = os.urandom(MIB) * 24
    with storage.open_write("big", len(data)) as handle:
        tracemalloc.start()
        for start in range(len(data) - MIB, -1, -MIB):
            handle.write(start, [data[start : start + MIB]])
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        handle.sync()
    assert held < 6 * MIB
    assert storage.read("big") == data
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_is_replaced_while_it_is_read_is_noticed() -> None:
    storage = ObjectStorage(fresh_url())
    storage.write("x", b"0123456789")
    with storage.open_read("x") as handle:
        storage.replace("x", b"abcdefghij")
        with pytest.raises(StorageError, match="changed by another process"):
            handle.read_into(0, [memoryview(bytearray(4))])


def test_small_things_cost_one_request_each(proxy: Proxy) -> None:
    storage = ObjectStorage(fresh_url())
    storage.write("run/first", b"1")
    for act, expected in (
        (lambda: storage.write("run/x", b"1"), {"PUT": 1}),
        (lambda: storage.read("run/x"), {"GET": 1}),
        (lambda: storage.stat("run/x"), {"HEAD": 1}),
        (lambda: storage.list("run"), {"GET": 1}),
        (lambda: storage.list_files("run"), {"GET": 1}),
        (lambda: storage.replace("run/x", b"2"), {"PUT": 1}),
        (lambda: storage.make_folder("run"), {}),
        (lambda: storage.sync_folder("run"), {}),
        (lambda: storage.remove("run/x"), {"POST": 1}),
    ):
        proxy.forget()
        act()
        assert proxy.count() == expected


def test_neighbouring_ranges_are_read_in_one_request(proxy: Proxy) -> None:
    storage = ObjectStorage(fresh_url())
    storage.write("x", bytes(MIB))
    ranges = [(start, start + 3000) for start in range(0, MIB - 4000, 4000)]
    with storage.open_read("x") as handle:
        proxy.forget()
        handle.will_read(ranges)
        for start, stop in ranges:
            handle.read_into(start, [memoryview(bytearray(stop - start))])
    assert proxy.count() == {"GET": 1}


class Careless:
    """A store from before conditional puts: it ignores the condition."""

    def __init__(self) -> None:
        self._inner = obstore.store.MemoryStore()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, key: str, data: bytes, *, mode: object, use_multipart: bool) -> object:
        return self._inner.put(key, data, use_multipart=use_multipart)


def test_a_store_that_overlooks_conditions_is_refused() -> None:
    storage = ObjectStorage("memory://old", store=Careless())
    with pytest.raises(ConfigError, match="overlooks the condition"):
        storage.write("x", b"mine")
    assert storage.read("x") == b"mine"


def test_a_store_that_refuses_conditions_is_refused(proxy: Proxy) -> None:
    proxy.fault = lambda request: Fault("status", 501)
    with pytest.raises(ConfigError, match="refuses the condition"):
        ObjectStorage(fresh_url()).write("x", b"mine")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("AWS_SECRET_ACCESS_KEY", "the-wrong-secret", "access denied (SignatureDoesNotMatch) while"),
        ("AWS_ACCESS_KEY_ID", "WRONGKEY", "access denied (InvalidAccessKeyId) while"),
        ("AWS_ENDPOINT_URL", "http://user:hush@127.0.0.1:9", "the store can't be reached (connection refused) while"),
    ],
)
def test_no_secret_is_printed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    storage = ObjectStorage(fresh_url(), retry=QUICK)
    with caplog.at_level(logging.DEBUG), pytest.raises(StorageError) as caught:
        storage.write("x", b"1")
    assert expected in str(caught.value)
    everything = str(caught.value) + caplog.text + repr(storage) + str(vars(caught.value))
    for secret in (ACCESS_KEY, SECRET_KEY, "the-wrong-secret", "WRONGKEY", "hush"):
        assert secret not in everything


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///x",
        "s3://key:hush@bucket/x",
        "s3://bucket/x?token=hush",
        "s3://bucket:9000/x",
        "s3://bucket/x#hush",
        "s3://bucket/x\nhush",
    ],
)
def test_a_url_is_a_bucket_and_a_path(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://<bucket>/<path>") as caught:
        open_storage(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/a/../b", "s3://bucket/./a", "s3://bucket/a//b", "gs://bucket/.."])
def test_a_path_in_a_store_names_one_place(url: str) -> None:
    with pytest.raises(ConfigError, match=r"no empty parts, '\.' and '\.\.'"):
        open_storage(url)


def test_a_path_may_hold_what_a_key_may(store_environment: None) -> None:
    storage, name = open_storage(f"{fresh_url()}/a b+c=é%20,(x)~&;$!/run")
    storage.write(f"{name}/file", b"data")
    assert storage.read(f"{name}/file") == b"data"
    assert [entry.name for entry in storage.list(name)] == ["file"]


@pytest.mark.parametrize(
    ("url", "root", "name"),
    [
        ("s3://bucket/run/step-5/", "s3://bucket/run", "step-5"),
        ("S3://bucket/run", "s3://bucket", "run"),
        ("gs://bucket", "gs://bucket", ""),
        ("az://container/a/b/c", "az://container/a/b", "c"),
    ],
)
def test_open_storage_roots_at_the_parent(url: str, root: str, name: str) -> None:
    storage, found = open_storage(url)
    assert (storage.root, found) == (root, name)
    assert open_root(storage.root).root == root


def test_without_obstore_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'milepost[cloud]'")):
        open_storage("gs://bucket/run")


def test_a_profile_brings_keys_region_and_endpoint(
    store: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in store.environment():
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-north-1\nendpoint_url = {store.endpoint}\n")
    (tmp_path / "keys").write_text(f"[lab]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage = ObjectStorage(fresh_url(), retry=QUICK)
    storage.write("x", b"1")
    assert storage.read("x") == b"1"
    assert storage.abort_uploads("") == 0
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="'nobody' can't be used"):
        ObjectStorage(fresh_url()).read("x")


def test_keys_in_the_environment_come_before_those_of_a_profile_which_still_has_the_endpoint(
    store: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[default]\nregion = eu-north-1\nendpoint_url = {store.endpoint}\n")
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = stale\naws_secret_access_key = stale\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    storage = ObjectStorage(fresh_url(), retry=QUICK)
    storage.write("x", b"1")
    assert storage.read("x") == b"1"


def test_a_login_that_has_expired_is_no_denied_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    profile = "[profile sso]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n"
    session = "[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://example.invalid/start\n"
    (tmp_path / "config").write_text(profile + session)
    monkeypatch.setenv("HOME", str(tmp_path))  # where logins are cached
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "sso")
    with pytest.raises(StorageError, match=r"the AWS profile gave no credentials \(SSOTokenLoadError\).*aws sso login"):
        ObjectStorage(fresh_url(), retry=QUICK).list("")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "", "set AWS_SECRET_ACCESS_KEY too"),
        ("AWS_ENDPOINT_URL", "http://no-such-host.invalid:9000", "the endpoint's host can't be resolved"),
        ("AWS_ENDPOINT_URL", "https://127.0.0.1:{port}", "the endpoint does not speak https"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:{port}/ckpt", "404 NoSuchKey .*check the endpoint"),
    ],
)
def test_what_is_wrong_with_the_environment_is_said(
    store: Seaweed, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value.format(port=store.port))
    with pytest.raises((ConfigError, StorageError), match=said):
        ObjectStorage(fresh_url(), retry=QUICK).stat("x")


def test_an_empty_object_may_mark_a_folder() -> None:
    storage = ObjectStorage("memory://root", store=obstore.store.MemoryStore())
    for name in ("run", "run/step-1/a", "alone"):
        storage.write(name, b"")
    assert {name: getattr(storage.stat(name), "is_folder", None) for name in ("run", "run/step-1", "alone")} == {
        "run": True,
        "run/step-1": True,
        "alone": False,
    }


def test_settings_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        open_storage("az://container/run")[0].list("")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="GOOGLE_APPLICATION_CREDENTIALS"):
        open_storage("gs://bucket/run")[0].list("")


def test_a_bucket_that_is_not_there_is_no_empty_folder() -> None:
    with pytest.raises(StorageError, match="create the bucket"):
        open_storage("s3://no-such-bucket/run")[0].list("run")


def test_a_fork_of_a_process_that_used_a_store_says_so_and_does_not_hang() -> None:
    storage = ObjectStorage(fresh_url())
    storage.write("x", b"1")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            storage.read("x")
        except StorageError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as expected:
        assert b"forked" in expected.read()
    assert os.waitpid(pid, 0)[1] == 0


def test_a_request_that_is_made_again_leaves_the_random_generators_of_the_training_alone() -> None:
    before = random.getstate()
    storage = ObjectStorage(
        "memory://bucket",
        store=FaultyClient(obstore.store.MemoryStore(), fail_at=0, fault="busy"),
        retry=Retry(first_wait_s=0.001),
    )
    storage.write("x", b"1")
    assert random.getstate() == before
