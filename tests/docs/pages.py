"""The pages of the documentation, as the blocks of code that a reader would run one after the other."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
REFERENCE = ROOT / "docs/reference"

_BLOCK = re.compile(r"(<!-- only compiled: [^\n]* -->\n)?^```([^`\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code. ``only_compiled``: it needs more than a test has, as the page's comment says."""

    language: str
    text: str
    only_compiled: bool = False


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return [Block(language, text, bool(mark)) for mark, language, text in _BLOCK.findall(page.read_text())]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, in words, without comments and redirections."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for sign in (">", "|"):
            words = words[: words.index(sign)] if sign in words else words
        if words:
            found.append(words)
    return found


def shell_commands(page: Path) -> list[list[str]]:
    """The commands of all shell blocks of a page."""
    return [words for block in blocks(page) if block.language == "sh" for words in commands(block)]
