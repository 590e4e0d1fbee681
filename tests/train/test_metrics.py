"""The metrics that a run logs, also across a resume."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from milepost.train.config import MetricsConfig
from milepost.train.metrics import Meter, StepFigures
from milepost.training.events import SaveEvent

SAVE = SaveEvent(
    step=2,
    reason="every 2 steps",
    kind="full",
    save_id="a",
    finished=0.0,
    stall_s=0.5,
    plan_s=0.1,
    stage_s=0.2,
    write_s=0.3,
    commit_s=0.4,
    nbytes=1000,
)


def make_meter(folder: Path, *, log_freq: int = 1, tensorboard: bool = False) -> Meter:
    config = MetricsConfig(log_freq=log_freq, enable_tensorboard=tensorboard)
    return Meter(config, tb_folder=folder, tokens_per_step=64, num_steps=5, writes_tensorboard=True)


def figures(step: int, loss: float) -> StepFigures:
    return StepFigures(step=step, loss=loss, grad_norm=1.5, lr=2e-3)


def test_the_first_the_last_and_every_so_many_steps_have_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "milepost")
    meter = make_meter(tmp_path, log_freq=2)
    meter.start(step=0, blocked_s=1.0)
    for step in range(1, 6):
        meter.log(figures(step, 6.0 - step), blocked_s=1.0 + step // 4)
    assert [re.match(r"step (\d)/5", line)[1] for line in caplog.messages] == ["1", "2", "4", "5"]
    line = r"step 4/5  loss 2\.0000  grad_norm 1\.500  lr 2\.00e-03  tokens/s [\d,]+  memory \d\.\d\d GiB  blocked by "
    assert re.fullmatch(line + r"checkpoints 1\.00 s", caplog.messages[2])


def test_a_resumed_run_continues_the_curves_from_where_it_resumed(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_from, loss in ((0, 1.0), (2, 2.0)):
        meter = make_meter(tmp_path, tensorboard=True)
        meter.start(step=resumed_from, blocked_s=0.0)
        for step in range(resumed_from + 1, resumed_from + 4):
            meter.log(figures(step, loss), blocked_s=0.0)
        meter.log_saves([SAVE])
        meter.close()
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in curves.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert curves.Scalars("checkpoint/write_s")[-1].value == pytest.approx(0.3)
