"""The structure of ``src/milepost`` in figures and as a picture, from its own imports.

``python docs/house.py [CHECKOUT] [--against REV]`` prints the figures, beside those of another revision if one is
named. ``docs/generate.py`` writes the picture, ``docs/house.svg``.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "milepost"
Graph = Mapping[str, set[str]]


# ---- imports ----


def modules(root: Path) -> dict[str, Path]:
    """Dotted name: file, of every module but the packages' own."""
    src = root / "src"
    files = sorted((src / PACKAGE).rglob("*.py"))
    return {".".join(file.relative_to(src).with_suffix("").parts): file for file in files if file.stem != "__init__"}


def imports_of(file: Path) -> Iterator[str]:
    """The modules that a file imports when it is run; not what is for type checkers alone."""
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            pending += ast.iter_child_nodes(node)


def module_graph(root: Path) -> Graph:
    """Module: the modules of the package that it imports."""
    known = modules(root)
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        found = set()
        for wanted in imports_of(file):
            found |= {one for one in (wanted, wanted.rpartition(".")[0]) if one in known and one != name}
        graph[name] = found
    return graph


def folder_graph(graph: Graph, depth: int = 1) -> Graph:
    """Folder: the folders that it imports. A module of the package itself stands for itself."""
    folders: dict[str, set[str]] = defaultdict(set)
    for name, wanted in graph.items():
        here = folder_of(name, depth)
        folders[here] |= {folder_of(one, depth) for one in wanted} - {here}
    return folders


def folder_of(module: str, depth: int = 1) -> str:
    """Return the folder of a module, at most ``depth`` deep; a module directly in the package is its own."""
    return "/".join(module.split(".")[1:][:depth])


def cycles(graph: Graph) -> list[tuple[str, str]]:
    """Pairs that import each other, directly or by way of others."""
    reach = {node: reachable(graph, node) for node in graph}
    return sorted((a, b) for a in graph for b in reach[a] if a < b and a in reach.get(b, ()))


def reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    pending = list(graph.get(start, ()))
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += graph.get(node, ())
    return seen


def longest_chain(graph: Graph) -> list[str]:
    """The longest path of imports. Of a graph with cycles, without going round."""
    active: set[str] = set()

    @cache
    def below(node: str) -> tuple[str, ...]:
        active.add(node)
        best = max((below(one) for one in sorted(graph.get(node, ())) if one not in active), key=len, default=())
        active.discard(node)
        return (node, *best)

    return list(max((below(node) for node in sorted(graph)), key=len, default=()))


# ---- figures ----


def figures(root: Path) -> dict[str, object]:
    """Return the figures of a checkout."""
    known, graph = modules(root), module_graph(root)
    lines = {name: len(file.read_text().splitlines()) for name, file in known.items()}
    by_folder: dict[str, list[int]] = defaultdict(list)
    for name, count in lines.items():
        by_folder[folder_of(name)].append(count)
    trees = [ast.parse(file.read_text()) for file in known.values()]
    functions = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    private = [f for f in functions if f.name.startswith("_") and not f.name.startswith("__")]
    total = sum(lines.values())
    return {
        "lines": total,
        "files": len(lines),
        **{f"lines, files in {folder}": (sum(c), len(c)) for folder, c in sorted(by_folder.items()) if len(c) > 1},
        "folder cycles": cycles(folder_graph(graph)),
        "cycles of folders in folders": cycles(folder_graph(graph, 2)),
        "longest import chain": len(longest_chain(graph)),
        "own frames (most allowed by the test)": own_frames(root),
        "private functions in 1000 lines": round(1000 * len(private) / total, 1),
        "names defined more than once": repeated_names(known),
        "tests' reaches into private names": private_reaches(root),
    }


def repeated_names(known: Mapping[str, Path]) -> list[str]:
    """Public classes and functions that several modules define, with how many; commands have the same by design."""
    homes: dict[str, set[str]] = defaultdict(set)
    for module, file in known.items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names = [node.name]
            elif isinstance(node, ast.Assign) and re.match(r"(Callable|Literal|\w+ \|)", ast.unparse(node.value)):
                names = [one.id for one in node.targets if isinstance(one, ast.Name) and one.id[0].isupper()]
            else:
                continue
            for name in names:
                if not name.startswith("_") and not (".cli." in module and name in ("run", "add_arguments")):
                    homes[name].add(module)
    return sorted(f"{name} {len(where)}" for name, where in homes.items() if len(where) > 1)


def private_reaches(root: Path) -> int:
    """Count the imports, uses and patches of the package's private names in tests."""
    return sum(map(private_reaches_of, (root / "tests").rglob("*.py")))


def private_reaches_of(file: Path) -> int:
    found, of_others = 0, set()
    nodes = [*ast.walk(ast.parse(file.read_text()))]
    for node in nodes:
        if isinstance(node, ast.Import):
            of_others |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(PACKAGE):
            of_others |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found += sum(alias.name.startswith("_") for alias in node.names)
    for node in nodes:
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            root: ast.AST = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            name = root.id if isinstance(root, ast.Name) else ""
            found += name not in of_others and not (root is node.value and name in ("self", "cls"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += bool(re.fullmatch(rf"{PACKAGE}(\.\w+)*\._[a-z]\w*", node.value))
    return found


def own_frames(root: Path) -> str:
    for file in (root / "tests").rglob("test_path_to_disk.py"):
        found = re.findall(r"^MOST\w* = (.*)$", file.read_text(), flags=re.MULTILINE)
        return f"save {found[0]}, load {found[1]}" if len(found) == 2 else "?"
    return "not pinned"


def show(value: object) -> str:
    if isinstance(value, list):
        return str(len(value)) + (": " + ", ".join(map(str, value[:20])) if value else "")
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---- picture ----

_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 118, 34, 18, 46, 16
_STYLE = """
  .box { fill: #eef2f7; stroke: #5b6b7f; } .name { fill: #1c2733; } .arrow { stroke: #7b8a9b; fill: none; }
  .head { fill: #7b8a9b; } text { font: 13px system-ui, sans-serif; text-anchor: middle; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #22303d; stroke: #8fa3b8; } .name { fill: #e8eef4; } .arrow { stroke: #9fb1c3; }
    .head { fill: #9fb1c3; }
  }
"""


def picture(root: Path = ROOT) -> str:
    """The folders as an SVG: each stands above all that it imports; an import that follows from others has no arrow."""
    graph = folder_graph(module_graph(root))
    level: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in level:
            level[node] = 0  # of a cycle, too
            level[node] = 1 + max(map(height, sorted(graph.get(node, ()))), default=-1)
        return level[node]

    for node in sorted(graph):
        height(node)
    rows = [sorted(n for n in level if level[n] == number) for number in range(max(level.values()), -1, -1)]
    width = max(len(row) for row in rows) * (_BOX_WIDTH + _GAP_X) - _GAP_X + 2 * _MARGIN
    height_px = len(rows) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y + 2 * _MARGIN
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (_BOX_WIDTH + _GAP_X) + _GAP_X) / 2
        for column, name in enumerate(row):
            place[name] = left + column * (_BOX_WIDTH + _GAP_X), _MARGIN + number * (_BOX_HEIGHT + _GAP_Y)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height_px}" role="img" '
        'aria-label="The folders of Milepost and what they import">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    for name, wanted in sorted(graph.items()):
        for other in sorted(wanted):
            if any(other in reachable(graph, between) for between in wanted - {other}):
                continue
            (x1, y1), (x2, y2) = place[name], place[other]
            start, end = y1 + _BOX_HEIGHT, y2
            middle = (start + end) / 2
            a, b = x1 + _BOX_WIDTH / 2, x2 + _BOX_WIDTH / 2
            out.append(
                f'<path class="arrow" marker-end="url(#head)" d="M{a:g} {start:g} C{a:g} {middle:g} {b:g} {middle:g} '
                f'{b:g} {end:g}"/>'
            )
    for name, (x, y) in sorted(place.items()):
        out.append(f'<rect class="box" x="{x:g}" y="{y:g}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6"/>')
        out.append(f'<text class="name" x="{x + _BOX_WIDTH / 2:g}" y="{y + 22:g}">{name}</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--against", metavar="REV", help="print the figures of this revision beside them")
    args = parser.parse_args()
    now = figures(args.checkout)
    before: dict[str, object] = {}
    if args.against:
        with tempfile.TemporaryDirectory() as folder:
            archive = ["git", "-C", str(args.checkout), "archive", args.against, "src", "tests"]
            data = subprocess.run(archive, check=True, capture_output=True, timeout=60).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=data, check=True, timeout=60)
            before = figures(Path(folder))
    for name in dict.fromkeys([*now, *before]):
        old = f"{show(before.get(name, '-'))}  ->  " if args.against else ""
        print(f"{name}: {old}{show(now.get(name, '-'))}")


if __name__ == "__main__":
    main()
