"""Write the table of ``docs/reliability.md`` from what the tests tallied: ``python docs/reliability_table.py FILE``.

FILE has a JSON object a line, left by the fixture ``tally`` of ``tests/conftest.py``. Lines that say the same of
several cases of one test (its parameters) are added up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "reliability.md"
BEGIN, END = "<!-- table: begin (made by `make reliability`) -->\n", "<!-- table: end -->\n"


def table(lines: list[str]) -> str:
    """The rows, in the order in which they were first told."""
    rows: dict[tuple[str, str], tuple[int, int, set[int]]] = {}
    for line in lines:
        told = json.loads(line)
        key = (told["what"], told["test"].partition("[")[0])
        tried, lost, seeds = rows.get(key, (0, 0, set()))
        seeds = seeds | {told["seed"]} if told["seed"] is not None else seeds
        rows[key] = (tried + told["tried"], lost + told["lost"], seeds)
    text = "| what was done | times | lost | seed | test |\n|---|---|---|---|---|\n"
    for (what, test), (tried, lost, seeds) in rows.items():
        seed = ", ".join(map(str, sorted(seeds))) or "every case"
        text += f"| {what} | {tried:,} | {lost} | {seed} | `{test.removeprefix('tests/')}` |\n"
    return text


def main() -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n" + table(Path(sys.argv[1]).read_text().splitlines()) + "\n" + END + after)


if __name__ == "__main__":
    main()
