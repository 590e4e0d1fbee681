"""``docs/format.md`` shows bytes: they are those that the code writes."""

from __future__ import annotations

import dataclasses
import re
import struct
from pathlib import Path

import pytest
from format_1 import to_json_1
from manifests import StoredBox, lay_out, record_files

from milepost.format.box import Box
from milepost.format.digest import crc32, dump_digests
from milepost.format.manifest import DIGESTS_NAME, FileEntry

DOC = Path(__file__).parents[2] / "docs" / "format.md"


def hexdump(data: bytes) -> str:
    """Offset, bytes and text, sixteen to a line, as ``xxd -g 1`` prints them."""
    lines = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:08x}: {row.hex(' '):<47}  {text}")
    return "\n".join(lines)


def examples() -> dict[str, str]:
    """The examples of the page by name: a checkpoint of one tensor and one number."""
    layout = lay_out(
        {"w": ("float32", (2,), [StoredBox(Box((0,), (2,)), struct.pack("<2f", 1.0, 2.0))])}, {"step": 7}, step=7
    )
    digests = dump_digests(layout.manifest.save_id, layout.crcs)
    data = layout.files["__0_0.distcp"]
    files = {"__0_0.distcp": FileEntry(len(data), crc32(data)), DIGESTS_NAME: FileEntry(len(digests), crc32(digests))}
    record = record_files(dataclasses.replace(layout.manifest, files=files))
    return {
        "data file": hexdump(data),
        "milepost.json": record["milepost.json"].decode().rstrip("\n"),
        "milepost.shards": hexdump(record["milepost.shards"]),
        "milepost.digests": hexdump(digests),
        "milepost.json of format 1": to_json_1(layout.manifest).decode().rstrip("\n"),
    }


@pytest.mark.parametrize("name", examples())
def test_the_page_shows_what_the_code_writes(name: str):
    shown = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w*\n(.*?)\n```", DOC.read_text(), re.DOTALL)
    assert shown is not None, f"docs/format.md has no example called {name!r}"
    assert shown[1] == examples()[name]


def test_the_page_has_no_other_example():
    assert re.findall(r"<!-- example: (.*?) -->", DOC.read_text()) == list(examples())
