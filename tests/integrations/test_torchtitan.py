"""torchtitan 0.3 with Milepost's checkpoint manager, on CPUs: killed, resumed, damaged, and to and from its own.

torchtitan needs packages that don't go with those of the other tests: it has an environment of its own, in which
``make test-integrations`` runs this file.
"""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan", reason="torchtitan is not installed here; make test-integrations has a place for it")

from titan_run import train

from milepost import CheckpointConfig, CheckpointManager, HfModel, StateMismatchError
from milepost.interop.names.model_sizes import model_args
from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.world import WorldError, run_world
from milepost.train.models import make_model

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def run(folder: Path, world_size: int = 1, *, allow_death: bool = False, **options: Any) -> list[dict[str, Any]]:
    return run_world(_run, world_size, str(folder), options, allow_death=allow_death)


def _run(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    return train(folder, **options)


def steps_in(folder: Path) -> dict[int, catalog.StepEntry]:
    return {entry.step: entry for entry in catalog.scan(LocalStorage(str(folder)), "checkpoint")}


def agree(resumed: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> int:
    """Assert that a run ended as the undisturbed one did, to the last bit; the first step that it has trained."""
    for again, whole in zip(resumed, undisturbed, strict=True):
        count = len(again["losses"])
        assert again["losses"] == whole["losses"][len(whole["losses"]) - count :]
        assert {**again, "losses": []} == {**whole, "losses": []}
    return resumed[0]["losses"][0][0]


@pytest.mark.parametrize(
    ("world_size", "tp", "mode"), [(1, 1, "async"), (2, 1, "disabled"), (4, 2, "async_with_pinned_mem")]
)
def test_a_killed_run_resumes_to_the_last_bit(tmp_path: Path, world_size: int, tp: int, mode: str) -> None:
    options = {"tp": tp, "async_mode": mode, "last_save_model_only": False, "steps": 8}
    undisturbed = run(tmp_path / "whole", world_size, **options)
    assert sorted(steps_in(tmp_path / "whole")) == [6, 8], "keep_latest_k = 2, after the last step too"
    for kill_at in (4, 7) if world_size == 1 else (7,):
        run(tmp_path / "killed", world_size, kill_at=kill_at, allow_death=True, **options)
    first = agree(run(tmp_path / "killed", world_size, **options), undisturbed)
    assert first > 1
    assert sorted(steps_in(tmp_path / "killed")) == sorted({first - 1, 6, 8}), "and what the run has resumed from"


def test_a_flipped_bit_is_passed_over(tmp_path: Path) -> None:
    options = {"last_save_model_only": False, "keep_latest_k": 0}
    undisturbed = run(tmp_path, steps=6, **options)
    for step in (4, 6):
        file = tmp_path / f"checkpoint/step-{step}/__0_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert agree(run(tmp_path, steps=6, **options), undisturbed) == 3


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_either_resumes_from_what_the_other_has_written(tmp_path: Path, world_size: int) -> None:
    options = {"last_save_model_only": False, "keep_latest_k": 0}
    undisturbed = run(tmp_path / "whole", world_size, steps=6, **options)
    assert agree(run(tmp_path / "stock", world_size, steps=6, stock=True, **options), undisturbed) == 1
    for first, second in ((True, False), (False, True)):
        folder = tmp_path / f"from-{first}"
        run(folder, world_size, steps=4, stock=first, **options)
        assert agree(run(folder, world_size, steps=6, stock=second, **options), undisturbed) == 5


def start_from_weights(folder: str) -> tuple[float, str]:
    """The loss of our model with torchtitan's weights of step 4, on its batch of step 5; and why it is not resumed."""
    sizes = model_args("llama3", "debugmodel", vocab_size=2048)
    known = HfModel(name="llama3", flavor="debugmodel", args=sizes)
    model = make_model("llama3", sizes, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"model": model, "optimizer": optimizer, "hf": known}
    config = CheckpointConfig(enable=True, initial_load_path=f"{folder}/checkpoint/step-4")
    with CheckpointManager(f"{folder}/ours", config, **options) as manager:
        assert manager.load() is not None
    batch = [torch.randint(0, 2048, (33,), generator=torch.Generator().manual_seed(seed)) for seed in (8, 9)]
    tokens = torch.stack(batch)
    logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).item()
    with CheckpointManager(f"{folder}/checkpoint", CheckpointConfig(enable=True), **options) as manager:
        try:
            manager.load()
        except StateMismatchError as error:
            return loss, str(error)
    return loss, ""


def test_our_trainer_starts_from_its_weights_under_its_names(tmp_path: Path) -> None:
    (titan,) = run(tmp_path, stock=True, steps=5, last_save_model_only=False)
    ((loss, refusal),) = run_world(start_from_weights, 1, str(tmp_path))
    assert loss == pytest.approx(titan["losses"][4][1], abs=2e-5)
    assert "initial_load_path" in refusal
    assert "milepost convert" in refusal


@pytest.mark.slow
def test_five_kills_while_a_step_is_written_lose_no_step(tmp_path: Path) -> None:
    options = {"async_mode": "async", "last_save_model_only": False, "steps": 12}
    undisturbed = run(tmp_path / "whole", **options)
    for kill_at in (3, 5, 7, 9, 11):  # right after the save of the step before was staged
        run(tmp_path / "killed", kill_at=kill_at, allow_death=True, **options)
    agree(run(tmp_path / "killed", **options), undisturbed)
    assert {6, 8, 10, 12} >= set(steps_in(tmp_path / "killed")) >= {10, 12}


def train_where_files_stay_small(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(folder, steps=4)


def test_a_save_that_finds_no_room_stops_the_run_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"SaveError: file too large while reserving .* for .*checkpoint"):
        run_world(train_where_files_stay_small, 1, str(tmp_path))
    assert steps_in(tmp_path) == {}
