"""Every command on URLs: on a real store, and on file://. What is written there is read back by another command."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import zoo

from milepost.cli.main import main
from milepost.run import marks
from milepost.storage import open_storage
from milepost.storage.base import join
from milepost.storage.retry import Retry
from milepost.testing.sample import save_arrays
from milepost.testing.seaweed import ACCESS_KEY, BUCKET, SECRET_KEY, Seaweed

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODEL = ("--model", "llama3", "--flavor", "debugmodel")


@pytest.fixture(scope="module", params=["s3", "file"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A URL below which is a run of three steps, the last of which is a model."""
    with pytest.MonkeyPatch.context() as patch:
        url = f"file://{tmp_path_factory.mktemp('with space').as_posix().replace(' ', '%20')}"
        if request.param == "s3":
            server: Seaweed = request.getfixturevalue("store")
            for name, value in server.environment().items():
                patch.setenv(name, value)
            url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        storage, folder = open_storage(url)
        for step in (1, 2):
            zoo.save(storage, join(folder, f"run/step-{step}"), step, zoo.NOW)
        zoo.save_model(storage, join(folder, "run/step-7"))
        yield url


def run(*argv: str, status: int = 0) -> None:
    assert main(list(argv)) == status, argv


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("ls URL/run", 0),
        ("ls URL/run/step-2 --json", 0),
        ("ls URL/nothing", 3),
        ("ls URL", 3),
        ("inspect URL/run/step-2 --shards", 0),
        ("inspect URL/run", 3),
        ("show URL/run/step-2 norm.weight", 0),
        ("stats URL/run/step-2", 0),
        ("verify URL/run", 0),
        ("verify URL/run/step-7 --level sample", 0),
        ("diff URL/run/step-1 URL/run/step-2 --values", 9),
        ("plan-resume URL/run/step-2 --world-size 2", 0),
        ("report URL/run -o OUT/report.html", 0),
        ("pin URL/run/step-1", 0),
        ("prune URL/run --keep-latest 1 --dry-run", 0),
        ("unpin URL/run/step-1", 0),
    ],
)
def test_commands_that_look(base: str, tmp_path: Path, command: str, status: int) -> None:
    run(*command.replace("URL", base).replace("OUT", str(tmp_path)).split(), status=status)


def test_conversions_there_and_back(base: str, tmp_path: Path) -> None:
    step = f"{base}/run/step-7"
    run("convert", step, f"{base}/hf", "--to", "hf", *MODEL)
    run("convert", f"{base}/hf", f"{base}/dcp/step-0", "--to", "dcp", *MODEL, "--verify")
    run("convert", step, f"{base}/model.pt", "--to", "pt", *MODEL)
    run("convert", f"{base}/model.pt", str(tmp_path / "here/step-0"), "--to", "dcp", *MODEL)
    run("export", f"{base}/run", str(tmp_path / "exported"), "--hf-assets", f"{base}/hf", *MODEL)
    run("verify", f"{base}/dcp/step-0")
    run("verify", f"{base}/model.pt", status=11)
    run("verify", f"{base}/hf", status=11)
    run("inspect", f"{base}/hf/model.safetensors")
    for other in (f"{base}/dcp/step-0", str(tmp_path / "here/step-0")):
        run("diff", step, other, "--keys", "layers.*")
    run("diff", f"{base}/hf", str(tmp_path / "exported"))
    root = f"s3://{BUCKET}" if base.startswith("s3://") else "file:///"
    run("convert", step, root, "--to", "pt", *MODEL, status=8)
    run("stats", f"{base}/model.pt")


def test_a_step_is_pruned(base: str) -> None:
    storage, folder = open_storage(f"{base}/pruned")
    for step in (1, 2):
        save_arrays(storage, f"{folder}/step-{step}", {"a": zoo.ARRAYS["norm.weight"]}, step=step)
    run("prune", f"{base}/pruned", "--keep-latest", "1")
    run("verify", f"{base}/pruned/step-1", status=3)
    run("verify", f"{base}/pruned/step-2")


def test_a_conversion_script(base: str) -> None:
    command = [sys.executable, str(SCRIPTS / "checkpoint_conversion/convert_to_hf.py")]
    names = ["--model_name", "llama3", "--model_flavor", "debugmodel"]
    subprocess.run([*command, f"{base}/run/step-7", f"{base}/by-script", *names], check=True, timeout=100)
    run("verify", f"{base}/by-script", status=11)


@pytest.mark.usefixtures("store_environment")
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"AWS_SECRET_ACCESS_KEY": "a-wrong-and-secret-key"},
        {"AWS_SESSION_TOKEN": "a-secret-token"},
        {"AWS_ENDPOINT_URL": "http://someone:a-secret-password@127.0.0.1:1"},
        {"AWS_ENDPOINT_URL": "not a URL a-secret"},
    ],
)
def test_no_credential_is_shown(
    change: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("milepost.storage.store_requests.Retry", partial(Retry, num_tries=2, first_wait_s=0.0))
    for url in (f"s3://{BUCKET}/nothing", "s3://no-such-bucket/run", "s3://user:a-secret@bucket/run"):
        for command in (["ls", url], ["verify", f"{url}/step-1"], ["convert", url, f"{url}-2", "--to", "hf"]):
            assert main(command) != 0
    said = "".join(capsys.readouterr()) + caplog.text
    for secret in (ACCESS_KEY, SECRET_KEY, "secret"):
        assert secret not in said


def test_steps_are_copied_to_another_place_and_back(base: str, tmp_path: Path) -> None:
    run("sync", f"{base}/run", f"{base}/copies")
    run("sync", f"{base}/run/step-7", f"{base}/copies")
    run("sync", f"{base}/copies", str(tmp_path / "copies"), "--json")
    run("verify", str(tmp_path / "copies"))
    run("diff", f"{base}/run/step-2", str(tmp_path / "copies/step-2"), "--values")
    run("sync", f"{base}/run/step-7", f"{base}/copies/step-8", status=2)
    run("sync", f"{base}/nothing", f"{base}/copies", status=3)


def test_both_folders_of_a_run_are_listed(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage, _ = open_storage(tmp_path / "run")
    save_arrays(storage, "run/step-3", {"a": zoo.ARRAYS["norm.weight"]}, step=3)
    save_arrays(storage, "run/step-4", {"a": zoo.ARRAYS["norm.weight"]}, step=4)
    run("ls", str(tmp_path / "run"), "--remote", status=2)
    run("sync", str(tmp_path / "run/step-3"), f"{base}/behind")
    run("sync", f"{base}/run/step-1", f"{base}/behind")
    marks.note_remote(storage, "run", f"{base}/behind")
    capsys.readouterr()
    run("ls", str(tmp_path / "run"), "--remote")
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows == [["STEP", "WHERE"], ["1", "remote"], ["3", "both"], ["4", "folder"]]
    run("ls", str(tmp_path / "run"))
    assert f"steps are copied to {base}/behind: --remote lists those too" in capsys.readouterr().out
