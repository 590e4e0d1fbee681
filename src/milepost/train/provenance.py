"""Provenance, saved with each step: the options of the run, the tokenizer, the revision of the code."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from typing import Any

from milepost.interop.hf.extras import read_assets
from milepost.train.config import TrainConfig
from milepost.train.options import to_toml

CONFIG_NAME = "config.toml"
GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Provenance:
    """The files and values saved with the state. Read once: files may change while a run trains."""

    files: dict[str, bytes] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig) -> Provenance:
        """Read the provenance of a run with these options.

        Raises:
            ConversionError: tokenizer files in ``model.hf_assets_path`` can't be copied.
            StorageError: they can't be read.
        """
        files = {CONFIG_NAME: f"{to_toml(config)}\n".encode()}
        if config.model.hf_assets_path:
            files |= read_assets(config.model.hf_assets_path)
        extra: dict[str, Any] = {"description": config.job.description}
        revision = git_revision()
        if revision is not None:
            extra["git_revision"] = revision
        return cls(files, extra)


def git_revision() -> str | None:
    """Return the commit checked out where the run was started, with the suffix ``-dirty`` if files were changed.

    None if there is no repository, or git does not answer within ``GIT_TIMEOUT_S``.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
