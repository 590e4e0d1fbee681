"""The report of a run: one page, for runs in any state."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import milepost
from milepost.cli.main import main
from milepost.cli.render import write_page
from milepost.errors import StorageError
from milepost.report.gather import gather
from milepost.report.profile import every_nth_run
from milepost.storage import LocalStorage
from milepost.testing.sample import Array, save_arrays

EVIL = "</script><script>alert(1)</script>\"'\n\u202e\x1b[31m" + "k" * 10_000
RNG = np.random.default_rng(3)


class Page(HTMLParser):
    """Parses the page, and holds on to its tags; unclosed or crossed ones are errors."""

    VOID = ("meta", "link", "br", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def run(memory_path: Path) -> Path:
    """Three steps by two ranks whose weights move, the last with faults, and a log."""
    storage = LocalStorage(memory_path)
    arrays = {f"layers.{i}.wq.weight": RNG.standard_normal((64, 32)).astype("float32") for i in range(11)}
    arrays[EVIL] = np.ones((3, 4), "float32")
    for step in (20, 40, 60):
        for key in arrays:
            arrays[key] = arrays[key] * np.float32(1.1)
        if step == 60:
            arrays["layers.3.wq.weight"][5] = 0
            arrays["layers.4.wq.weight"][0, 0] = np.nan
        moments = {f"optimizer.state.{key}.exp_avg": array / 2 for key, array in arrays.items() if key != EVIL}
        save_arrays(storage, f"checkpoint/step-{step}", {**arrays, **moments}, step=step, kind="full", num_ranks=2)
    event = {"step": 20, "reason": EVIL, "kind": "full", "finished": 1.7e9, "nbytes": 10**6}
    seconds = dict.fromkeys(("stall_s", "stage_s", "write_s", "commit_s"), 0.25)
    lines = [{**event, **seconds}, {"event": "another program's"}, {**event, **seconds, "nbytes": "many"}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"torn'
    (memory_path / "checkpoint" / "events.jsonl").write_text(text)
    return memory_path


def written(run: Path, *options: str, status: int = 0) -> str:
    target = run / "report.html"
    assert main(["report", str(run), "-o", str(target), *options]) == status
    return target.read_text()


def test_the_report_shows_changes_flags_and_shards_of_a_run(run: Path) -> None:
    text = written(run)
    page = Page(text)
    seen = " ".join(page.texts)
    assert "3 of 3 steps" in seen  # verified
    assert "1 dead row" in seen
    assert "1 NaN" in seen
    assert seen.count("10.00%") >= 10  # each layer grew by a tenth, by the norm
    assert "__1_0" in seen
    assert f"milepost diff {run}/checkpoint/step-40 {run}/checkpoint/step-60" in seen


def test_the_time_line_shows_failures_resumes_changes_of_layout_and_deletions(run: Path) -> None:
    log = run / "checkpoint" / "events.jsonl"
    save = {"reason": "interval", "kind": "full", "nbytes": 10**6, "stall_s": 0.1, "stage_s": 0, "write_s": 1}
    save["commit_s"] = 0
    ranks = {"world_size": 2, "layout": {"fsdp": 2}}
    more = {"world_size": 4, "layout": {"fsdp": 2, "tp": 2}}
    lines = [
        {"step": 10, "finished": 1.7e9, **save, **ranks},
        {"step": 20, "finished": 1.7e9 + 60, "deleted": ["step-10", 7, "another"], **save, **ranks},
        {"event": "failed", "step": 30, "finished": 1.7e9 + 90, "error": f"rank 1: no space left {EVIL}", **ranks},
        {"event": "resumed", "step": 20, "finished": 1.7e9 + 120, **more},
        {"event": "resumed", "step": [], "finished": 1e300},
        {"event": "of a newer Milepost", "step": 3, "finished": 1.7e9},
        {"step": 40, "finished": 1.7e9 + 180, "world_size": "many", "layout": 3, **save},
    ]
    log.write_text("\n".join(map(json.dumps, lines)))
    moments = gather(str(run), weights=False).moments
    assert [(moment.kind, moment.step) for moment in moments] == [
        ("saved", 10), ("saved", 20), ("deleted", 10), ("failed", 30), ("layout changed", 20), ("resumed", 20),
        ("saved", 40),
    ]  # fmt: skip
    page = Page(written(run, "--steps", "0"))
    seen = " ".join(page.texts)
    assert "no longer there: 1" in seen
    assert "rank 1: no space left" in seen
    assert re.search("from 2 ranks.* to 4 ranks", seen)
    assert [a["class"] for tag, a in page.tags if tag == "svg" and a.get("class") == "timeline"] == ["timeline"]


def test_the_page_fetches_nothing_and_runs_only_its_own_script(run: Path) -> None:
    page = Page(written(run))
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "img", "object", "embed"), tag
        assert not {"src", "style"} & attributes.keys(), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert tag not in ("a", "link") or str(attributes["href"]).startswith(("#", "data:,")), attributes
    assert [tag for tag, _ in page.tags].count("script") == 1
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")


def test_a_hostile_key_is_shown_cut_and_does_nothing(run: Path) -> None:
    text = written(run)
    assert "alert(1)</script>" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert "k" * 400 not in text
    assert r"\u202e" in text


def test_a_damaged_step_is_shown_as_such_and_hides_no_other(run: Path) -> None:
    for name in ("__0_0.distcp", "__1_0.distcp"):
        path = run / "checkpoint" / "step-40" / name
        data = bytearray(path.read_bytes())
        data[3000] ^= 1
        path.write_bytes(data)
    (run / "checkpoint" / "step-20" / "__0_0.distcp").unlink()
    view = gather(str(run))
    checks = {step.entry.step: step.check for step in view.steps}
    assert checks[60] == "verified"
    assert re.search("digest|CRC", checks[40])
    assert "__0_0.distcp" in checks[20]
    assert "1 of 3 steps" in " ".join(Page(written(run, status=5)).texts)


def test_a_step_is_called_verified_only_if_every_byte_of_it_is(memory_path: Path) -> None:
    """Values, headers, padding and metadata too: flips in those passed for verified."""
    milepost.save(memory_path / "checkpoint/step-1", {"w": torch.ones(64), "step": 7, "name": "run"})
    assert [step.check for step in gather(str(memory_path)).steps] == ["verified"]
    for name in (".metadata", "__0_0.distcp"):
        path = memory_path / "checkpoint/step-1" / name
        data = path.read_bytes()
        for offset in range(0, len(data), len(data) // 11):
            path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
            (step,) = gather(str(memory_path)).steps
            assert (step.check != "verified", step.is_bad) == (True, True), (name, offset)
        path.write_bytes(data)


def test_a_step_that_only_seems_to_verify_is_counted(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    milepost.save(memory_path / "checkpoint/step-1", {"w": torch.ones(64), "step": 7})
    path = memory_path / "checkpoint/step-1/.metadata"
    path.write_bytes(path.read_bytes()[:-2] + b"xx")
    written(memory_path, status=5)
    assert "1 step; 1 is damaged (see the page)" in capsys.readouterr().out


def test_without_weights_only_metadata_is_read(run: Path) -> None:
    text = written(run, "--steps", "0")
    assert "Change since" not in text
    assert "not read" in text


def test_one_step_has_a_report_of_its_own(run: Path) -> None:
    target = run / "one.html"
    assert main(["report", str(run / "checkpoint" / "step-60"), "-o", str(target)]) == 0
    assert "1 of 1 steps" in " ".join(Page(target.read_text()).texts)


def test_nothing_there_is_said(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(memory_path), "-o", str(memory_path / "r.html")]) == 3
    assert "is neither a run nor a step" in capsys.readouterr().err
    assert not (memory_path / "r.html").exists()


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000, 12_345])
@pytest.mark.parametrize("stride", [1, 2, 7])
def test_a_sample_is_every_nth_run_of_elements(numel: int, stride: int) -> None:
    flat = np.arange(numel)
    taken = every_nth_run(flat, stride)
    assert np.array_equal(taken, flat[flat // 64 % stride == 0])


@pytest.mark.parametrize(
    "array",
    [
        np.nextafter(np.ones(64, "float32"), np.float32(2)) * (np.arange(64) % 2 == 0) + (np.arange(64) % 2 == 1),
        np.array([1.0, np.nextafter(1.0, 2.0)]),
        np.array([2**63 + 5, 3], "uint64"),
        np.array([2**62 + 1, 2**62, -(2**63)]),
        np.array([2**62 + 2048, 2**62]),
        np.array([-1e308, 1e308]),
        np.array([5e-324, 0.0]),
    ],
    ids=["ulp32", "ulp64", "uint64", "int64", "narrow-int64", "widest", "subnormal"],
)  # fmt: skip
def test_a_tensor_of_hardly_any_or_of_the_largest_range_is_shown(memory_path: Path, array: Array) -> None:
    """A norm's weights after one small step: numpy has no 32 bins between 1 and the next number."""
    array = array.astype("float32") if array.dtype == "float64" and array.size == 64 else array
    save_arrays(LocalStorage(memory_path), "step-1", {"w": array}, step=1)
    (step,) = gather(str(memory_path)).steps
    histogram = step.profiles["w"].histogram
    assert step.check == "verified"
    assert sum(histogram) == (array.size if math.isfinite(float(array.max()) - float(array.min())) else 0)
    written(memory_path)


@pytest.mark.parametrize("command", [["report", "run", "-o"], ["diff", "a", "b", "--html"]], ids=["report", "diff"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(
    memory_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
):
    for target, reason in (("nowhere/page.html", "there is no folder"), (".", "is a folder")):
        with pytest.raises(SystemExit) as ended:
            main([*command, str(memory_path / target)])
        assert ended.value.code == 2
        assert reason in capsys.readouterr().err


def test_a_page_that_cannot_be_is_refused_before_any_work(
    run: Path, memory_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = run / "checkpoint" / "step-60" / "report.html"
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(run), "-o", str(inside)])
    assert "is inside the checkpoint" in capsys.readouterr().err
    assert not inside.exists()
    assert main(["report", str(run), "-o", str(memory_path / "r.html"), "--steps", "-1"]) == 2
    assert not (memory_path / "r.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = memory_path / "r.html"
    write_page(str(target), "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(StorageError, match=r"no space while writing .*r\.html; free some space, or write elsewhere"):
        write_page(str(target), "new")
    assert target.read_text() == "old"
    assert os.listdir(memory_path) == ["r.html"]
