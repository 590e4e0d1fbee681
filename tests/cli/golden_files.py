"""The exact output of commands, reviewed by a person.

After an intended change: ``MILEPOST_WRITE_GOLDEN=1 pytest tests/cli``, then read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"


def compare(name: str, text: str) -> None:
    """Compare ``text`` with a file of ``tests/golden``, or write it there if the option is given."""
    golden = GOLDEN / name
    if os.environ.get("MILEPOST_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
