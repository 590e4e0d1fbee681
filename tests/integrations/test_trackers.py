"""Committed steps appear in Weights & Biases and MLflow, both offline, as references."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost import CheckpointConfig, CheckpointManager
from milepost.integrations.trackers import OnCommit, to_mlflow, to_wandb

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def train(folder: Path, on_commit: OnCommit) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = CheckpointConfig(enable=True, interval=1)
    with CheckpointManager(folder, config, model=model, optimizer=optimizer, on_commit=on_commit) as manager:
        for step in (1, 2):
            manager.save(step, metrics={"loss": 1.0 / step})


def expected(folder: Path, step: int) -> dict[str, Any]:
    path = folder / f"step-{step}"
    digest = f"sha256:{hashlib.sha256((path / 'milepost.json').read_bytes()).hexdigest()}"
    return {"step": step, "path": str(path), "digest": digest, "contents": "full", "metrics": {"loss": 1.0 / step}}


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[Any] = []
    with wandb.init(project="test", mode="offline", dir=tmp_path) as run:
        log_artifact = run.log_artifact

        def spy(artifact: Any, **options: Any) -> Any:
            logged.append((artifact.metadata, [entry.ref for entry in artifact.manifest.entries.values()], options))
            return log_artifact(artifact, **options)

        monkeypatch.setattr(run, "log_artifact", spy)
        train(tmp_path / "run", to_wandb(run))
    for step, (metadata, references, options) in enumerate(logged, start=1):
        assert metadata == expected(tmp_path / "run", step)
        assert f"file://{tmp_path}/run/step-{step}/milepost.json" in references
        assert options["aliases"] == ["latest", f"step-{step}"]
    assert len(logged) == 2
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert stored.stat().st_size > 0
    assert not list(tmp_path.glob("wandb/offline-run-*/**/*.distcp")), "nothing is copied"


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    client = mlflow.MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("test")).info.run_id
    train(tmp_path / "run", to_mlflow(run_id, uri))
    tags = client.get_run(run_id).data.tags
    assert (tags["milepost.step"], tags["milepost.path"]) == ("2", str(tmp_path / "run/step-2"))
    for step in (1, 2):
        (kept,) = (tmp_path / "mlruns").glob(f"**/checkpoints/step-{step}.json")
        assert json.loads(kept.read_text()) == expected(tmp_path / "run", step)
