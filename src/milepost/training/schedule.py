"""The schedule of saves: pure functions of the options, the step and the clock."""

from __future__ import annotations

import math

from milepost.config import CheckpointConfig

FIRST_AUTO_SAVE_S = 60.0
"""Seconds until the first save with ``interval = "auto"``, which measures the cost."""
MIN_STALL_S = 0.001


def reason_to_save(config: CheckpointConfig, step: int, *, is_last: bool) -> str | None:
    """Return the reason why ``step`` is due by the step count, or None. The same on every rank."""
    if not config.enable or config.load_only:
        return None
    if config.create_seed_checkpoint:
        return "seed checkpoint"
    if is_last:
        return "last step"
    if step == 1 and config.enable_first_step_checkpoint:
        return "first step"
    if step > 0 and config.interval != "auto" and step % config.interval == 0:
        return f"every {config.interval} steps"
    return None


def reason_by_clock(config: CheckpointConfig, *, since_save_s: float, stall_s: float | None) -> str | None:
    """Return the reason why a save is due by wall time, or None. Clocks differ, so one rank decides for all.

    Args:
        since_save_s: seconds since the last save, or since training began.
        stall_s: seconds that training was stalled by the last save; None before the first.
    """
    if not config.enable or config.load_only:
        return None
    if config.interval_seconds and since_save_s >= config.interval_seconds:
        return f"every {config.interval_seconds:g} s"
    if config.interval == "auto":
        due_s = FIRST_AUTO_SAVE_S if stall_s is None else young_daly_s(stall_s, config.mtbf_hours * 3600.0)
        if since_save_s >= due_s:
            return f"every {due_s:.0f} s (auto)"
    return None


def young_daly_s(stall_s: float, mtbf_s: float) -> float:
    """Return the seconds between saves that minimize the time lost to saving and to repeated work after failures.

    First-order optimum ``sqrt(2 * stall * MTBF)``. (Source: J. W. Young, "A first order approximation to the optimum
    checkpoint interval", CACM 17(9), 1974; J. T. Daly, FGCS 22(3), 2006.)
    """
    return math.sqrt(2.0 * max(stall_s, MIN_STALL_S) * mtbf_s)


def needs_clock(config: CheckpointConfig) -> bool:
    """Return whether saves may be due by wall time."""
    return config.enable and not config.load_only and (config.interval == "auto" or config.interval_seconds > 0)
