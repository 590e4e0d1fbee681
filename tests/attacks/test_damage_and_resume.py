"""Hundreds of damaged copies of a run's newest step: each is reported, no damaged byte is loaded, and a resume starts
from the newest intact step on all ranks together, or reports why it can't.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from damages import Damage, damages, same_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import milepost
from milepost import CheckpointConfig, CheckpointManager
from milepost.errors import CheckpointDamagedError, CheckpointNotFoundError, MilepostError
from milepost.format.manifest import DIGESTS_NAME, MANIFEST_NAME, METADATA_NAME, SHARDS_NAME, Manifest
from milepost.run import catalog, checkpoint_record, retention
from milepost.storage import LocalStorage
from milepost.testing.world import run_world
from milepost.verification.verify import VerifyReport, verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")

Tally = Callable[..., None]

SEED = 1_913
STEPS = (1, 2, 3)
NEWEST = STEPS[-1]


# ---- a run of two ranks ----


class Progress:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def progress_at(step: int) -> dict[str, Any]:
    return {"step": step, "text": f"after step {step}", "history": [step, 0.5, None], "raw": bytes([step] * 300)}


class Run:
    """A sharded model with its optimizer, and managers over them; what it holds follows from the step alone."""

    def __init__(self, folder: Path):
        torch.manual_seed(1)
        self.model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise((24, 33, 40, 7))])
        fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.model(torch.ones(2, 24)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress = Progress()
        self.folder = folder

    def tensors(self) -> list[torch.Tensor]:
        found = [p.detach() for p in self.model.parameters()]
        for state in self.optimizer.state.values():
            found += [state["exp_avg"], state["exp_avg_sq"]]
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in found]

    def become(self, step: int) -> None:
        """The state after ``step``; 0 is like none that was saved."""
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        for tensor in self.tensors():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
        self.progress.state = progress_at(step)

    def is_at(self, step: int) -> bool:
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        same = all(torch.equal(tensor, torch.rand(tensor.shape, generator=generator)) for tensor in self.tensors())
        return same and self.progress.state == progress_at(step)

    @contextmanager
    def manager(self, **config: Any) -> Iterator[CheckpointManager]:
        options = CheckpointConfig(
            **{"enable": True, "interval": 1, "keep_latest_k": 0, "last_save_model_only": False, **config}
        )
        manager = CheckpointManager(
            self.folder, options, model=self.model, optimizer=self.optimizer, train_state=self.progress
        )
        try:
            yield manager
        finally:
            manager.close()


class Warnings(logging.Handler):
    """Collects Milepost's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("milepost").addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("milepost").removeHandler(self)


def save_run(folder: Path) -> None:
    run = Run(folder)
    with run.manager() as manager:
        for step in STEPS:
            run.become(step)
            manager.save(step)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with undamaged steps, saved by two ranks."""
    folder = tmp_path_factory.mktemp("damage") / "intact"
    run_world(save_run, 2, folder, timeout_s=60)
    assert [entry.state for entry in scan(folder)] == ["committed"] * len(STEPS)
    sizes = [[(file.name, file.stat().st_size) for file in sorted(step_of(folder, n).glob("__*"))] for n in STEPS]
    assert sizes[0] == sizes[1] == sizes[2], "files of two saves must have the same size, or swaps would be found by it"
    return folder


def step_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def scan(folder: Path) -> list[catalog.StepEntry]:
    return catalog.scan(LocalStorage(folder.parent), folder.name)


def restore(intact: Path, folder: Path) -> None:
    """Replace the run's folder by an undamaged copy."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(intact, folder)


# ---- verification ----


def check_named(damage: Damage, step: Path, intact: Path) -> VerifyReport | None:
    """``verify`` names every file that was changed, and the key where it is in a record. None: it is no checkpoint."""
    try:
        report = verify(step)
    except CheckpointNotFoundError:
        assert not {MANIFEST_NAME, METADATA_NAME} & {path.name for path in step.iterdir() if path.is_file()}
        return None
    assert not report.is_sound, f"{damage.what}: nothing was found"
    named = {problem.file for problem in report.problems}
    if {MANIFEST_NAME, SHARDS_NAME, DIGESTS_NAME} & set(damage.files):
        # The expected data is not known then.
        assert named & {*damage.files, MANIFEST_NAME}, (damage.what, report.problems)
        return report
    missing = set(damage.files) - named
    assert not missing, (damage.what, report.problems)
    for file in damage.files:
        keys = changed_keys(intact, step, file)
        reported = {problem.key for problem in report.problems if problem.file == file and problem.key is not None}
        assert reported == keys, (damage.what, keys ^ reported)
    return report


def changed_keys(intact: Path, step: Path, file: str) -> set[str]:
    """The keys in whose records a file differs from the undamaged one; what lies beyond its end is one problem."""
    before = (intact / file).read_bytes()
    if not (step / file).is_file() or (step / file).is_symlink() or file == METADATA_NAME:
        return set()
    after = (step / file).read_bytes()
    manifest = checkpoint_record.read_record(LocalStorage(intact.parent), intact.name).manifest
    return {
        key
        for key, start, stop in records(manifest, file)
        if before[start:stop] != after[start:stop] and start != stop <= len(after)
    }


def records(manifest: Manifest, file: str) -> Iterator[tuple[str, int, int]]:
    for key, tensor in manifest.tensors.items():
        for shard in tensor.shards:
            if shard.file == file:
                yield key, shard.record_offset, shard.record_offset + shard.record_nbytes
    for key, entry in manifest.objects.items():
        if entry.file == file:
            yield key, entry.record_offset, entry.record_offset + entry.record_nbytes


def whole_state(path: Path) -> dict[str, Any]:
    """All of a checkpoint, in one process. Raises as a load does."""
    manifest = checkpoint_record.read_manifest(LocalStorage(path.parent), path.name)
    into: dict[str, Any] = {
        key: torch.ones(tensor.shape, dtype=getattr(torch, tensor.dtype)) for key, tensor in manifest.tensors.items()
    }
    into |= dict.fromkeys(manifest.objects)
    milepost.load(path, into)
    return into


def test_every_damage_is_named_and_nothing_wrong_is_loaded(intact: Path, memory_path: Path, tally: Tally) -> None:
    expected = whole_state(step_of(intact, NEWEST))
    step = step_of(memory_path, NEWEST)
    tried = loaded = 0
    for damage in damages(step_of(intact, NEWEST), step_of(intact, NEWEST - 1), SEED, 300):
        shutil.copytree(step_of(intact, NEWEST), step)
        damage.apply(step)
        report = check_named(damage, step, step_of(intact, NEWEST))
        try:
            found = whole_state(step)
        except (CheckpointDamagedError, CheckpointNotFoundError):
            pass
        else:
            loaded += 1
            # Padding, DCP's own index: nothing that a load looks at. Or all of another step, in a folder of its own.
            is_other = report is not None and "is of step 2" in report.problems[0].message
            assert is_other or same_state(found, expected), f"{damage.what}: something wrong was loaded"
        shutil.rmtree(step)
        tried += 1
    assert 0 < loaded < tried / 3
    tally(
        "a file of a checkpoint damaged (bits, blocks, cuts, swaps, stale files): verify and load",
        tried=tried,
        lost=0,
        seed=SEED,
    )


# ---- resuming ----


@dataclass
class Seen:
    """The outcome of one damage on one rank."""

    what: str
    named: str
    """The outcome with ``load_step``: ``loaded``, or the error's class."""
    resumed: int | None
    again: int | None
    warnings: list[str]
    warnings_again: list[str]
    states: list[str]
    kept: list[int]


def resume_after(folder: Path, intact: Path, first: int, count: int) -> list[Seen]:
    """Damage the newest step, ask for it by number, resume, resume once more: ``count`` times."""
    run = Run(folder)
    seen = []
    chosen = list(damages(step_of(intact, NEWEST), step_of(intact, NEWEST - 1), SEED + 1, first + count))[first:]
    for damage in chosen:
        if dist.get_rank() == 0:
            restore(intact, folder)
            damage.apply(step_of(folder, NEWEST))
        dist.barrier()
        run.become(0)
        with run.manager(load_step=NEWEST) as manager:
            try:
                manager.load()
            except MilepostError as error:
                named = type(error).__name__
            else:
                assert run.is_at(NEWEST), f"{damage.what}: load_step gave another state"
                named = "loaded"
        assert dist.get_rank() or not (folder / f".damaged-step-{NEWEST}.json").exists()
        resumed, warnings = resume(run, damage)
        again, warnings_again = resume(run, damage)
        entries = scan(folder)
        decisions = retention.plan(entries, retention.Rules(keep_latest_k=1), now=0.0)
        seen.append(
            Seen(
                damage.what,
                named,
                resumed,
                again,
                warnings,
                warnings_again,
                [entry.state for entry in entries],
                [decision.step for decision in decisions if decision.keep],
            )
        )
        dist.barrier()
    return seen


def resume(run: Run, damage: Damage) -> tuple[int | None, list[str]]:
    run.become(0)
    with Warnings() as lines, run.manager() as manager:
        report = manager.load()
    assert report is not None
    assert report.resumed_step is not None
    assert run.is_at(report.resumed_step), f"{damage.what}: step {report.resumed_step} is not what was saved"
    return report.resumed_step, lines


def check_resumes(results: list[list[Seen]]) -> int:
    """All ranks saw the same; the damaged step was skipped, reported once, and does not count for retention."""
    fell_back = 0
    for first, *others in zip(*results, strict=True):
        for other in others:
            assert (other.named, other.resumed, other.again) == (first.named, first.resumed, first.again), first.what
            assert not other.warnings, f"{first.what}: one rank is to speak for all"
        assert first.again == first.resumed, first.what
        if first.resumed == NEWEST:
            assert first.named == "loaded"
            assert not first.warnings, first.what
            continue
        fell_back += 1
        assert first.resumed == NEWEST - 1, first.what
        assert first.named != "loaded", first.what
        for lines in (first.warnings, first.warnings_again):
            assert len(lines) == 1, (first.what, lines)
            assert f"step-{NEWEST}" in lines[0], (first.what, lines)
            assert "Falling back to an older step" in lines[0]
        assert first.states in (["committed", "committed", bad] for bad in ("damaged", "incomplete")), first.what
        assert first.kept == [NEWEST - 1, NEWEST], f"{first.what}: the intact one must stay, the bad one not count"
    return fell_back


def test_a_resume_passes_over_a_damaged_step_on_all_ranks(intact: Path, memory_path: Path, tally: Tally) -> None:
    count = 60
    results = run_world(resume_after, 2, memory_path / "run", intact, 0, count, timeout_s=200)
    fell_back = check_resumes(results)
    assert fell_back > count / 2
    tally("the newest step damaged, then resumed on 2 ranks, by number and without", tried=count, lost=0, seed=SEED + 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_resume_passes_over_a_damaged_step_on_all_ranks_many_times(
    intact: Path, memory_path: Path, tally: Tally
) -> None:
    results = run_world(resume_after, 2, memory_path / "run", intact, 60, 500, timeout_s=1100)
    assert check_resumes(results) > 250
    tally("the newest step damaged, then resumed on 2 ranks, by number and without", tried=500, lost=0, seed=SEED + 1)


def resume_with_a_stale_lineage(folder: Path, intact: Path) -> None:
    run = Run(folder)
    if dist.get_rank() == 0:
        restore(intact, folder)
        record = step_of(folder, NEWEST) / MANIFEST_NAME
        newest, older = (step_of(intact, step).joinpath(MANIFEST_NAME).read_bytes() for step in (NEWEST, NEWEST - 1))
        start, stop = newest.index(b'"lineage"'), newest.index(b"}", newest.index(b'"lineage"'))
        older_start = older.index(b'"lineage"')
        stale = newest[:start] + older[older_start : older_start + stop - start] + newest[stop:]
        assert len(stale) == len(newest)
        assert stale != newest
        record.write_bytes(stale)
    dist.barrier()
    with Warnings() as lines, run.manager() as manager:
        report = manager.load()
        assert report is not None
        assert report.resumed_step == NEWEST - 1
        if dist.get_rank() == 0:
            assert len(lines) == 1, lines
            assert f"step-{NEWEST} is damaged" in lines[0]
        run.become(NEWEST)
        manager.save(NEWEST)
    assert [entry.state for entry in scan(folder)] == ["committed"] * len(STEPS)


def test_a_record_with_the_lineage_of_the_save_before_is_reported(intact: Path, memory_path: Path) -> None:
    """A lost write leaves an old sector: the step then has the place of an older one in the order of commits."""
    run_world(resume_with_a_stale_lineage, 2, memory_path / "run", intact, timeout_s=60)


def go_on(folder: Path, intact: Path) -> None:
    """After a fallback the run saves the damaged step again: the mark does not apply to the new one."""
    run = Run(folder)
    if dist.get_rank() == 0:
        restore(intact, folder)
        content = bytearray((step_of(folder, NEWEST) / "__0_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (step_of(folder, NEWEST) / "__0_0.distcp").write_bytes(content)
    dist.barrier()
    with run.manager(keep_latest_k=2) as manager:
        report = manager.load()
        assert report is not None
        assert report.resumed_step == NEWEST - 1
        assert manager.latest_step == NEWEST - 1
        run.become(NEWEST)
        manager.save(NEWEST)
        assert manager.latest_step == NEWEST
    assert [entry.state for entry in scan(folder)] == ["committed"] * 2
    run.become(0)
    with Warnings() as lines, run.manager() as manager:
        manager.load()
    assert run.is_at(NEWEST)
    assert not lines


def test_a_step_that_is_saved_again_is_good_again(intact: Path, memory_path: Path) -> None:
    run_world(go_on, 2, memory_path / "run", intact, timeout_s=60)


def two_of_three(folder: Path, intact: Path) -> list[list[str]]:
    """The two newest steps are damaged, one visibly to a scan, one only to a read; then the last one too."""
    run = Run(folder)
    if dist.get_rank() == 0:
        restore(intact, folder)
        (step_of(folder, 3) / "__1_0.distcp").unlink()
        flip_data(step_of(folder, 2))
    dist.barrier()
    run.become(0)
    with Warnings() as lines, run.manager() as manager:
        report = manager.load()
    assert report is not None
    assert report.resumed_step == 1
    assert run.is_at(1)
    if dist.get_rank() == 0:
        flip_data(step_of(folder, 1))
    dist.barrier()
    run.become(0)
    for config in ({}, {"load_step": 1}, {}):  # again and again: never a fresh start
        with run.manager(**config) as manager, pytest.raises(CheckpointDamagedError) as caught:
            manager.load()
        assert "step" in caught.value.message
    assert "every step" in caught.value.message
    assert "refusing to start a new run" in caught.value.message
    return [lines, [entry.state for entry in scan(folder)]]


def flip_data(step: Path) -> None:
    """One flipped bit in the largest tensor of rank 1's file, detected by the rank that reads it."""
    manifest = checkpoint_record.read_manifest(LocalStorage(step.parent), step.name)
    shards = [shard for tensor in manifest.tensors.values() for shard in tensor.shards if shard.file == "__1_0.distcp"]
    largest = max(shards, key=lambda shard: shard.data_nbytes)
    content = bytearray((step / "__1_0.distcp").read_bytes())
    content[(largest.data_offset or 0) + largest.data_nbytes // 2] ^= 8
    (step / "__1_0.distcp").write_bytes(content)


def test_several_damaged_steps_are_each_reported_and_none_left_is_an_error(intact: Path, memory_path: Path) -> None:
    (lines, states), (others, _) = run_world(two_of_three, 2, memory_path / "run", intact, timeout_s=60)
    assert len(lines) == 2, lines
    assert "step-3" in lines[0]
    assert "__1_0.distcp: missing" in lines[0]
    assert "step-2" in lines[1]
    assert "digest mismatch in" in lines[1]
    assert "/step-2/__1_0.distcp" in lines[1]
    assert others == []
    assert states == ["damaged"] * 3


def test_a_folder_that_was_renamed_is_not_taken_for_another_step(intact: Path, memory_path: Path) -> None:
    """Complete and undamaged, but another step than its name: ``load_step = 9`` would resume from step 2."""
    folder = memory_path / "run"
    shutil.copytree(intact, folder)
    step_of(folder, 2).rename(step_of(folder, 9))
    entry = scan(folder)[-1]
    assert (entry.step, entry.state) == (9, "damaged")
    assert "is of step 2: the folder was renamed" in entry.reason
    assert not verify(step_of(folder, 9), "metadata").is_sound
    assert same_state(whole_state(step_of(folder, 9)), whole_state(step_of(intact, 2))), "by its path it can be loaded"
