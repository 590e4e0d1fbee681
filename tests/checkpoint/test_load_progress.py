"""A load that takes long says how far it is, on one rank."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import milepost
from milepost.checkpoint import load as load_module


def test_a_long_load_tells_how_far_it_is_and_a_short_one_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="milepost")
    state = {"w": torch.ones(1 << 20), "v": torch.ones(1 << 20)}
    milepost.save(tmp_path / "step-1", state)
    milepost.load(tmp_path / "step-1", state)
    assert "loading" not in caplog.text
    monkeypatch.setattr(load_module._Progress, "EVERY_S", 0.0)
    milepost.load(tmp_path / "step-1", state)
    assert "step-1: 100 % after 0 s" in caplog.text
