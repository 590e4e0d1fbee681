"""Metrics recorded with a save: ``CheckpointManager.save(step, metrics=...)``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from milepost.errors import ConfigError

log = logging.getLogger("milepost")


class MetricRecorder:
    """Checks metrics, and warns once if ``wanted`` (``checkpoint.metric``) is missing."""

    def __init__(self, wanted: str):
        self._wanted = wanted
        self._has_warned = False

    def values(self, metrics: Any) -> tuple[dict[str, float], ConfigError | None]:
        """Return the metrics to record, and their problems. Any number is accepted, also a 0-d tensor."""
        if not isinstance(metrics, Mapping):
            kind = type(metrics).__name__
            return {}, ConfigError(f"metrics: expected numbers by name, such as {{'loss': 2.3}}, found a {kind}")
        found, problems = {}, []
        for name, value in metrics.items():
            try:
                if not isinstance(name, str) or isinstance(value, str | bytes):
                    raise TypeError
                found[name] = float(value)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                problems.append(f"metrics[{name!r}] must be a number under a name, not a {type(value).__name__}")
        if metrics and self._wanted and self._wanted not in metrics and not self._has_warned:
            self._has_warned = True
            names = ", ".join(map(str, metrics))
            log.warning("checkpoint.metric = %s is not among the metrics of a save: %s", self._wanted, names)
        return found, ConfigError(problems) if problems else None
