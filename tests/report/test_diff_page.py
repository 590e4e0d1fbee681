"""The page of ``milepost diff --html`` and the scalars of ``milepost report --tensorboard``."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_report import EVIL, Page

from milepost.cli.main import main
from milepost.report.diff import diff
from milepost.report.diff_page import diff_page
from milepost.report.gather import gather
from milepost.report.tensorboard import scalars
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

RNG = np.random.default_rng(5)


@pytest.fixture
def run(memory_path: Path) -> Path:
    """Two steps: four layers that grow by 10 and 20 %, a hostile key, keys of one side, another shape."""
    arrays = {f"layers.{i}.wq.weight": RNG.standard_normal((16, 8)).astype("float32") for i in range(4)}
    arrays |= {EVIL: np.ones(3, "float32"), "norm.weight": np.ones(4, "float32"), "gone": np.ones(1, "float32")}
    storage = LocalStorage(memory_path)
    save_arrays(storage, "step-1", arrays, step=1, kind="full")
    grown = {key: array * np.float32(1.2 if key.startswith("layers.3") else 1.1) for key, array in arrays.items()}
    del grown["gone"]
    grown |= {"norm.weight": np.ones(5, "float32"), "new": np.ones(1, "float32")}
    save_arrays(storage, "step-2", grown, step=2, kind="full")
    return memory_path


def test_a_comparison_is_written_as_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = run / "diff.html"
    assert main(["diff", str(run / "step-1"), str(run / "step-2"), "--html", str(target)]) == 9
    assert "layers.3.wq.weight" in capsys.readouterr().out  # the table is printed as without it
    text = target.read_text()
    page = Page(text)
    seen = " ".join(page.texts)
    assert seen.count("20.000%") >= 1
    assert "10.00%" in seen  # the heat map
    assert "float32 [4]" in seen
    assert "Keys found on one side only" in seen
    assert "alert(1)</script>" not in text
    assert "\u202e" not in text
    assert all("style" not in attributes and "src" not in attributes for _, attributes in page.tags)


def test_a_comparison_without_differences_says_so(run: Path) -> None:
    target = run / "diff.html"
    assert main(["diff", str(run / "step-1"), str(run / "step-1"), "--html", str(target)]) == 0
    assert "No difference was found" in " ".join(Page(target.read_text()).texts)


def test_a_page_says_what_was_not_compared(memory_path: Path) -> None:
    """Stock DCP stores no digests: without reading values nothing is known of them."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        dcp.save({"w": torch.full((4,), value)}, checkpoint_id=str(memory_path / name), no_dist=True)
    seen = Page(diff_page(diff(memory_path / "a", memory_path / "b"), now=0.0))
    assert "No difference was found; the values of 1 key were not compared" in " ".join(seen.texts)
    assert not any(attributes.get("class") == "good" for _, attributes in seen.tags)


def test_what_is_within_a_tolerance_is_counted_once(memory_path: Path) -> None:
    storage = LocalStorage(memory_path)
    for name, value in (("a", 1.0), ("b", 1.0 + 1e-6)):
        save_arrays(storage, name, {"x": np.full(3, value, "float32"), "y": np.ones(3, "float32")}, step=1)
    report = diff(memory_path / "a", memory_path / "b", values=True).within(1e-3)
    texts = Page(diff_page(report, now=0.0)).texts
    assert texts[texts.index("2") - 1].strip() == "the same"


def test_layer_norms_and_changes_are_scalars(run: Path) -> None:
    first, last = gather(str(run)).read
    before, after = dict(scalars(first)), dict(scalars(last))
    assert not any(name.startswith("change/") for name in before)
    for layer, growth in ((0, 0.1), (3, 0.2)):
        assert math.isclose(after[f"change/layers.{layer}"], growth, rel_tol=1e-5)
        assert math.isclose(after[f"norm/layers.{layer}"], before[f"norm/layers.{layer}"] * (1 + growth), rel_tol=1e-5)


def test_scalars_are_written_for_tensorboard(run: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    assert main(["report", str(run), "-o", str(run / "r.html"), "--tensorboard", str(run / "tb")]) == 0
    (file,) = (run / "tb").iterdir()
    found = {
        (event.step, value.tag): value.tensor.float_val[0] if value.tensor.float_val else value.simple_value
        for event in loader.LegacyEventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert math.isclose(found[2, "change/layers.3"], 0.2, rel_tol=1e-4)
    assert (1, "norm/layers.0") in found
