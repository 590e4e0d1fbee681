"""When to save: a pure function of the options and the step."""

from __future__ import annotations

from milepost.config import CheckpointConfig


def reason_to_save(config: CheckpointConfig, step: int, *, is_last: bool) -> str | None:
    """Why a checkpoint is due after ``step``, or None if none is."""
    if not config.enable or config.load_only:
        return None
    if is_last:
        return "last step"
    if step == 1 and config.enable_first_step_checkpoint:
        return "first step"
    if step > 0 and step % config.interval == 0:
        return f"every {config.interval} steps"
    return None
