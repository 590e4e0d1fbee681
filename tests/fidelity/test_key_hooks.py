"""Old checkpoints are loaded by hooks of the user's that rename, fuse, drop, exchange and add keys, as by torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import milepost
from milepost import CheckpointConfig, CheckpointManager, StateMismatchError
from milepost.loading.load_from import LoadReport
from milepost.testing.world import run_world

CONFIG = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)


class OldBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(4))
        self.q, self.k, self.lin = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("dropped", torch.ones(2))


class Block(nn.Module):
    """Fuses two projections, renames a scale and a layer, drops a buffer and makes another."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.qk, self.fc = nn.Linear(4, 8), nn.Linear(4, 4)
        self.register_buffer("version", torch.zeros(1))
        self._register_load_state_dict_pre_hook(self._upgrade)

    def _upgrade(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}gamma" not in state:
            return
        state[f"{prefix}scale"] = state.pop(f"{prefix}gamma")
        for name in ("weight", "bias"):
            state[f"{prefix}qk.{name}"] = torch.cat([state.pop(f"{prefix}{part}.{name}") for part in "qk"])
            state[f"{prefix}fc.{name}"] = state.pop(f"{prefix}lin.{name}")
        del state[f"{prefix}dropped"]
        state[f"{prefix}version"] = torch.tensor([2.0])


class OldLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)


class Layer(nn.Module):
    """Renames in an override of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}lin.")]:
            state[key.replace("lin.", "fc.")] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *args)


class Exchanged(nn.Module):
    """Gives each of two weights the other's value: read in place they would overwrite each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_load_state_dict_pre_hook(self._exchange)

    @staticmethod
    def _exchange(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state[f"{prefix}a"], state[f"{prefix}b"] = state[f"{prefix}b"], state[f"{prefix}a"]


class Table(nn.Module):
    """Takes a table of another length, as position embeddings do."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, 2))
        self.register_load_state_dict_pre_hook(self._fit)

    @staticmethod
    def _fit(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state[f"{prefix}table"] = state[f"{prefix}table"][: len(module.table)] * 1.0  # type: ignore[arg-type]


class Outer(nn.Linear):
    """Takes state dicts of a wrapper."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({key.removeprefix("inner."): v for key, v in state_dict.items()}, strict, assign)


def wrapped(inner: nn.Module) -> nn.Module:
    outer = nn.Module()
    outer.inner = inner
    return outer


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "renamed, fused, dropped, made": (lambda: nn.Sequential(OldBlock()), lambda: nn.Sequential(Block())),
    "renamed by an override": (lambda: nn.Sequential(OldLayer(), OldLayer()), lambda: nn.Sequential(Layer(), Layer())),
    "exchanged": (lambda: nn.Sequential(Exchanged()), lambda: nn.Sequential(Exchanged())),
    "of another length": (lambda: nn.Sequential(Table(6)), lambda: nn.Sequential(Table(4))),
    "at the top": (lambda: wrapped(nn.Linear(4, 4)), lambda: Outer(4, 4)),
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda module: module,
    "ddp": DistributedDataParallel,
    "fsdp": fully_shard,
}


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix("module."): value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for key, value in module.state_dict().items()
    }


def check_as_torch(folder: Path, case: str, saved_as: str = "plain", loaded_as: str = "plain") -> None:
    make_old, make_new = CASES[case]
    torch.manual_seed(0)
    old = WRAPPERS[saved_as](make_old())
    with CheckpointManager(folder / case, CONFIG, model=old) as manager:
        manager.save(1)
    torch.manual_seed(1)
    expected = make_new()
    expected.load_state_dict(whole(old))
    new = WRAPPERS[loaded_as](make_new())
    with CheckpointManager(folder / case, CONFIG, model=new) as manager:
        manager.load()
    torch.testing.assert_close(whole(new), dict(expected.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_hooks_take_old_keys_as_in_torch(memory_path: Path, case: str) -> None:
    check_as_torch(memory_path, case)
    old, new, expected = CASES[case][0](), CASES[case][1](), CASES[case][1]()
    expected.load_state_dict(old.state_dict())
    milepost.save(memory_path / "step-1", {"model": old})
    milepost.load(memory_path / "step-1", {"model": new})
    torch.testing.assert_close(dict(new.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def on_two_ranks(folder: Path, saved_as: str, loaded_as: str) -> None:
    for case in list(CASES)[:3]:
        check_as_torch(folder, case, saved_as, loaded_as)


@pytest.mark.parametrize(
    ("saved_as", "loaded_as"),
    [("fsdp", "fsdp"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("ddp", "fsdp"), ("fsdp", "ddp")))],
)
def test_hooks_take_old_keys_under_wrappers(memory_path: Path, saved_as: str, loaded_as: str) -> None:
    run_world(on_two_ranks, 2, memory_path, saved_as, loaded_as, timeout_s=60)


def test_modules_on_the_meta_device(memory_path: Path) -> None:
    old = nn.Sequential(OldBlock())
    milepost.save(memory_path / "step-1", {"model": old})
    with torch.device("meta"):
        new = nn.Sequential(Block())
    milepost.load(memory_path / "step-1", {"model": new})
    expected = nn.Sequential(Block())
    expected.load_state_dict(old.state_dict())
    torch.testing.assert_close(dict(new.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


def test_the_optimizer_follows_renamed_parameters(memory_path: Path) -> None:
    old = nn.Sequential(OldLayer(), OldLayer())
    optimizer = trained(old)
    with CheckpointManager(memory_path, CONFIG, model=old, optimizer=optimizer) as manager:
        manager.save(1)
    new = nn.Sequential(Layer(), Layer())
    loaded = torch.optim.AdamW(new.parameters())
    with CheckpointManager(memory_path, CONFIG, model=new, optimizer=loaded) as manager:
        manager.load()
    torch.testing.assert_close(loaded.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


class Raising(nn.Linear):
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state, prefix, *args)


def test_what_torch_would_refuse_is_refused_with_its_reason(memory_path: Path) -> None:
    milepost.save(memory_path / "step-1", {"model": nn.Sequential(OldLayer())})
    for make in (lambda: nn.Sequential(Raising(4, 4)), lambda: nn.Sequential(Block()), lambda: nn.Sequential(Table(4))):
        model = make()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(StateMismatchError, match="nothing was changed"):
            milepost.load(memory_path / "step-1", {"model": model})
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(StateMismatchError, match=r"does not take the keys: KeyError: '0.kernel'"):
        milepost.load(memory_path / "step-1", {"model": nn.Sequential(Raising(4, 4))})


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_hooks_of_torch_too(memory_path: Path) -> None:
    """``weight_norm`` has become a parametrization, which takes the keys of before."""
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with CheckpointManager(memory_path, CONFIG, model=old) as manager:
        manager.save(1)
    with CheckpointManager(memory_path, CONFIG, model=new) as manager:
        manager.load()
    assert torch.equal(new[0].weight, old[0].weight)


class Versioned(nn.Linear):
    """Since its second version it holds twice the weight, under the same name."""

    _version = 2

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("version", [1, 2])
def test_modules_learn_the_version_that_was_saved(memory_path: Path, version: int) -> None:
    saved = nn.Sequential(Versioned(3, 3), nn.BatchNorm1d(3))
    saved[0]._version = version
    expected = saved[0].weight * (2 if version == 1 else 1)
    with CheckpointManager(memory_path / "run", CONFIG, model=saved) as manager:
        manager.save(1)
    milepost.save(memory_path / "step-1", {"model": saved})
    torch.save({"state_dict": torch.compile(saved).state_dict()}, memory_path / "old.pt")
    one, other, third = (nn.Sequential(Versioned(3, 3), nn.BatchNorm1d(3)) for _ in range(3))
    with CheckpointManager(memory_path / "run", CONFIG, model=one) as manager:
        manager.load()
    milepost.load(memory_path / "step-1", {"model": other})
    assert torch.equal(one[0].weight, expected)
    assert torch.equal(other[0].weight, expected)
    started_from(memory_path / "old.pt", third, memory_path / "third")
    assert torch.equal(third[0].weight, expected)


class Lenient(nn.Linear):
    """A hook after loading excuses what is missing."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.new = nn.Parameter(torch.ones(2))
        self.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())


def test_a_hook_that_excuses_missing_keys(memory_path: Path) -> None:
    saved, loaded = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(Lenient())
    milepost.save(memory_path / "step-1", {"model": saved})
    milepost.load(memory_path / "step-1", {"model": loaded})
    assert torch.equal(loaded[0].weight, saved[0].weight)
    assert torch.equal(loaded[0].new, torch.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_saved_compiled", [True, False])
def test_a_compiled_module_in_a_state_dict(memory_path: Path, is_saved_compiled: bool) -> None:
    saved, loaded = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(saved if is_saved_compiled else loaded)
    milepost.save(memory_path / "step-1", {"model": compiled if is_saved_compiled else saved})
    milepost.load(memory_path / "step-1", {"model": loaded if is_saved_compiled else compiled})
    assert torch.equal(loaded[0].weight, saved[0].weight)


def started_from(path: Path, model: nn.Module, folder: Path, **options: Any) -> LoadReport:
    """Start a new run of ``model`` from the weights at ``path``."""
    config = CheckpointConfig(enable=True, initial_load_path=str(path), **options)
    with CheckpointManager(folder, config, model=model) as manager:
        report = manager.load()
    assert report is not None
    return report


def write_file(path: Path, state: dict[str, torch.Tensor], prefix: str = "") -> Path:
    named = {prefix + key: value.contiguous() for key, value in state.items()}
    torch.save(named, path) if path.suffix == ".pt" else safetensors.torch.save_file(named, path)
    return path


@pytest.mark.parametrize("name", ["old.pt", "old.safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_hooks_take_old_keys_of_a_file_of_weights(memory_path: Path, case: str, name: str) -> None:
    make_old, make_new = CASES[case]
    old, new, expected = make_old(), make_new(), make_new()
    expected.load_state_dict(old.state_dict())
    started_from(write_file(memory_path / name, old.state_dict()), new, memory_path / "run")
    torch.testing.assert_close(dict(new.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_hooks_take_old_keys_of_a_file_with_a_prefix(memory_path: Path) -> None:
    old, new, expected = (nn.Sequential(kind(), nn.Linear(2, 2)) for kind in (OldBlock, Block, Block))
    expected.load_state_dict(old.state_dict())
    started_from(write_file(memory_path / "old.pt", old.state_dict(), "model."), new, memory_path / "run")
    torch.testing.assert_close(dict(new.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def file_on_two_ranks(folder: Path, loaded_as: str) -> None:
    for case in list(CASES)[:3]:
        torch.manual_seed(0)
        old, expected = CASES[case][0](), CASES[case][1]()
        expected.load_state_dict(old.state_dict())
        path = folder / f"{case}.pt"
        if dist.get_rank() == 0:
            write_file(path, old.state_dict())
        dist.barrier()
        new = WRAPPERS[loaded_as](CASES[case][1]())
        started_from(path, new, folder / case)
        torch.testing.assert_close(whole(new), dict(expected.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("loaded_as", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_hooks_take_old_keys_of_a_file_under_wrappers(memory_path: Path, loaded_as: str) -> None:
    run_world(file_on_two_ranks, 2, memory_path, loaded_as, timeout_s=60)


def test_a_file_whose_keys_no_hook_takes_is_refused_by_name(memory_path: Path) -> None:
    path = write_file(memory_path / "old.pt", {**Block().state_dict(), "other": torch.ones(1)})
    model = Block()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"(?s)nothing was changed.*of the checkpoint has no place.*other"):
        started_from(path, model, memory_path / "run")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_file_into_a_module_on_the_meta_device(memory_path: Path) -> None:
    """What it lacks is named, and not made up of unread memory."""
    old = nn.Sequential(OldLayer(), nn.Linear(4, 4))
    path = write_file(
        memory_path / "old.pt", {key: value for key, value in old.state_dict().items() if key != "1.bias"}
    )
    with torch.device("meta"):
        new = nn.Sequential(Layer(), nn.Linear(4, 4))
    report = started_from(path, new, memory_path / "run")
    assert torch.equal(new[0].fc.weight, old[0].lin.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(new[1].weight, old[1].weight)  # type: ignore[arg-type]
    assert new[1].bias.is_meta  # type: ignore[union-attr]
    assert "1.bias" in report.missing
