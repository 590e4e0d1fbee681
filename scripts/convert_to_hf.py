"""The same as ``checkpoint_conversion/convert_to_hf.py``, reachable without the folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    script = Path(__file__).resolve().parent / "checkpoint_conversion" / Path(__file__).name
    os.execv(sys.executable, [sys.executable, str(script), *sys.argv[1:]])
