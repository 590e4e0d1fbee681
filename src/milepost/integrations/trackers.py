"""Saves in Weights & Biases and MLflow: a reference to each committed step, with its digest. Nothing is uploaded.

Each function returns a callback for ``CheckpointManager(on_commit=...)``. It runs on rank 0, concurrently with
training, and a tracker's failure does not fail a save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from milepost.format.manifest import MANIFEST_NAME
from milepost.storage import open_storage
from milepost.storage.base import join
from milepost.training.hooks import Commit

OnCommit = Callable[[Commit], None]


def to_wandb(run: Any, name: str = "") -> OnCommit:
    """Log each committed step to a Weights & Biases ``run`` as a reference artifact of type ``checkpoint``.

    ``name`` is the artifact's; by default ``checkpoint-<id of the run>``. Each step has the alias ``step-<N>``.
    """
    import wandb

    def log(commit: Commit) -> None:
        artifact = wandb.Artifact(name or f"checkpoint-{run.id}", type="checkpoint", metadata=reference(commit))
        # By default wandb would read all files to digest them.
        artifact.add_reference(_url(commit.path), name=f"step-{commit.step}", checksum=False)
        run.log_artifact(artifact, aliases=["latest", f"step-{commit.step}"])

    return log


def to_mlflow(run_id: str, tracking_uri: str | None = None) -> OnCommit:
    """Log each committed step to an MLflow run: a JSON file ``checkpoints/step-<N>.json``, and the latest as tags."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)

    def log(commit: Commit) -> None:
        found = reference(commit)
        client.log_dict(run_id, found, f"checkpoints/step-{commit.step}.json")
        for key in ("step", "path", "digest"):
            client.set_tag(run_id, f"milepost.{key}", str(found[key]))

    return log


def reference(commit: Commit) -> dict[str, Any]:
    """The record of a step for a tracker. ``digest`` covers its commit record, which holds all other digests."""
    storage, path = open_storage(commit.path)
    record = join(path, MANIFEST_NAME)
    digest = ""
    if storage.stat(record) is not None:
        digest = f"sha256:{hashlib.sha256(storage.read(record)).hexdigest()}"
    return {
        "step": commit.step,
        "path": commit.path,
        "digest": digest,
        "contents": commit.contents,
        "metrics": dict(commit.metrics),
    }


def _url(path: str) -> str:
    return path if "://" in path else f"file://{path}"
