"""A save or a load that takes long says how far it is, on one rank."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import milepost
from milepost.checkpoint.progress import Progress


def test_long_ones_tell_how_far_they_are_and_short_ones_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="milepost")
    state = {"w": torch.ones(1 << 20), "v": torch.ones(1 << 20)}
    milepost.save(tmp_path / "step-1", state)
    milepost.load(tmp_path / "step-1", state)
    assert caplog.text == ""
    monkeypatch.setattr(Progress, "EVERY_S", 0.0)
    milepost.save(tmp_path / "step-2", state)
    assert f"saving {tmp_path}/step-2: 100 % after 0 s" in caplog.text
    milepost.load(tmp_path / "step-2", state)
    assert f"loading {tmp_path}/step-2: 100 % after 0 s" in caplog.text
