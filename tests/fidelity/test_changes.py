"""Ordinary changes between two runs: noted without an option, allowed by an option, or refused.

Each is a recipe of docs/howto/change.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_runs import (  # noqa: F401 - one is a fixture
    Net,
    Optimizer,
    Run,
    adamw,
    close_managers,
    cosine,
    opened,
    saved,
    scheduled,
    step_lr,
)
from same import assert_same, digest
from torch import nn
from torch.nn.utils import prune
from torch.optim import lr_scheduler

import milepost
from milepost import CheckpointConfig, CheckpointManager, ConfigError, StateMismatchError
from milepost.testing.world import WorldError, run_world


def moments(optimizer: Optimizer, parameter: Any) -> Any:
    return optimizer.state[parameter]["exp_avg"]


# ---- what needs no option ----


def test_options_that_another_version_of_torch_adds_or_lacks(memory_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        del group["decoupled_weight_decay"]
        group["from_the_future"] = None
    first = Run(memory_path, model, optimizer)
    first.manager.save(1)
    first.manager.close()
    again = Net()
    run = Run(memory_path, again, adamw(again))
    notes = run.load()
    assert "optimizer options missing from the checkpoint, kept as in this run: decoupled_weight_decay" in notes
    assert "optimizer options of the checkpoint that this run does not have, ignored: from_the_future" in notes
    assert run.optimizer.param_groups[0]["decoupled_weight_decay"] is True


KINDS: dict[str, Any] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "Adam, whose state looks the same": lambda model: torch.optim.Adam(model.parameters()),
    "Adamax": lambda model: torch.optim.Adamax(model.parameters()),
    "Adafactor, in no module of its own": lambda model: torch.optim.Adafactor(model.parameters()),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_another_kind_of_optimizer_is_refused(memory_path: Path, make: Any) -> None:
    saved(memory_path)
    model = Net()
    before = digest(model.state_dict())
    with pytest.raises(StateMismatchError, match=r"holds the state of AdamW, this run has .*_from_loading = optimizer"):
        Run(memory_path, model, make(model)).load()
    assert digest(model.state_dict()) == before


def test_another_kind_of_schedule_is_refused(memory_path: Path) -> None:
    scheduled(memory_path, cosine)
    with pytest.raises(StateMismatchError, match=r"CosineAnnealingLR, this run has StepLR.*= lr_scheduler"):
        scheduled(memory_path, step_lr, 0).load()


def regrouped(model: nn.Module) -> Optimizer:
    parameters = list(model.parameters())[::-1]
    return torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:3]}, {"params": parameters[3:]}])


@pytest.mark.parametrize(
    "make", [regrouped, lambda model: torch.optim.AdamW(model.named_parameters())], ids=["groups", "names"]
)
def test_groups_in_another_order_or_split_and_named_parameters(
    memory_path: Path, make: Callable[[nn.Module], Optimizer]
) -> None:
    first = saved(memory_path)
    model = Net()
    run = Run(memory_path, model, make(model))
    run.load()
    for (name, one), (_, other) in zip(first.model.named_parameters(), model.named_parameters(), strict=True):
        assert_same(moments(run.optimizer, other), moments(first.optimizer, one), name)
        assert torch.equal(one, other)
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.1}


def test_parameters_frozen_and_unfrozen(memory_path: Path) -> None:
    first = saved(memory_path)
    model = Net()
    run = Run(memory_path, model, torch.optim.AdamW(model.head.parameters(), lr=0.1))
    notes = run.load()
    assert any(note.startswith("parameters that no optimizer steps any more") for note in notes)
    assert_same(moments(run.optimizer, model.head.weight), moments(first.optimizer, first.model.head.weight))
    assert list(run.optimizer.state) == [model.head.weight]
    run.train(3)

    model = Net()
    run = Run(memory_path, model, adamw(model))
    notes = run.load()
    assert any(note.startswith("parameters new to the optimizer, with fresh state: ") for note in notes)
    assert list(run.optimizer.state) == [model.head.weight]
    run.train(1)


def test_new_parameters(memory_path: Path) -> None:
    """New keys of the model must be allowed by name; known ones are restored, new ones stay as initialized."""
    first = saved(memory_path)
    model = Net(adapter=True)
    before = digest([*model.state_dict().values()])
    with pytest.raises(StateMismatchError, match=r'set checkpoint.allow_missing = "adapter.\*"'):
        Run(memory_path, model, adamw(model)).load()
    opened.pop().close()
    assert digest([*model.state_dict().values()]) == before
    fresh = copy.deepcopy(model.adapter.state_dict())
    run = Run(memory_path, model, adamw(model), allow_missing=["adapter"])
    notes = run.load()
    assert "allow_missing adapter: 2 keys left as they were: adapter.bias, adapter.weight" in notes
    assert_same(model.adapter.state_dict(), fresh)
    assert_same(model.head.state_dict(), first.model.head.state_dict())
    assert_same(moments(run.optimizer, model.head.weight), moments(first.optimizer, first.model.head.weight))
    assert model.adapter.weight not in run.optimizer.state
    run.train(1)


def test_removed_parameters(memory_path: Path) -> None:
    """Their state in the optimizer goes with them."""
    saved(memory_path, adapter=True)
    model = Net()
    with pytest.raises(StateMismatchError, match=r"set checkpoint.allow_unexpected = "):
        Run(memory_path, model, adamw(model)).load()
    opened.pop().close()
    notes = Run(memory_path, model, adamw(model), allow_unexpected=["adapter.*"]).load()
    assert "allow_unexpected adapter.*: 2 keys left out: adapter.bias, adapter.weight" in notes


def test_buffers_that_are_new_or_no_longer_kept(memory_path: Path) -> None:
    model = Net()
    model.register_buffer("freqs_cis", torch.ones(3))
    model.register_buffer("mask", torch.ones(2))
    Run(memory_path, model, adamw(model)).train(1)
    other = Net()
    other.register_buffer("mask", torch.zeros(2), persistent=False)
    other.register_buffer("scale", torch.full((2,), 7.0))
    notes = Run(memory_path, other, adamw(other)).load()
    assert "buffers missing from the checkpoint, left as initialized: scale" in notes
    assert "buffers of the checkpoint that this model computes itself, ignored: freqs_cis, mask" in notes
    assert other.scale.tolist() == [7, 7]
    assert not other.mask.any()
    assert_same(other.norm.state_dict(), model.norm.state_dict())


# ---- tied weights ----


def write_weights(path: Path, state: dict[str, Any]) -> None:
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        milepost.save(path, state)


@pytest.mark.parametrize("name", ["once", "once.pt"])
@pytest.mark.parametrize("kept", ["embedding.weight", "head.weight"])
def test_a_tied_weight_that_is_stored_once(memory_path: Path, kept: str, name: str) -> None:
    model = Net(tied=True)
    state = {key: value for key, value in model.state_dict().items() if key == kept or "weight" not in key}
    state |= {key: model.state_dict()[key] for key in ("body.weight", "norm.weight")}
    write_weights(memory_path / name, state)
    again = Net(tied=True)
    run = Run(memory_path / "run", again, adamw(again), initial_load_path=memory_path / name)
    run.load()
    assert_same(again.state_dict(), model.state_dict())
    assert again.head.weight is again.embedding.weight


@pytest.mark.parametrize("name", ["apart", "apart.pt"])
def test_untied_weights_into_a_tied_model_are_refused(memory_path: Path, name: str) -> None:
    apart = Net(classes=5)
    path = memory_path / name
    write_weights(path, apart.state_dict())
    model = Net(tied=True)
    before = digest(model.state_dict())
    with pytest.raises(StateMismatchError, match=r"embedding.weight and head.weight: one tensor here \(tied\)"):
        Run(memory_path / "run", model, adamw(model), initial_load_path=str(path)).load()
    assert digest(model.state_dict()) == before
    with torch.no_grad():
        apart.head.weight.copy_(apart.embedding.weight)
    write_weights(path, apart.state_dict())
    opened.pop().close()
    Run(memory_path / "run", model, adamw(model), initial_load_path=str(path)).load()
    assert_same(model.state_dict(), apart.state_dict())


# ---- names of wrappers, files of torch ----


def wrapped(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    if prefix == "_checkpoint_wrapped_module.":
        return {key.replace("body.", "body._checkpoint_wrapped_module."): value for key, value in state.items()}
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_checkpoint_wrapped_module.", "model."]
)
@pytest.mark.parametrize("form", ["checkpoint", "file", "nested file"])
def test_names_with_prefixes(memory_path: Path, prefix: str, form: str) -> None:
    model, again = Net(), Net()
    state = wrapped(model.state_dict(), prefix)
    path = memory_path / ("start" if form == "checkpoint" else "start.pt")
    if form == "checkpoint":
        milepost.save(path, state)
    else:
        torch.save({"model_state_dict": state, "epoch": 3} if "nested" in form else state, path)
    Run(memory_path / "run", again, adamw(again), initial_load_path=str(path)).load()
    assert_same(again.state_dict(), model.state_dict())


def start_a_stage(folder: Path) -> bool:
    """Each rank has one layer of the file."""
    name = str(torch.distributed.get_rank())
    stage = nn.Module()
    stage.layers = nn.ModuleDict({name: nn.Linear(3, 3)})
    config = CheckpointConfig(enable=True, initial_load_path=str(folder / "all.pt"))
    with CheckpointManager(folder / "run", config, model=stage, layout={"pp": 2}) as manager:
        manager.load()
    return bool((stage.layers[name].weight == int(name)).all())


def test_a_file_of_all_stages_of_a_pipeline(memory_path: Path) -> None:
    shapes = {"weight": (3, 3), "bias": (3,)}
    state = {f"layers.{n}.{name}": torch.full(shape, float(n)) for n in (0, 1) for name, shape in shapes.items()}
    torch.save(state, memory_path / "all.pt")
    assert run_world(start_a_stage, 2, memory_path, timeout_s=60) == [True, True]
    torch.save({**state, "layers.2.weight": torch.ones(3, 3)}, memory_path / "all.pt")
    with pytest.raises(WorldError, match=r"1 key of the checkpoint has no place in this run:\n *layers.2.weight"):
        run_world(start_a_stage, 2, memory_path, timeout_s=60)


def test_a_checkpoint_of_the_whole_training_as_a_start(memory_path: Path) -> None:
    """``{"model": ..., "optimizer": ...}`` of a loop's own."""
    model, again = Net(), Net()
    milepost.save(memory_path / "start", {"model": model.state_dict(), "optimizer": adamw(model).state_dict()})
    Run(memory_path / "run", again, adamw(again), initial_load_path=str(memory_path / "start")).load()
    assert_same(again.state_dict(), model.state_dict())


def test_a_new_head_over_a_base(memory_path: Path) -> None:
    first = saved(memory_path / "base")
    model = Net()
    model.extra = nn.Linear(4, 2)
    path = str(memory_path / "base" / "step-2")
    notes = Run(memory_path / "new", model, adamw(model), initial_load_path=path).load()
    assert "allow_missing *: 2 keys left as they were: extra.bias, extra.weight" in notes
    assert_same(model.body.state_dict(), first.model.body.state_dict())

    other = Net(classes=7)
    with pytest.raises(StateMismatchError, match=r"head.weight: shape \[3, 4\] in the checkpoint, \[7, 4\] here"):
        Run(memory_path / "other", other, adamw(other), initial_load_path=path).load()
    opened.pop().close()
    fresh = other.head.weight.detach().clone()
    run = Run(memory_path / "other", other, adamw(other), initial_load_path=path, exclude_from_loading=["head.*"])
    run.load()
    assert torch.equal(other.head.weight, fresh)
    assert_same(other.body.state_dict(), first.model.body.state_dict())


def test_an_adapter_over_a_base(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    # PEFT refuses the torchao of this environment, of which nothing is wanted here.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    first = saved(memory_path / "base")
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["body", "head"], r=2))
    notes = Run(
        memory_path / "lora", model, adamw(model), initial_load_path=str(memory_path / "base" / "step-2")
    ).load()
    assert any(note.startswith("allow_missing *: 4 keys left as they were") for note in notes)
    assert torch.equal(model.base_model.model.body.base_layer.weight, first.model.body.weight)
    assert torch.equal(model.base_model.model.embedding.weight, first.model.embedding.weight)


# ---- what would be lost is refused ----


def test_two_optimizers_over_one_parameter(memory_path: Path) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=r"both step 'embedding.weight'"):
        CheckpointManager(memory_path, model=model, optimizer=[adamw(model), adamw(model)])


def test_a_pattern_that_names_nothing(memory_path: Path) -> None:
    saved(memory_path)
    model = Net()
    with pytest.raises(StateMismatchError, match=r"matches 'haed.weight'; did you mean 'head.weight'"):
        Run(memory_path, model, adamw(model), exclude_from_loading=["haed.weight"]).load()
    with pytest.raises(ConfigError, match="there is no part 'optimzer'"):
        CheckpointConfig(exclude_from_loading=["optimzer"])  # type: ignore[arg-type]


# ---- random generators where training continues ----


def test_the_generators_are_restored_where_training_continues(memory_path: Path) -> None:
    """Draws between ``load()`` and the first step, such as those of ``iter(loader)``, have no effect."""
    torch.manual_seed(3)
    first = saved(memory_path)
    expected = torch.rand(4)  # what the undisturbed run draws next
    assert first.manager.committed_step == 2
    model = Net()
    run = Run(memory_path, model, adamw(model))
    run.manager.restore_rng()  # nothing was loaded: nothing is set
    run.load()
    iter(torch.utils.data.DataLoader([1, 2, 3], shuffle=True))  # type: ignore[arg-type]
    torch.rand(2)
    run.manager.restore_rng()
    assert torch.equal(torch.rand(4), expected)


def test_parts_that_this_run_does_not_have_are_reported(memory_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = lr_scheduler.StepLR(optimizer, 2)
    with Run(memory_path, model, optimizer, schedule).manager as manager:
        manager.save(1)
    with Run(memory_path, nn.Linear(2, 2)).manager as manager:
        report = manager.load()
    note = "in the checkpoint but not in this run, so not restored: optimizer, lr_scheduler"
    assert note in report.notes
    assert note in caplog.text


def test_keys_of_both_directions_are_named_at_once(memory_path: Path) -> None:
    """Weights that were pruned, or given a parametrization, after the program started."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with Run(memory_path, model).manager as manager:
        manager.save(1)
    plain = Run(memory_path, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    with plain.manager as manager, pytest.raises(StateMismatchError) as caught:
        manager.load()
    message = caught.value.message
    assert "2 keys of the checkpoint have no place in this run:\n    0.weight_mask\n    0.weight_orig" in message
    assert 'allow_missing = "0.weight"' in message
    assert 'allow_unexpected = "0.weight_mask", "0.weight_orig"' in message


def test_a_vocabulary_of_another_size(memory_path: Path) -> None:
    """The message names the option; optimizer state of the old shape would fail the first step."""
    saved(memory_path)
    model = Net(classes=5)
    with pytest.raises(StateMismatchError, match=r'set checkpoint.exclude_from_loading = "head.weight"'):
        Run(memory_path, model, adamw(model)).load()
    opened.pop().close()
    run = Run(memory_path, model, adamw(model), exclude_from_loading=["head.weight"])
    notes = run.load()
    assert "parameters of another shape in the checkpoint, with fresh optimizer state: head.weight" in notes
    assert "exp_avg" in run.optimizer.state[model.body.weight]
    assert not run.optimizer.state[model.head.weight]
    run.train(1)
