"""A long save or load reports its progress, on one rank."""

from __future__ import annotations

import logging
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import milepost
from milepost.collective.comm import FailureNotice, SingleProcess
from milepost.collective.progress import ProgressLog
from milepost.format.box import Box
from milepost.interop.convert import convert
from milepost.interop.hf.load import load_hf
from milepost.interop.names.model_sizes import model_args
from milepost.interop.options import ConvertOptions
from milepost.saving.background import BackgroundSave, log_wait
from milepost.saving.job import JobResult, SaveJob
from milepost.saving.peers import Peers, PeerWatch
from milepost.storage import LocalStorage
from milepost.tensors.plan import TensorSpec, lay_out_file
from milepost.tensors.state import flatten
from milepost.train.models import build_model

FOUR_BYTES = lay_out_file(0, [(TensorSpec("w", "float32", (1,), (Box.whole((1,)),)), Box.whole((1,)))], ())


def test_long_ones_tell_how_far_they_are_and_short_ones_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="milepost")
    state = {"w": torch.ones(1 << 20), "v": torch.ones(1 << 20)}
    milepost.save(tmp_path / "step-1", state)
    milepost.load(tmp_path / "step-1", state)
    assert caplog.text == ""
    monkeypatch.setattr(ProgressLog, "EVERY_S", 0.0)
    milepost.save(tmp_path / "step-2", state)
    assert f"saving {tmp_path}/step-2: 100 % after 0 s" in caplog.text
    milepost.load(tmp_path / "step-2", state)
    assert f"loading {tmp_path}/step-2: 100 % after 0 s" in caplog.text


def test_weights_from_hugging_face_tell_it_too(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="milepost")
    state = build_model("llama3", "debugmodel", vocab_size=64, seq_len=16).state_dict()
    milepost.save(memory_path / "step-1", state)
    args = model_args("llama3", "debugmodel", vocab_size=64)
    convert(memory_path / "step-1", memory_path / "hf", ConvertOptions(to="hf", model="llama3", sizes=args))
    caplog.clear()
    monkeypatch.setattr(ProgressLog, "EVERY_S", 0.0)
    for logs_progress in (False, True):
        assert caplog.text == ""
        load_hf(memory_path / "hf", "llama3", args, flatten(state).tensors, logs_progress=logs_progress)
    assert f"loading {memory_path}/hf: 100 % after " in caplog.text


def test_the_wait_for_a_save_in_the_background_is_reported_on_one_rank(caplog: pytest.LogCaptureFixture):
    """As ``close()`` waits at the end of a run."""
    caplog.set_level(logging.INFO, logger="milepost")
    for rank in (1, 0):
        assert caplog.text == ""
        job = SaveJob("step-1", "", "id", 0, 1, FOUR_BYTES, None, None, 1.0)
        storage, alone = LocalStorage("/run"), SingleProcess()
        save = BackgroundSave(storage, job, FailureNotice(alone, "id"), PeerWatch(Peers(alone), storage, job))
        save.wrote(2)
        done = JobResult(write_s=0.1, commit_s=0.1, nbytes=4, contents={})
        begin = partial(save.run, lambda _, done=done: done, plan_s=0.1, reused_plan=False)
        threading.Timer(0.3, begin).start()
        log_wait(save, rank, every_s=0.05)
    assert "waiting for /run/step-1: 50 % written, 0 s" in caplog.text
    assert "s for /run/step-1 to be committed" in caplog.text
