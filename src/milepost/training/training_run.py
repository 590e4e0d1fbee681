"""The run that a manager saves and resumes, as one value for the parts of the manager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from milepost.collective.comm import Comm
from milepost.config import CheckpointConfig
from milepost.saving.copy_step import Spot
from milepost.training.training_state import TrainingState
from milepost.training.weights_format import WeightsFormat


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRun:
    """A run of these ranks, its live state, and where it is saved."""

    folder: Spot
    config: CheckpointConfig
    comm: Comm
    state: TrainingState
    degrees: Mapping[str, int]
    """Degrees of parallelism by name."""
    weights_format: WeightsFormat | None
    """The format of weights besides the run's own, if any."""
