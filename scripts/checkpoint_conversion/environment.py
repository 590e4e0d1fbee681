"""Where ``milepost`` comes from when these scripts are started by a Python that does not have it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parents[2] / ".venv"


def enter() -> None:
    """Continue in the repository's ``.venv`` where this Python has no ``milepost``; exit with 2 if nothing has it."""
    if importlib.util.find_spec("milepost") is not None:
        return
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(python, [str(python), *sys.argv])
    print("error: milepost is not installed for this Python; run `make setup` in the repository", file=sys.stderr)
    sys.exit(2)
