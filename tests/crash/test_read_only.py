"""A file system that is mounted read-only, before or under a run: saves fail with the reason, reads succeed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mounts import remount, small
from two_ranks import Outcome, PairComm, run_pair

from milepost import CheckpointConfig, CheckpointManager, MilepostError
from milepost.cli.main import main
from milepost.collective.comm import SingleProcess
from milepost.run import catalog
from milepost.storage import LocalStorage

Tally = Callable[..., None]

MODES = ("disabled", "async", "async_with_pinned_mem")
ADVICE = "mount it writable, or write elsewhere"


class Run:
    """A manager over a model of which all weights have one value."""

    def __init__(self, folder: Path, comm: PairComm | SingleProcess, value: float, **options: Any):
        self._model = torch.nn.Linear(64, 64)
        for parameter in self._model.parameters():
            torch.nn.init.constant_(parameter, value)
        config = CheckpointConfig(enable=True, interval=1, keep_latest_k=2, last_save_model_only=False, **options)
        self.manager = CheckpointManager(folder / "run", config, model=self._model, comm=comm)

    def load(self) -> tuple[int | None, set[float]]:
        """The step that is resumed from, and what the weights then are."""
        report = self.manager.load()
        assert report is not None
        return report.resumed_step, {float(v) for p in self._model.parameters() for v in p.detach().flatten()}


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(MilepostError) as caught:
        act()
    return caught.value.message


def on_both(act: Callable[[PairComm], Any]) -> list[Any]:
    outcomes = run_pair(act)
    for outcome in outcomes:
        assert outcome == Outcome(result=outcome.result), outcome
    return [outcome.result for outcome in outcomes]


@pytest.mark.parametrize("mode", MODES)
def test_remounted_read_only_under_a_run(tmp_path: Path, mode: str, tally: Tally) -> None:
    with small("tmpfs", tmp_path / "small") as folder:

        def turn(comm: PairComm, how: str) -> None:
            comm.barrier()
            if comm.rank == 0:
                remount(folder, how)
            comm.barrier()

        def act(comm: PairComm) -> str:
            run = Run(folder, comm, 1.0, async_mode=mode)
            for step in (1, 2):
                run.manager.save(step)
                run.manager.maybe_wait_for_staging()
            if mode != "disabled":
                run.manager.pending.committed(60)  # type: ignore[union-attr]
            turn(comm, "ro")
            message = refusal(lambda: run.manager.save(3))
            assert run.load() == (2, {1.0})
            turn(comm, "rw")
            assert run.manager.save(4)
            run.manager.close()
            return message

        messages = on_both(act)
        shown = [(entry.step, entry.state) for entry in catalog.scan(LocalStorage(folder), "run")]
        left = {path.name for path in (folder / "run").iterdir()}
    assert messages[0] == messages[1]
    assert re.search(
        rf"read-only file system while creating the folder \S*/run/\.milepost-attempt-\S+; {ADVICE}", messages[0]
    )
    assert shown == [(2, "committed"), (4, "committed")]
    assert left == {"step-2", "step-4", "events.jsonl"}
    tally(f"a file system that turns read-only between saves ({mode}), on 2 ranks", tried=1, lost=0)


def test_what_works_on_a_read_only_file_system(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    with small("tmpfs", tmp_path / "small") as folder:
        run_folder = folder / "run"
        for step in (1, 2):
            run = Run(folder, SingleProcess(), float(step))
            run.manager.save(step)
            run.manager.close()
        remount(folder, "ro")

        def read(comm: PairComm) -> tuple[int | None, set[float]]:
            run = Run(folder, comm, 0.0, load_only=True)
            found = run.load()
            assert not run.manager.save(3)
            run.manager.close()
            return found

        assert on_both(read) == [(2, {2.0})] * 2
        refused = on_both(lambda comm: refusal(lambda: Run(folder, comm, 0.0)))
        assert refused[0] == refused[1]
        assert refused[0].startswith("read-only file system while creating ")
        assert refused[0].endswith(ADVICE)

        capsys.readouterr()
        assert main(["ls", str(run_folder), "--json"]) == 0
        assert [found["step"] for found in json.loads(capsys.readouterr().out)] == [1, 2]
        assert main(["inspect", str(run_folder / "step-2")]) == 0
        assert main(["verify", str(run_folder)]) == 0
        assert main(["prune", str(run_folder), "--keep-latest", "1", "--dry-run"]) == 0
        assert main(["prune", str(run_folder), "--keep-latest", "1"]) == 7
        said = capsys.readouterr().err
        refusal_to_delete = r"read-only file system while creating the folder \S*/run/\.milepost-deleting-"
        assert re.search(rf"^milepost: error: {refusal_to_delete}\S+; {ADVICE}$", said, re.M)
        assert main(["pin", str(run_folder / "step-1")]) == 7
        assert ADVICE in capsys.readouterr().err

        remount(folder, "rw")
        with (run_folder / "step-2" / "__0_0.distcp").open("r+b") as file:
            file.seek(6000)
            file.write(b"damage")
        remount(folder, "ro")
        assert on_both(read) == [(1, {1.0})] * 2  # no mark can be written, and none is needed
        assert main(["verify", str(run_folder)]) == 5
    tally("reading, listing, verifying on a file system that is mounted read-only", tried=4, lost=0)
