"""The learning rate schedule, and its continuation after a resume."""

from __future__ import annotations

import pytest
import torch

from milepost.train.config import LRSchedulerConfig, OptimizerConfig
from milepost.train.optim import LRSchedule, build_optimizers, lr_factor


def factors(num_steps: int, **options) -> list[float]:
    config = LRSchedulerConfig(**options)
    return [lr_factor(step, num_steps, config) for step in range(1, num_steps + 1)]


def test_it_rises_then_falls_to_nothing_by_default():
    assert factors(10, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_with_a_decay_ratio_it_is_stable_in_between():
    course = factors(10, warmup_steps=2, decay_ratio=0.4, min_lr_factor=0.1)
    assert course == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])


@pytest.mark.parametrize(("decay_type", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_each_decay_ends_at_the_least_and_has_its_own_shape(decay_type: str, middle: float):
    course = factors(9, warmup_steps=1, decay_type=decay_type)
    assert course[0] == 1
    assert course[4] == pytest.approx(middle)
    assert course[8] == pytest.approx(0)
    assert course == sorted(course, reverse=True)


@pytest.mark.parametrize(
    "options", [{"warmup_steps": 0}, {"warmup_steps": 50}, {"warmup_steps": 0, "decay_ratio": 0.0}]
)
def test_extreme_courses_stay_between_nothing_and_all(options: dict):
    config = LRSchedulerConfig(**options)
    assert all(0 <= lr_factor(step, 5, config) <= 1 for step in range(1, 8))


def test_every_model_part_has_an_optimizer_and_all_follow_one_course():
    parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    optimizers = build_optimizers(parts, OptimizerConfig(lr=1.0, beta1=0.8, weight_decay=0.3))
    schedule = LRSchedule(optimizers, lr=1.0, num_steps=10, config=LRSchedulerConfig(warmup_steps=5))
    schedule.step()
    for optimizer in optimizers:
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.4, (0.8, 0.95), 0.3)


def test_a_resumed_course_continues_and_follows_the_present_number_of_steps():
    config = LRSchedulerConfig(warmup_steps=1)
    parts = [torch.nn.Linear(2, 2)]

    def schedule(num_steps: int) -> LRSchedule:
        return LRSchedule(build_optimizers(parts, OptimizerConfig()), lr=1.0, num_steps=num_steps, config=config)

    stopped = schedule(5)
    for _ in range(3):
        stopped.step()
    same, longer = schedule(5), schedule(9)
    same.load_state_dict(stopped.state_dict())
    longer.load_state_dict(stopped.state_dict())
    assert same.lr == stopped.lr == pytest.approx(1 / 4)
    assert longer.lr == pytest.approx(5 / 8)
