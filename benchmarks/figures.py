"""What a benchmark found, as rows of one table and as JSON: figures beside the goals that they are held to.

Every program here takes ``--json FILE``; ``goals.py`` makes the table of ``docs/performance.md`` from such files.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

Seconds = Mapping[str, Sequence[float]]
"""By contender, one entry a round."""


@dataclass(frozen=True, slots=True)
class Row:
    """One goal and what was reached: in medians of all rounds, and in minima."""

    work: str
    goal: str
    """``at least 2.3x stock``."""
    reached: float
    in_minima: float | None
    unit: str
    is_met: bool


@dataclass(slots=True)
class Figures:
    """What one program found."""

    program: str
    """Its command line."""
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By the work, then by contender."""
    load_average: list[float] = field(default_factory=lambda: list(os.getloadavg()))

    def ratio(
        self, work: str, seconds: Seconds, of: str, to: str, bound: Literal["at least", "at most"], goal: float
    ) -> None:
        """Hold how often the seconds of contender ``to`` go into those of ``of`` to a goal."""
        middle, least = (take(seconds[of]) / take(seconds[to]) for take in (statistics.median, min))
        self.hold(work, bound, goal, middle, least, unit="x")

    def hold(
        self,
        work: str,
        bound: Literal["at least", "at most"],
        goal: float,
        reached: float,
        in_minima: float | None = None,
        unit: str = "",
    ) -> None:
        """Add a figure and the goal that it is held to."""
        is_met = reached >= goal if bound == "at least" else reached <= goal
        self.rows.append(Row(work, f"{bound} {goal:g}{unit}", reached, in_minima, unit, is_met))

    def note(self, work: str, seconds: Seconds) -> None:
        """Keep the seconds of a race, for the plot and for whoever reads the JSON."""
        self.seconds[work] = {name: list(values) for name, values in seconds.items()}

    def finish(self, path: Path | None) -> None:
        """Print the goals; write all of it as JSON, if wanted."""
        if self.rows:
            table = Table("work", "goal", "reached", "in minima", "", title=self.program, title_justify="left")
            for row in self.rows:
                table.add_row(*cells(asdict(row)))
            Console(width=140).print(table)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release().split('-')[0]}"
            path.write_text(json.dumps({**asdict(self), "machine": machine}, indent=1) + "\n")


def cells(row: Mapping[str, object]) -> list[str]:
    """A row of the table of goals, as text."""
    reached, least, unit = row["reached"], row["in_minima"], row["unit"]
    assert isinstance(reached, float | int)
    minima = f"{least:.3g}{unit}" if isinstance(least, float) else ""
    return [
        str(row["work"]),
        str(row["goal"]),
        f"{reached:.3g}{unit}",
        minima,
        "reached" if row["is_met"] else "not reached",
    ]


def race(
    title: str, contenders: Mapping[str, Callable[[], object]], rounds: int, nbytes: int, *, cold: bool = False
) -> dict[str, list[float]]:
    """Let each do its work once a round, in turn, and print minimum and median of each. Seconds by contender.

    What a contender returns is called with the clock stopped (to take back what it did). ``cold`` is said in the title.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, act in contenders.items():
            gc.collect()
            os.sync()
            started = time.perf_counter()
            after = act()
            times[name].append(time.perf_counter() - started)
            if callable(after):
                after()
    show(title + (", cold" if cold else ""), times, nbytes)
    return times


def show(title: str, times: Seconds, nbytes: int) -> None:
    """Print the times of a race; the first contender is the one that the others are compared with."""
    first = statistics.median(next(iter(times.values())))
    table = Table(title=title, title_justify="left")
    for column in ("", "min s", "median s", "GB/s", "times the first"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in times.items():
        median = statistics.median(values)
        rate = f"{nbytes / median / 1e9:.2f}"
        table.add_row(name, f"{min(values):.3f}", f"{median:.3f}", rate, f"{median / first:.2f}")
    Console(width=120).print(table)
