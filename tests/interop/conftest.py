"""Tiny models as ``transformers`` saves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import KINDS, hf_model


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``hf_folders(kind)``: the folder that ``save_pretrained`` wrote for a kind, in several files."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            hf_model(KINDS[name]).save_pretrained(made[name], max_shard_size="60KB")
            (made[name] / "tokenizer.json").write_text('{"version": "1.0"}')
        return made[name]

    return get


_CONVERT_AND_TELL = """
import sys
from milepost.cli.main import main
assert main(sys.argv[1:]) == 0
print("peak", *[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


@pytest.fixture
def tabulate() -> Callable[..., None]:
    """``tabulate(family, direction, source, options, tensors, logits_difference)``: a row of docs/conversion.md.

    Lines go to the file that ``MILEPOST_CONVERSIONS`` names, if any (``make conversions`` makes the table of them).
    Then the conversion is run once more, in a process of its own, for its peak memory.
    """

    def note(family: str, direction: str, source: Path, options: list[str], tensors: int, difference: float) -> None:
        path = os.environ.get("MILEPOST_CONVERSIONS")
        if not path:
            return
        target = source.with_name(f"{source.name}-again")
        command = [sys.executable, "-c", _CONVERT_AND_TELL, "convert", str(source), str(target), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        peak_kb = int(done.stdout.rsplit("peak ", 1)[1])
        row = {
            "family": family,
            "direction": direction,
            "tensors": tensors,
            "logits": difference,
            "peak_mb": round(peak_kb * 1024 / 1e6),
        }
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")

    return note
