"""The picture of the folders and the figures about them."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

import house  # noqa: E402 - it is beside the pages, not in a package


def test_the_picture_is_that_of_the_imports_and_no_folder_imports_back() -> None:
    assert (DOCS / "house.svg").read_text() == house.picture(), "run python docs/generate.py"
    graph = house.module_graph(house.ROOT)
    assert house.cycles(house.folder_graph(graph)) == []
    assert house.cycles(house.folder_graph(graph, 2)) == []


def test_every_folder_has_its_line_in_the_page_of_the_design() -> None:
    page = (DOCS / "design.md").read_text()
    folders = {entry.name for entry in (house.ROOT / "src/milepost").iterdir() if (entry / "__init__.py").exists()}
    assert [name for name in sorted(folders) if f"\n| `{name}` |" not in page] == []


def test_a_name_says_one_thing() -> None:
    """A process has its ``main``, and each framework its own callback."""
    assert house.repeated_names(house.modules(house.ROOT)) == ["MilepostCallback 2", "main 5"]


def test_cycles_and_chains_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert house.cycles(graph) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert house.longest_chain(graph) == ["d", "a", "b", "c"]
