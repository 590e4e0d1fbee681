"""The command line as users see it: output, exit status, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from milepost.cli.main import COMMANDS, main
from milepost.run import catalog, checkpoint_record, marks, sweep
from milepost.run.step_names import DELETING_PREFIX
from milepost.storage import LocalStorage
from milepost.storage.base import format_nbytes
from milepost.testing.sample import save_arrays

NOW = 1_700_000_000.0


@pytest.fixture
def run(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    """A run with a step of each kind, in the working directory."""
    monkeypatch.chdir(memory_path)
    monkeypatch.setattr(time, "time", lambda: NOW)
    storage = LocalStorage(memory_path)
    arrays = {"w": np.arange(3000, dtype="float32"), "b": np.zeros(10, "int8")}
    for step, kind in ((100, "full"), (200, "full"), (300, "full"), (400, "model")):
        save_arrays(
            storage, f"run/step-{step}", arrays, kind=kind, num_ranks=2, now=NOW - 3600 * (500 - step) / 100, step=step
        )
    marks.pin(storage, "run", 100)
    return storage


def size_of(storage: LocalStorage, step: int) -> str:
    return format_nbytes(sum(entry.nbytes for entry in storage.list(f"run/step-{step}")))


def spoil(storage: LocalStorage, path: str, offset: int) -> None:
    with Path(storage.root, path).open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 1]))


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ---- ls ----


def test_ls_shows_each_step_with_its_state(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    run.remove("run/step-200/milepost.json")
    run.remove("run/step-200/milepost.digests")
    run.remove("run/step-200/milepost.shards")
    run.remove("run/step-300/__0_0.distcp")
    run.make_folder("run/step-500")
    os.utime(f"{run.root}/run/step-200/.metadata", (NOW - 90, NOW - 90))
    sizes = {step: size_of(run, step).rjust(8) for step in (100, 200, 300, 400)}
    status, out, err = output(capsys, "ls", "run")
    assert (status, err) == (0, "")
    assert out == (
        "STEP  STATE       HOLDS         AGE      SIZE  PARAMS  DTYPE    LAYOUT   NOTES\n"
        f" 100  committed   full          4 h  {sizes[100]}  3.01 K  float32  2 ranks  pinned\n"
        f" 200  external    model  1 min 30 s  {sizes[200]}  3.01 K  float32  -\n"
        f" 300  damaged     full          2 h  {sizes[300]}  3.01 K  float32  2 ranks  __0_0.distcp: missing\n"
        f" 400  committed   model         1 h  {sizes[400]}  3.01 K  float32  2 ranks\n"
        " 500  incomplete  -               -   0 bytes       -  -        -        it was never committed: neither "
        "milepost.json nor .metadata is there\n"
    )


def test_ls_finds_the_checkpoints_from_the_dump_folder_and_from_inside(
    run: LocalStorage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = output(capsys, "ls", "run")[1]
    run.make_folder("outputs")
    run.rename("run", "outputs/checkpoint")
    assert output(capsys, "ls", "outputs")[1] == expected
    monkeypatch.chdir(f"{run.root}/outputs/checkpoint")
    assert output(capsys, "ls")[1] == expected


def test_ls_speaks_json(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = output(capsys, "ls", "run", "--json")
    assert status == 0
    listed = json.loads(out)
    assert [(e["step"], e["state"], e["kind"], e["pinned"], e["world_size"]) for e in listed] == [
        (100, "committed", "full", True, 2),
        (200, "committed", "full", False, 2),
        (300, "committed", "full", False, 2),
        (400, "committed", "model", False, 2),
    ]
    assert listed[0]["created_s"] == NOW - 4 * 3600


def test_ls_of_a_folder_without_steps_says_where_it_looked(
    run: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = output(capsys, "ls", "nowhere")
    assert (status, out) == (3, "")
    assert err == "milepost: error: nowhere does not exist\n"
    Path("empty").mkdir()
    status, out, err = output(capsys, "ls", "empty")
    assert (status, out) == (3, "")
    assert err == "milepost: error: empty holds no step-<N> folder, and neither does empty/checkpoint\n"


# ---- verify ----


def test_verify_of_an_undamaged_checkpoint(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = output(capsys, "verify", "run/step-200")
    assert status == 0
    size = size_of(run, 200)
    assert out.startswith(f"{run.root}/run/step-200: OK (level full, 4 items, {size} read in ")


def test_verify_of_a_damaged_one_names_file_range_and_key(
    run: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    (_, shard) = checkpoint_record.read_manifest(run, "run/step-200").tensors["w"].shards
    assert shard.data_offset is not None
    spoil(run, "run/step-200/__1_0.distcp", shard.data_offset + 1000)
    status, out, _ = output(capsys, "verify", "run/step-200")
    assert status == 5
    first, second = out.splitlines()
    assert first.startswith(f"{run.root}/run/step-200: damaged: 1 problem (level full, 4 items")
    where = f"{shard.data_offset}-{shard.data_offset + 6000}"
    assert second == f"  __1_0.distcp bytes {where} (w): data changed after it was written"


def test_verify_of_a_run_checks_every_step(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(run, "run/step-300/.metadata", 100)
    status, out, _ = output(capsys, "verify", "run", "--level", "metadata", "--json")
    assert status == 5
    result = json.loads(out)
    assert result["sound"] is False
    assert [(r["path"].rpartition("/")[2], r["sound"]) for r in result["checkpoints"]] == [
        ("step-100", True),
        ("step-200", True),
        ("step-300", False),
        ("step-400", True),
    ]
    (problem,) = result["checkpoints"][2]["problems"]
    assert (problem["file"], problem["key"]) == (".metadata", None)


def test_verify_of_nothing(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = output(capsys, "verify", "run/step-999")
    assert (status, out) == (3, "")
    assert err == f"milepost: error: {run.root}/run/step-999 is not a checkpoint: there is no such folder\n"


def test_a_hostile_key_cannot_speak_to_the_terminal(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    save_arrays(run, "run/[red]step", {"w\x1b]0;owned\x07[bold]": np.ones(5, "float32")})
    spoil(run, "run/[red]step/__0_0.distcp", 0)
    status, out, _ = output(capsys, "verify", "run/[red]step")
    assert status == 5
    assert "\x1b" not in out
    assert "(w\\x1b]0;owned\\x07[bold])" in out
    assert "run/[red]step: damaged" in out


def test_verify_of_several_checkpoints(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell's pattern gives them: one that is missing or damaged does not hide the others."""
    paths = ["run/step-100", "run/nothing", "run/step-200"]
    status, out, err = output(capsys, "verify", *paths)
    assert status == 3
    assert [line.partition(" (")[0] for line in out.splitlines()] == [
        f"{run.root}/run/step-{step}: OK" for step in (100, 200)
    ]
    assert err.startswith("milepost: error: ")
    assert "run/nothing is not a checkpoint" in err
    Path("run/step-200/__0_0.distcp").write_bytes(b"cut")
    status, out, _ = output(capsys, "verify", *paths, "--json")
    found = json.loads(out)
    assert (status, found["verdict"], found["sound"]) == (5, "damaged", False)
    assert [report["verdict"] for report in found["checkpoints"]] == ["ok", "damaged"]


def test_verify_with_no_threads_is_a_users_mistake(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "verify", "run", "--threads", "0") == (
        2,
        "",
        "milepost: error: --threads must be at least 1, not 0\n",
    )


@pytest.mark.parametrize("argv", [("verify",), ("inspect",), ("plan-resume", "--world-size", "2")], ids=lambda a: a[0])
def test_a_file_in_place_of_a_folder_is_reported_plainly(
    run: LocalStorage, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    status, out, err = output(capsys, *argv, "run/step-100/milepost.json")
    assert (status, out) == (3, "")
    assert "milepost.json is a file, n" in err


# ---- prune ----


def test_a_dry_run_says_exactly_what_prune_then_does(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    run.make_folder(f"run/{DELETING_PREFIX}{0:032x}/step-90")
    run.write(f"run/{DELETING_PREFIX}{0:032x}/{sweep.MARKER_NAME}", b"")
    run.make_folder("run/.deleting-2024")
    rules = ("prune", "run", "--keep-latest", "1")
    before = [entry.name for entry in run.list("run")]
    status, dry, _ = output(capsys, *rules, "--dry-run")
    assert status == 0
    size = size_of(run, 200)
    assert dry == (
        "STEP      SIZE  DECISION  REASON\n"
        f" 100  {size}  keep      it is pinned\n"
        f" 200  {size}  delete    no rule keeps it\n"
        f" 300  {size}  keep      it is the newest step to resume from\n"
        f" 400  {size}  keep      it is the newest committed step\n"
        f"would delete 1 step of 4, {size}; would remove 1 stale save attempt\n"
        "not removed, because not recognised as Milepost's: .deleting-2024\n"
    )
    assert [entry.name for entry in run.list("run")] == before
    status, wet, _ = output(capsys, *rules)
    assert status == 0
    assert wet.splitlines()[:-2] == dry.splitlines()[:-2]
    assert wet.splitlines()[-2:] == [
        f"deleted 1 step of 4, {size}; removed 1 stale save attempt",
        "not removed, because not recognised as Milepost's: .deleting-2024",
    ]
    run.remove_tree("run/.deleting-2024")
    assert [entry.name for entry in run.list("run")] == [".pinned-step-100", "step-100", "step-300", "step-400"]


def test_prune_by_multiples_and_age(run: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = output(capsys, "prune", "run", "--keep-latest", "1", "--keep-within", "3h", "--json")
    result = json.loads(out)
    assert [(s["step"], s["keep"]) for s in result["steps"]] == [(100, True), (200, True), (300, True), (400, True)]
    _, out, _ = output(capsys, "prune", "run", "--keep-latest", "1", "--keep-every", "150", "--json")
    result = json.loads(out)
    assert [(s["step"], s["keep"]) for s in result["steps"]] == [(100, True), (200, False), (300, True), (400, True)]
    assert result["freed_nbytes"] > 12_000


def test_prune_tells_all_that_is_wrong_with_its_options_at_once(
    run: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("prune", "run", "--keep-latest", "0", "--keep-every", "-1", "--keep-within", "2 days")
    status, out, err = output(capsys, *argv)
    assert (status, out) == (2, "")
    assert err == (
        "milepost: error: 3 problems:\n"
        "  - --keep-latest must be at least 1, not 0\n"
        "  - --keep-every must be 0 (disabled) or more, not -1\n"
        "  - --keep-within 2 days is not a time span: write 90min, 12h, 2d or 1w\n"
    )


# ---- the program as a whole ----


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples_and_exit_statuses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"milepost {command}" in out.partition("examples:")[2]
    assert "exit status:" in out


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal_but_for_its_examples(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main([command, "--help"])
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= width or line.startswith("  "), line


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, command in COMMANDS.items():
        assert name in out
        assert command.summary.split(":")[0] in out


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"], ["-h"]])
def test_the_program_alone_and_help_print_the_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: milepost [-h] [--version] COMMAND")


def test_help_of_a_command_can_be_asked_for_in_either_way(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for argv in (["help", "ls"], ["ls", "--help"]):
        with pytest.raises(SystemExit):
            main(argv)
        helps.append(capsys.readouterr().out)
    assert helps[0] == helps[1]


@pytest.mark.parametrize(
    "argv", [["no-such-command"], ["ls", "--no-such-option"], ["verify"], ["plan-resume", "x"], ["ls", "a", "b"]]
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: milepost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("lst run", "milepost: error: there is no command lst: did you mean ls?"),
        ("help verfy", "milepost: error: there is no command verfy: did you mean verify?"),
        ("xyzzy", "milepost: error: there is no command xyzzy: `milepost help` lists all"),
        ("ls run --jsn", "milepost ls: error: there is no option --jsn: did you mean --json?"),
        (
            "prune run --keep_latest=3",
            "milepost prune: error: there is no option --keep_latest: did you mean --keep-latest?",
        ),
        (
            "convert a b --too hf",
            "milepost convert: error: the following arguments are required: --to; there is no option --too: "
            "did you mean --to?",
        ),
    ],
)
def test_the_nearest_command_or_option_is_named(line: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == answer


@pytest.mark.parametrize(
    ("raised", "status", "answer"),
    [
        (
            ZeroDivisionError("by zero"),
            1,
            "unexpected error (a bug in Milepost): ZeroDivisionError: by zero; please report",
        ),
        (RecursionError("x" * 100_000), 5, "characters left out"),
        (MemoryError(), 7, "out of memory"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), 5, "\\ud800"),
    ],
)
def test_what_nobody_foresaw_is_no_traceback(
    raised: BaseException,
    status: int,
    answer: str,
    run: LocalStorage,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(catalog, "scan", fail)
    found = output(capsys, "ls", "run")
    assert found[:2] == (status, "")
    assert answer in found[2]
    assert len(found[2].splitlines()) == 1
    assert len(found[2]) < 10_000


def test_an_address_that_is_not_supported_is_a_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = output(capsys, "verify", "ftp://bucket/run")
    assert status == 2
    assert "ftp://" in err


def test_ctrl_c_exits_with_130(
    run: LocalStorage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "scan", interrupted)
    assert output(capsys, "ls", "run") == (130, "", "milepost: interrupted\n")


def test_a_reader_that_goes_away_is_no_crash(run: LocalStorage) -> None:
    """``milepost ls | head -0``."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "milepost.cli.main", "ls", "run"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_knows_only_ascii_gets_ascii(run: LocalStorage, encoding: dict[str, str]) -> None:
    save_arrays(run, "run/step-600", {"größe": np.ones((4, 4), "float32")}, num_ranks=2, now=NOW)
    done = subprocess.run(
        [sys.executable, "-m", "milepost", "inspect", "run/step-600", "--tensors", "*", "--shards"],
        capture_output=True,
        timeout=60,
        env={**os.environ, **encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode("ascii")
    assert "gr\\xf6\\xdfe" in out
    assert "## __1_0" in out


def test_a_full_disk_behind_the_output_is_reported_without_a_traceback(run: LocalStorage) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "milepost", "ls", "run"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (7, "milepost: error: No space left on device\n")


def test_a_command_without_an_output_runs_all_the_same(run: LocalStorage) -> None:
    """As ``milepost pin run/step-200 >&-``."""
    command = f"{sys.executable} -m milepost pin run/step-200 >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert {entry.step for entry in catalog.scan(run, "run") if entry.pinned} == {100, 200}


def test_output_that_is_not_for_a_terminal_has_no_colours_and_whole_lines(run: LocalStorage) -> None:
    long = run.root + "/" + "x" * 150
    os.rename(f"{run.root}/run", long)
    done = subprocess.run(
        [sys.executable, "-m", "milepost.cli.main", "verify", f"{long}/step-200"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "40"},
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 1
