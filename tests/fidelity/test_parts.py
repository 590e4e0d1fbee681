"""Tensors that are made of others (``__tensor_flatten__``): torchao's optimizers and weights, and the user's own."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
from same import assert_same
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor

import milepost
from milepost import CheckpointConfig, CheckpointManager, StateMismatchError
from milepost.tensors import parts
from milepost.testing.world import run_world

CONFIG = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)


class Rounding(enum.Enum):
    NEAREST = 1


@dataclasses.dataclass(frozen=True)
class Scheme:
    rounding: Rounding
    block_size: int = 4


class Scaled(torch.Tensor):
    """Numbers of a byte in rows, a scale for every block of four, and a table that belongs to all."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, scheme: Scheme) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[no-any-return]

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, scheme: Scheme):
        self.codes, self.scale, self.table, self.scheme = codes, scale, table, scheme

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "table"], {"scheme": self.scheme, "shape": self.shape}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], kept: Any, size: Any, stride: Any) -> Scaled:
        assert tuple(kept["shape"]) == tuple(inner["codes"].shape)
        return cls(**inner, scheme=kept["scheme"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.view.default):
            return cls(own.codes, own.scale, own.table, own.scheme)
        if func is torch.ops.aten.slice.Tensor:
            _, dim, start, stop = args
            width, block = own.shape[1], own.scheme.block_size
            if dim or start * width % block or stop * width % block:
                raise ValueError("not between blocks")
            scale = own.scale[start * width // block : stop * width // block]
            return cls(own.codes[start:stop], scale, own.table.clone(), own.scheme)
        if func is torch.ops.aten.copy_.default:
            for name in ("codes", "scale", "table"):
                getattr(own, name).copy_(getattr(args[1], name))
            return own
        raise NotImplementedError(str(func))


def scaled(rows: int, seed: int, width: int = 8) -> Scaled:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 255, (rows, width), dtype=torch.uint8, generator=generator)
    scale = torch.rand(rows * width // 4, generator=generator)
    return Scaled(codes, scale, torch.arange(256.0), Scheme(Rounding.NEAREST))


class Holder:
    def __init__(self, state: Any):
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def state(seed: int) -> dict[str, Any]:
    two = TwoTensor(torch.full((2, 3), float(seed)), torch.ones(2, 3))
    return {
        "scaled": scaled(4, seed),
        "nested": [{"of two": TwoTensor(two, two.clone())}],
        "in a tuple": (scaled(2, seed), seed),
    }


# ---- on one rank ----


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_they_come_back_as_they_were(memory_path: Path, mode: Any) -> None:
    config = dataclasses.replace(CONFIG, async_mode=mode)
    found = Holder(None)
    for holder in (Holder(state(1)), found):
        with CheckpointManager(memory_path, config, model=nn.Linear(1, 1), train_state=holder) as manager:
            manager.save(1) if holder is not found else manager.load()
    assert_same(found.state, state(1))
    whole = milepost.load(memory_path / "step-1")
    assert_same(whole["train_state"], state(1))
    assert_same(milepost.load(memory_path / "step-1")["train_state"], whole["train_state"])


def test_they_are_filled_where_they_are_and_stock_dcp_reads_the_parts(memory_path: Path) -> None:
    milepost.save(memory_path / "step-1", {"a": state(1)})
    into = {"a": state(2)}
    memory = into["a"]["scaled"].codes.data_ptr()
    milepost.load(memory_path / "step-1", into)
    assert_same(into["a"], state(1))
    assert into["a"]["scaled"].codes.data_ptr() == memory
    parts_of = {"a": {"scaled": {"codes": torch.zeros(4, 8, dtype=torch.uint8), "scale": torch.zeros(8)}}}
    dcp.load(parts_of, checkpoint_id=memory_path / "step-1", no_dist=True)
    assert_same(parts_of["a"]["scaled"]["codes"], state(1)["scaled"].codes)
    assert_same(parts_of["a"]["scaled"]["scale"], state(1)["scaled"].scale)


def test_a_model_only_save_in_another_dtype_leaves_the_parts_as_they_are(memory_path: Path) -> None:
    model = nn.Linear(8, 4)
    model.weight = nn.Parameter(scaled(4, 1), requires_grad=False)
    config = CheckpointConfig(interval=1, export_dtype="bfloat16")
    with CheckpointManager(memory_path, config, model=model) as manager:
        manager.save(1, last_step=True)
    found = milepost.load(memory_path / "step-1")
    assert found["bias"].dtype == torch.bfloat16
    assert_same(found["weight"], model.weight.detach())


@pytest.mark.parametrize(
    ("saved", "here", "problem"),
    [
        (scaled(4, 1), torch.zeros(4, 8), r"w: a test_parts\.Scaled in the checkpoint, a plain tensor here"),
        (torch.zeros(4, 8), scaled(4, 1), "not in the checkpoint|w: "),
        (scaled(4, 1), scaled(8, 1), "w: a test_parts.Scaled in the checkpoint, a Scaled of another form here"),
        (scaled(4, 1), TwoTensor(torch.ones(4, 8), torch.ones(4, 8)), "a TwoTensor of another form here"),
    ],
)
def test_another_kind_is_refused_and_nothing_changed(
    memory_path: Path, saved: torch.Tensor, here: torch.Tensor, problem: str
) -> None:
    milepost.save(memory_path / "step-1", {"w": saved, "other": torch.ones(2)})
    into = {"w": here, "other": torch.zeros(2)}
    with pytest.raises(StateMismatchError, match=problem):
        milepost.load(memory_path / "step-1", into)
    assert into["other"].tolist() == [0, 0]


def test_a_class_that_is_not_loaded_is_named_and_its_parts_can_be_had(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    milepost.save(memory_path / "step-1", {"part": {"w": scaled(4, 1)}})
    monkeypatch.setattr(parts, "find_class", lambda name: None)
    found = milepost.load(memory_path / "step-1")
    assert_same(found["part"]["w"]["codes"], scaled(4, 1).codes)
    with pytest.raises(StateMismatchError, match="import test_parts before it is loaded"):
        milepost.load(memory_path / "step-1", {"part": {"w": None}})


def test_one_that_merely_wraps_goes_with_what_it_wraps(memory_path: Path) -> None:
    """Weights that are cast to fp8 on the way are saved by runs that cast them, and by runs that don't."""
    model, wrapped = nn.Linear(3, 2), nn.Linear(3, 2)
    wrapped.weight = nn.Parameter(Wrapper(wrapped.weight.detach().clone()))
    for number, (saved, loaded) in enumerate(((model, wrapped), (wrapped, model))):
        with torch.no_grad():
            saved.bias.fill_(number)
        for module in (saved, loaded):
            with CheckpointManager(memory_path / str(number), CONFIG, model=module) as manager:
                manager.save(1) if module is saved else manager.load()
        inner = wrapped.weight.inner
        assert_same(inner, model.weight.detach())
        assert_same(loaded.bias.detach(), saved.bias.detach())
        with torch.no_grad():
            inner.add_(1)


class Wrapper(torch.Tensor):
    """One tensor in another class."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], kept: Any, size: Any, stride: Any) -> Wrapper:
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Wrapper(args[0].inner)
        raise NotImplementedError(str(func))


# ---- sharded ----


def sharded(rows: int, seed: int, width: int = 8, *, plain_on: int = -1) -> DTensor:
    """The rows of this rank; on one rank perhaps as a plain tensor."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = scaled(rows, seed, width)
    first, last = mesh.get_rank() * -(-rows // mesh.size()), (mesh.get_rank() + 1) * -(-rows // mesh.size())
    last = min(last, rows)
    scale = whole.scale[first * width // 4 : last * width // 4]
    local: torch.Tensor = Scaled(whole.codes[first:last], scale, whole.table, whole.scheme)
    if mesh.get_rank() == plain_on:
        local = torch.full((last - first, width), float(seed))
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(rows, width), stride=(width, 1))


def save_sharded(folder: Path, rows: int, width: int = 8, plain_on: int = -1) -> None:
    milepost.save(folder / "step-1", {"a": {"w": sharded(rows, 1, width, plain_on=plain_on)}})


def load_sharded(folder: Path, rows: int, width: int = 8, plain_on: int = -1) -> None:
    into = {"a": {"w": sharded(rows, 2, width, plain_on=plain_on)}}
    expected = sharded(rows, 1, width, plain_on=plain_on)
    own = into["a"]["w"]
    milepost.load(folder / "step-1", into)
    assert_same(parts.local_of(into["a"]["w"]), parts.local_of(expected))
    assert into["a"]["w"] is own


def test_rows_of_one_are_read_at_other_degrees(memory_path: Path) -> None:
    """Uneven shards too; the parts are whole tensors for stock DCP, and for a program without ranks."""
    run_world(save_sharded, 2, memory_path, 7, timeout_s=60)
    run_world(load_sharded, 3, memory_path, 7, timeout_s=60)
    run_world(load_sharded, 2, memory_path, 7, timeout_s=60)
    assert_same(milepost.load(memory_path / "step-1")["a"]["w"], scaled(7, 1))
    metadata = FileSystemReader(memory_path / "step-1").read_metadata().state_dict_metadata
    assert {key: tuple(entry.size) for key, entry in metadata.items()} == {  # type: ignore[union-attr]
        "a.w.codes": (7, 8),
        "a.w.scale": (14,),
        "a.w.table": (256,),
    }


@pytest.mark.parametrize(("rows", "width", "plain_on"), [(3, 6, -1), (4, 8, 1)])
def test_shards_of_different_kinds_come_back_on_the_same_degrees(
    memory_path: Path, rows: int, width: int, plain_on: int
) -> None:
    """Quantization blocks cross the boundary between ranks, or an optimizer leaves a small shard unquantized."""
    run_world(save_sharded, 2, memory_path, rows, width, plain_on, timeout_s=60)
    run_world(load_sharded, 2, memory_path, rows, width, plain_on, timeout_s=60)
    with pytest.raises(
        StateMismatchError, match=r"2 shards that can't be resharded in the checkpoint, one tensor here"
    ):
        milepost.load(memory_path / "step-1", {"a": {"w": scaled(rows, 2, width)}})
    whole = milepost.load(memory_path / "step-1")["a"]["w"]
    assert list(whole) == ["shard0", "shard1"]


def save_on_its_way(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    gathered = functional.all_gather_tensor(torch.arange(3.0), 0, mesh)
    assert isinstance(gathered, functional.AsyncCollectiveTensor)
    again = functional.all_gather_tensor(torch.arange(3.0), 0, mesh)
    milepost.save(
        folder / "step-1", {"w": gathered, "d": DTensor.from_local(again, mesh, [Replicate()], run_check=False)}
    )


class OneScale(torch.Tensor):
    """Numbers of a byte, and one scale for all of them: each shard of a DTensor has its own."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> OneScale:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[no-any-return]

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], kept: Any, size: Any, stride: Any) -> OneScale:
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.view.default):
            return cls(own.codes, own.scale)
        if func is torch.ops.aten.slice.Tensor:
            return cls(own.codes[args[2] : args[3]], own.scale)
        raise NotImplementedError(str(func))


def save_scales_of_shards(folder: Path, at_first: bool) -> list[tuple[float, list[list[int]]]]:
    """Scales that may be equal in the first step, and differ between ranks in the second; both are loaded again."""
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))

    def one(code: int, scale: float) -> DTensor:
        local = OneScale(torch.full((2, 4), code, dtype=torch.uint8), torch.tensor(scale))
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    own = one(rank + 1, float(rank + 1) if at_first else 1.0)
    with CheckpointManager(folder, CONFIG, model=nn.Linear(1, 1), states={"held": Holder({"w": own})}) as manager:
        for step in (1, 2):
            assert manager.save(step)
            parts.local_of(own).scale.fill_(10.0 * (rank + 1))  # type: ignore[attr-defined]
    found = []
    for step in (1, 2):
        holder = Holder({"w": one(0, 0.0)})
        with CheckpointManager(folder, CONFIG, model=nn.Linear(1, 1), states={"held": holder}) as manager:
            manager.load(step=step)
        local: Any = parts.local_of(holder.state["w"])
        found.append((local.scale.item(), local.codes.tolist()))
    return found


@pytest.mark.parametrize("at_first", [False, True])
def test_a_scale_of_each_shards_own_is_kept_for_each(memory_path: Path, at_first: bool) -> None:
    """A part that all shards have may be a table of them all, or each one's own that is equal by chance."""
    for rank, found in enumerate(run_world(save_scales_of_shards, 2, memory_path, at_first, timeout_s=60)):
        codes = [[rank + 1] * 4] * 2
        assert found == [(float(rank + 1) if at_first else 1.0, codes), (10.0 * (rank + 1), codes)]


def test_the_result_of_a_collective_is_stored_as_what_it_is(memory_path: Path) -> None:
    run_world(save_on_its_way, 2, memory_path, timeout_s=60)
    expected = torch.arange(3.0).repeat(2)
    assert_same(milepost.load(memory_path / "step-1"), {"w": expected, "d": expected})


# ---- torchao ----


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def ao_run(name: str, seed: int, rows: int) -> tuple[nn.Module, Any]:
    import torchao.optim

    torch.compile = lambda function=None, **options: function if function else lambda inner: inner  # type: ignore[assignment]
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(64, rows), nn.Linear(rows, 8))
    if torch.distributed.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model, getattr(torchao.optim, name)(model.parameters(), lr=0.01)


def check_resumed(folder: Path, name: str, rows: int) -> None:
    runs = [ao_run(name, seed, rows) for seed in (0, 1)]
    train(*runs[0], range(3))
    for model, optimizer in runs:
        with CheckpointManager(folder, CONFIG, model=model, optimizer=optimizer) as manager:
            manager.save(1) if model is runs[0][0] else manager.load()
    for steps in (range(0), range(3, 6)):
        for model, optimizer in runs:
            train(model, optimizer, steps)
        assert_same(runs[1][1].state_dict(), runs[0][1].state_dict())
        assert_same(dict(runs[1][0].state_dict()), dict(runs[0][0].state_dict()))


def load_and_train(folder: Path, name: str, rows: int) -> None:
    model, optimizer = ao_run(name, 1, rows)
    with CheckpointManager(folder, CONFIG, model=model, optimizer=optimizer) as manager:
        manager.load()
    train(model, optimizer, range(3, 5))


AO = ["AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit", "Adam4bit", "AdamFp8"]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [256, 129])
@pytest.mark.parametrize("name", AO)
def test_optimizers_of_torchao(memory_path: Path, name: str, rows: int) -> None:
    """On one rank and sharded; saved by rows they are loaded at other degrees. 129: one shard is not quantized."""
    run_world(check_resumed, 1, memory_path / "one", name, rows, timeout_s=120)
    run_world(check_resumed, 2, memory_path / "two", name, rows, timeout_s=120)
    for world_size in (1, 4) if rows == 256 else ():
        run_world(load_and_train, world_size, memory_path / "two", name, rows, timeout_s=120)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "float8", "int8 dynamic", "nf4", "float8 training"])
def test_weights_of_torchao(memory_path: Path, kind: str) -> None:
    warnings.simplefilter("ignore")
    import torchao.quantization as ao
    from torchao.dtypes import to_nf4
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def quantized(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        if kind == "nf4":
            for layer in model:
                layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 16), requires_grad=False)
        elif kind == "float8 training":
            return convert_to_float8_training(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
        else:
            ao.quantize_(
                model,
                {
                    "int8": ao.int8_weight_only,
                    "float8": ao.float8_weight_only,
                    "int8 dynamic": ao.int8_dynamic_activation_int8_weight,
                }[kind](),
            )
        return model

    saved, loaded = quantized(0), quantized(1)
    for model in (saved, loaded):
        with CheckpointManager(memory_path, CONFIG, model=model) as manager:
            manager.save(1) if model is saved else manager.load()
    assert_same(dict(loaded.state_dict()), dict(saved.state_dict()))
    found = milepost.load(memory_path / "step-1")["0.weight"]
    expected = saved.state_dict()["0.weight"]
    if kind == "int8 dynamic":  # it keeps a function, which a file may not name
        assert_same(found["original_weight_tensor"], expected.original_weight_tensor)
    else:
        assert_same(found, expected)
