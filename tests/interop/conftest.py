"""Tiny models as ``transformers`` saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import KINDS, hf_model


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``hf_folders(kind)``: the folder that ``save_pretrained`` wrote for a kind, in several files."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            hf_model(KINDS[name]).save_pretrained(made[name], max_shard_size="60KB")
            (made[name] / "tokenizer.json").write_text('{"version": "1.0"}')
        return made[name]

    return get
