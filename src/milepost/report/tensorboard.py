"""Layer norms and changes as TensorBoard scalars, computed from stored steps, without stalling training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from milepost.errors import ConfigError
from milepost.report.differences import group_of
from milepost.report.gather import RunView, StepView


def scalars(step: StepView) -> Iterator[tuple[str, float]]:
    """Return name and value of a step's scalars: per part and layer the norm, and the change since the previous step.

    A norm is over all tensors of a layer, a change is the root mean square of their relative changes.
    """
    norms: dict[str, float] = {}
    changes: dict[str, list[float]] = {}
    for key, profile in step.profiles.items():
        group, norm = group_of(key), profile.statistics.norm
        if profile.share and math.isfinite(norm):
            norms[group] = norms.get(group, 0.0) + norm * norm / profile.share
        if profile.movement is not None and math.isfinite(profile.movement.relative_norm):
            changes.setdefault(group, []).append(profile.movement.relative_norm)
    for group, squares in norms.items():
        yield f"norm/{group}", math.sqrt(squares)
    for group, found in changes.items():
        yield f"change/{group}", math.sqrt(sum(x * x for x in found) / len(found))


def write_scalars(view: RunView, folder: str | os.PathLike[str]) -> int:
    """Write the scalars of all steps whose weights were read to a TensorBoard folder; returns their number.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    count = 0
    writer = EventFileWriter(os.fspath(folder))
    try:
        for step in view.read:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(step)]
            count += len(values)
            when = step.entry.created_s or view.made_s
            writer.add_event(Event(wall_time=when, step=step.entry.step, summary=Summary(value=values)))
    finally:
        writer.close()
    return count
