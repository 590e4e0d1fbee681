"""The same as ``checkpoint_conversion/convert_from_hf.py``, reachable without the folder."""

from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "checkpoint_conversion" / "convert_from_hf.py"), run_name="__main__")
