"""A run's folder as a scan shows it, and the run that writes there, without a file."""

from __future__ import annotations

from dataclasses import replace

from milepost.config import CheckpointConfig
from milepost.format.manifest import Lineage
from milepost.run import branches, retention
from milepost.run.branches import Descent, History
from milepost.run.catalog import StepEntry
from milepost.run.retention import Rules
from milepost.training.choice import Choice, choose

NOW = 1_000_000.0


class Folder:
    """A run's folder as a scan shows it, and the run that writes there, without a file."""

    def __init__(self) -> None:
        self.steps: dict[int, StepEntry] = {}
        self.descent: Descent | None = None
        self.num_saves = 0

    @property
    def entries(self) -> list[StepEntry]:
        return [self.steps[step] for step in sorted(self.steps)]

    @property
    def history(self) -> History:
        return History.of(self.entries)

    def put(self, step: int, *, lineage: Lineage | None = None, state: str = "committed", kind: str = "full") -> None:
        self.num_saves += 1
        self.steps[step] = StepEntry(
            step=step,
            path=f"run/step-{step}",
            state=state,  # type: ignore[arg-type]
            kind=kind,
            save_id=f"save-{self.num_saves}" if state != "external" else "",
            created_s=NOW,  # clocks say nothing
            nbytes=1,
            lineage=lineage,
        )

    def start(self, load_step: int = -1, *, launch: str = "", num_steps: int | None = None, **config: object) -> Choice:
        options = CheckpointConfig(enable=True, load_step=load_step, **config)  # type: ignore[arg-type]
        choice = choose(self.entries, options, {}, "run", launch=launch, num_steps=num_steps)
        assert choice is not None
        assert choice.step is not None
        self.descent = branches.descend(self.entries, self.steps[choice.step], start=choice.start)
        return choice

    def start_fresh(self) -> None:
        self.descent = None

    def save(self, *steps: int, kind: str = "full") -> None:
        for step in steps:
            descent = self.descent or branches.begin(self.entries, step)
            self.put(step, lineage=descent.lineage(), kind=kind)
            self.descent = descent.tried().committed(step, self.steps[step].save_id)

    def damage(self, step: int) -> None:
        self.steps[step] = replace(self.steps[step], state="damaged", reason="bits flipped")

    def tear(self, step: int) -> None:
        """Make the step's record unreadable, its lineage included."""
        name = self.steps[step].path
        self.steps[step] = StepEntry(step=step, path=name, state="damaged", reason="torn", record_id="1-2")

    def prune(self, k: int, **rules: object) -> list[int]:
        decisions = retention.plan(self.entries, Rules(keep_latest_k=k, **rules), now=NOW)  # type: ignore[arg-type]
        gone = [decision.step for decision in decisions if not decision.keep]
        for step in gone:
            del self.steps[step]
        return gone
