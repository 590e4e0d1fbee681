"""Two ranks whose checkpoints, assets and initial weights are on a real store: the trainer, and the functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import transformers

from milepost.run import catalog
from milepost.storage import open_storage
from milepost.testing.seaweed import ACCESS_KEY, BUCKET, SECRET_KEY
from milepost.verification.verify import verify

pytestmark = pytest.mark.usefixtures("store_environment")
WORLD = Path(__file__).with_name("store_world.py")


def test_everything_that_two_ranks_do(tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    storage, folder = open_storage(url)
    storage.write(f"{folder}/assets/tokenizer_config.json", b'{"added": "by a test"}')
    done = subprocess.run(
        [sys.executable, str(WORLD), url, str(tmp_path / "scratch")],
        env=os.environ | {"ASSETS": f"{url}/assets"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first == second
    assert first["functions"] == dict.fromkeys(("save", "async_save", "writer", "reader"), True)
    assert {name: len(losses) for name, losses in first["training"].items()} == {
        "begun": 1,
        "resumed": 2,
        "from_hf": 1,
    }
    assert first["training"]["from_hf"][0] < first["training"]["begun"][0]
    entries = catalog.scan(storage, f"{folder}/run")
    assert [(entry.step, entry.state, entry.kind) for entry in entries] == [
        *((step, "committed", "full") for step in (1, 2)),
        (3, "committed", "model"),
    ]
    assert all(verify(f"{url}/run/step-{step}").is_sound for step in (1, 2, 3))

    # Copied down as any tool would, the last step opens with transformers.
    last = tmp_path / "last"
    last.mkdir()
    for name in storage.list_files(f"{folder}/run/step-3"):
        (last / name).write_bytes(storage.read(f"{folder}/run/step-3/{name}"))
    assert (last / "tokenizer_config.json").read_bytes() == b'{"added": "by a test"}'
    _, loading = transformers.LlamaForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]

    held = [storage.read(f"{folder}/{name}") for name in storage.list_files(folder)]
    held += [path.read_bytes() for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in done.stdout + done.stderr
        assert not any(secret.encode() in data for data in held)
