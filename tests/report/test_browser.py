"""The report in a real browser: Debian's Chromium, headless, and the accessibility rules of axe-core.

``make test-browser`` installs axe-core (from npm, for this test alone) and says how to get the browser. Without a
browser these tests are skipped; ``test_report.py`` checks the same HTML by a parser.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milepost.cli.main import main
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(os.environ.get("MILEPOST_AXE", "build/axe/node_modules/axe-core/axe.min.js"))
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    arrays = {f"layers.{i}.wq.weight": rng.standard_normal((64, 32)).astype("float32") for i in range(12)}
    arrays["<script>alert(1)</script>"] = np.ones((3, 4), "float32")
    for step in (20, 40, 60):
        arrays = {key: array * np.float32(1 + 0.01 * (i + 1)) for i, (key, array) in enumerate(arrays.items())}
        save_arrays(LocalStorage(folder), f"checkpoint/step-{step}", arrays, step=step, kind="full", num_ranks=2)
    event = '{"step": %d, "world_size": 2, "reason": "interval", "kind": "full", "finished": 1.7e9, "nbytes": 1000000,'
    event += ' "stall_s": 0.1, "stage_s": 0.2, "write_s": 0.3, "commit_s": 0.1}\n'
    (folder / "checkpoint" / "events.jsonl").write_text(
        "".join(event % step for step in (20, 40))
        + '{"event": "failed", "step": 60, "finished": 1.7e9, "error": "rank 1: no space left"}\n'
        + '{"event": "resumed", "step": 40, "finished": 1.7e9, "world_size": 4}\n'
        + event % 60
    )
    assert main(["report", str(folder), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, page_path: Path) -> Iterator[Any]:
    """The page, with every request and every line on the console noted."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, bypass_csp=True)
    page.requests, page.complaints = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: page.complaints.append(f"dialog {dialog.message}"))
    page.goto(page_path.as_uri())
    yield page
    page.close()


def test_the_page_opens_without_errors_and_asks_for_nothing_but_itself(browser: Any, page_path: Path) -> None:
    page = browser.new_page()  # with its Content-Security-Policy in force: a violation is on the console
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(page_path.as_uri())
    page.click("#step-table th button")
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [page_path.as_uri()]
    page.close()


def test_pictures_are_drawn_where_they_should_be(opened: Any) -> None:
    least_of = {".bars": 2, ".histogram": 12, ".shards": 1, ".line": 2, "#heat-layers td": 12, ".timeline": 1}
    least_of |= {".timeline circle": 3, "#event-table td": 12}
    for selector, least in least_of.items():
        boxes = [box for element in opened.query_selector_all(selector) if (box := element.bounding_box())]
        assert len(boxes) >= least, selector
        assert all(box["width"] > 6 and box["height"] > 6 for box in boxes), selector
    shades = {
        cell.evaluate("e => getComputedStyle(e).backgroundColor")
        for cell in opened.query_selector_all("#heat-layers td")
    }
    assert len(shades) > 3  # layers changed by different amounts
    assert opened.complaints == []


def test_columns_sort_and_tables_search(opened: Any) -> None:
    def column(index: int) -> list[str]:
        rows = opened.query_selector_all("#model-table tbody tr")
        return [row.query_selector_all("td")[index].inner_text() for row in rows if row.is_visible()]

    change = opened.query_selector_all("#model-table th button")[7]
    change.click()
    rising = [float(text.rstrip("%")) for text in column(7) if text != "-"]
    assert rising == sorted(rising)
    change.click()
    assert [float(text.rstrip("%")) for text in column(7) if text != "-"] == rising[::-1]
    opened.fill("input[data-table=model-table]", "layers.3 wq")
    assert column(0) == ["layers.3.wq.weight"]
    assert opened.inner_text("#model-table-count") == "1 of 13 rows"


def test_it_works_by_keyboard_and_on_a_narrow_screen(opened: Any) -> None:
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    opened.focus("#step-table th button")
    opened.keyboard.press("Enter")
    assert opened.get_attribute("#step-table th", "aria-sort") == "ascending"
    opened.set_viewport_size({"width": 360, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


def violations(page: Any, scheme: str) -> list[tuple[str, str, str]]:
    """Rules of axe-core that the page breaks."""
    if not AXE.exists():
        pytest.skip(f"axe-core is not at {AXE}: make test-browser installs it")
    page.emulate_media(color_scheme=scheme)
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run().then(result => result.violations)")
    return [(v["id"], v["help"], v["nodes"][0]["html"][:200]) for v in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_accessibility_rules_hold(opened: Any, scheme: str) -> None:
    assert violations(opened, scheme) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_comparison_opens_and_is_accessible(browser: Any, page_path: Path, scheme: str) -> None:
    target = page_path.parent / "diff.html"
    steps = [str(page_path.parent / "checkpoint" / f"step-{step}") for step in (20, 60)]
    assert main(["diff", *steps, "--html", str(target)]) == 9
    page = browser.new_page(viewport={"width": 400, "height": 800}, bypass_csp=True)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(target.as_uri())
    assert page.query_selector(".bars").bounding_box()["width"] > 100
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert violations(page, scheme) == []
    assert complaints == []
    page.close()
