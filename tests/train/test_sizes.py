"""The settings of a run's model: those of the weights that it starts from, the flavor's for a fresh start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from milepost.errors import ConfigError
from milepost.interop.hf.config import make_config
from milepost.interop.names.identity import ModelIdentity
from milepost.interop.names.model_sizes import ModelArgs, model_args
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays
from milepost.train.config import TrainConfig
from milepost.train.options import load_config
from milepost.train.sizes import settled_sizes

FLAVOR = model_args("llama3", "debugmodel")
UNSCALED = replace(FLAVOR, rope_scaling=None, max_seq_len=512)


def config_of(folder: Path, *flags: str) -> TrainConfig:
    return load_config([f"--job.dump_folder={folder}", "--checkpoint.enable", *flags], 1)


def assets(folder: Path, sizes: ModelArgs) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_config("llama3", sizes, "float32")))
    return folder


def step(folder: Path, name: str, sizes: ModelArgs) -> Path:
    identity = ModelIdentity(name="llama3", flavor="debugmodel", sizes=sizes)
    arrays = {"norm.weight": np.ones(4, "float32")}
    number = int(name.removeprefix("step-")) if name.startswith("step-") else None
    save_arrays(LocalStorage(folder), name, arrays, step=number, extra={"model": identity.record()})
    return folder / name


def test_a_fresh_start_has_the_published_settings(tmp_path: Path) -> None:
    assert settled_sizes(config_of(tmp_path), FLAVOR) == (FLAVOR, None)


def test_settings_come_from_the_weights_to_start_from_and_are_reported(tmp_path: Path) -> None:
    folder = assets(tmp_path / "llama", UNSCALED)
    for flags in (
        [f"--model.hf_assets_path={folder}"],
        ["--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={folder}"],
        [f"--checkpoint.initial_load_path={step(tmp_path, 'converted', UNSCALED)}"],
    ):
        sizes, note = settled_sizes(config_of(tmp_path / "run", *flags), FLAVOR)
        assert sizes == UNSCALED
        assert note is not None
        assert "not of debugmodel as published: rope_scaling none instead of by 8 from 8192, max_seq_len 512" in note


def test_the_vocabulary_is_the_tokenizers_whatever_the_source_says(tmp_path: Path) -> None:
    folder = assets(tmp_path / "llama", UNSCALED)
    sizes, _ = settled_sizes(config_of(tmp_path, f"--model.hf_assets_path={folder}"), replace(FLAVOR, vocab_size=256))
    assert sizes == replace(UNSCALED, vocab_size=256)


def test_a_resumed_run_keeps_the_settings_that_it_was_saved_with(tmp_path: Path) -> None:
    folder = assets(tmp_path / "llama", UNSCALED)
    (tmp_path / "checkpoint").mkdir()
    step(tmp_path / "checkpoint", "step-5", replace(FLAVOR, rope_theta=7.0))
    sizes, note = settled_sizes(config_of(tmp_path, f"--model.hf_assets_path={folder}"), FLAVOR)
    assert sizes.rope_theta == 7.0
    assert note is not None
    assert "step-5" in note


def test_another_model_is_left_for_the_load_to_refuse(tmp_path: Path) -> None:
    folder = assets(tmp_path / "llama", replace(UNSCALED, n_layers=2))
    assert settled_sizes(config_of(tmp_path, f"--model.hf_assets_path={folder}"), FLAVOR) == (FLAVOR, None)


def test_assets_of_another_model_are_refused_before_training_and_not_at_the_last_save(tmp_path: Path) -> None:
    folder = assets(tmp_path / "llama", replace(UNSCALED, n_layers=2))
    config = config_of(tmp_path, f"--model.hf_assets_path={folder}", "--checkpoint.last_save_in_hf")
    with pytest.raises(ConfigError, match=r"last_save_in_hf: .*config\.json holds another model .*num_hidden_layers"):
        settled_sizes(config, FLAVOR)
