"""Write a table of ``docs/conversion.md`` from what tests converted: ``python docs/conversion_table.py FILE``.

FILE has a JSON object a line, left by the fixture ``tabulate`` of ``tests/interop/conftest.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "conversion.md"
BEGIN, END = "<!-- table: begin (made by `make conversions`) -->\n", "<!-- table: end -->\n"


def table(lines: list[str]) -> str:
    """The rows, by family."""
    text = "| family | direction | tensors compared bit for bit | difference of the logits | peak memory |\n"
    text += "|---|---|---|---|---|\n"
    for row in sorted(map(json.loads, lines), key=lambda row: row["family"]):
        text += (
            f"| `{row['family']}` | {row['direction']} | {row['tensors']} | {row['logits']:g} | {row['peak_mb']} MB |\n"
        )
    return text


def main() -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n" + table(Path(sys.argv[1]).read_text().splitlines()) + "\n" + END + after)


if __name__ == "__main__":
    main()
