"""The picture of the folders and the figures about them."""

from __future__ import annotations

import re
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


SETS_GENERATORS = {"training/random_state.py", "train/loop.py"}
DRAWS = re.compile(
    r"\brandom\.(?!Random\b|SystemRandom\b)[a-z_]+\(|np\.random\.(?!default_rng\b|SeedSequence\b|Generator\b)[a-z_]+\("
    r"|torch\.(rand|randn|randint|randperm|manual_seed|seed)\("
)


def test_nothing_draws_from_the_generators_that_are_part_of_the_training_state() -> None:
    """A pause with jitter on a waiting rank would make the numbers of a resumed run others."""
    root = house.ROOT / "src/milepost"
    found = {
        f"{path.relative_to(root)}: {match[0]}"
        for path in root.rglob("*.py")
        for match in DRAWS.finditer(path.read_text())
        if str(path.relative_to(root)) not in SETS_GENERATORS and path.parent.name != "testing"
    }
    assert found == set()
    assert any(DRAWS.search((root / name).read_text()) for name in SETS_GENERATORS)


def test_no_two_files_of_tests_have_the_same_name() -> None:
    """pytest imports each by its file's name alone, and stops where a run collects two of one name."""
    names = [path.name for path in (house.ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
