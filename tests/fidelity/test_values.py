"""Values keep their type, their order and every bit, through every way of saving; what can't be kept is refused at
once, with the place where it is and what to write instead."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import os
import pathlib
import subprocess
import sys
import types
import uuid
import warnings
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from same import assert_same
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import milepost
from milepost import CheckpointConfig, CheckpointManager, ConfigError, SaveError
from milepost.run.checkpoint_record import read_manifest
from milepost.storage import LocalStorage
from milepost.tensors import registry
from milepost.tensors.snapshot import snapshot
from milepost.tensors.value_reader import decode_object
from milepost.tensors.value_writer import encode_object

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


@milepost.register_value
class Phase(enum.Enum):
    WARM_UP = 1
    STABLE = "stable"


@milepost.register_value
class Flags(enum.IntFlag):
    A = 1
    B = 2


@milepost.register_value
@dataclasses.dataclass(frozen=True)
class Best:
    step: int
    phase: Phase
    by_name: dict[str, float] = dataclasses.field(default_factory=dict)


@milepost.register_value
class Span(NamedTuple):
    start: int
    stop: Any


class Money:
    """Neither of these: its own way to plain values."""

    def __init__(self, cents: int):
        self.cents = cents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.cents == self.cents

    def __hash__(self) -> int:
        return hash(self.cents)


milepost.register_value(Money, encode=lambda money: money.cents, decode=Money)

UTC, BERLIN = datetime.UTC, zoneinfo.ZoneInfo("Europe/Berlin")

KINDS: dict[str, list[Any]] = {
    "None, bool": [None, True, False],
    "int of any size": [0, -1, 255, 1 << 31, -(1 << 63), 1 << 64, -(1 << 9000)],
    "float": [0.0, -0.0, 5e-324, float("inf"), float("-inf"), float("nan")],
    "complex": [1j, complex(-0.0, float("inf"))],
    "str": ["", "é\U0001f600", "\ud800", "x" * 70_000],
    "bytes, bytearray": [b"", b"\x00\xff", bytes(range(256)) * 1000, bytearray(b"ab")],
    "list, tuple": [[], [1, [2.5, "x"]], (), (1, (2, [3, ()]))],
    "set, frozenset": [set(), {1, "a", (2, 3)}, frozenset({1.5, None})],
    "dict with keys of any of these": [{}, {1: 2, "1x": 3, (1, "a"): 4, None: 5, 2.5: 6, b"k": 7, Phase.STABLE: 8}],
    "OrderedDict": [OrderedDict(b=1, a=2)],
    "defaultdict": [defaultdict(int, a=1), defaultdict(list, {1: [2]}), defaultdict(None, {1: 2}), defaultdict(set)],
    "Counter": [Counter("abca"), Counter({3: 1})],
    "deque": [deque([1, 2], maxlen=3), deque()],
    "range, slice": [range(3, 9, 2), slice(1, None, 2)],
    "datetime, date, time, timedelta": [
        datetime.datetime(2026, 1, 2, 3, 4, 5, 678),
        datetime.datetime(2026, 1, 2, tzinfo=UTC),
        datetime.datetime(2026, 7, 2, tzinfo=BERLIN),
        datetime.date(2026, 1, 2),
        datetime.time(3, 4, 5),
        datetime.timedelta(days=-1, microseconds=3),
    ],
    "Path": [pathlib.Path("/a/b"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("c:/d")],
    "Decimal, Fraction, UUID": [decimal.Decimal("1.50"), fractions.Fraction(1, 3), uuid.UUID(int=7)],
    "SimpleNamespace, argparse.Namespace": [types.SimpleNamespace(a=[1]), argparse.Namespace(lr=0.1, name="x")],
    "Enum": [Phase.WARM_UP, Phase.STABLE, Flags.A | Flags.B, [Phase.STABLE]],
    "dataclass, NamedTuple": [Best(3, Phase.STABLE, {"loss": 0.1}), Span(1, [2]), [Span(1, Span(2, 3))]],
    "registered class": [Money(5), {"paid": [Money(7)]}],
    "numpy scalar": [
        np.float32(1.5), np.float64("nan"), np.int8(-3), np.uint64(1 << 63), np.bool_(True), np.complex64(1j),
        np.float16(0.5), np.str_("é"), np.str_(""), np.bytes_(b"x"), np.datetime64("2026-01-02", "ns"),
    ],
    "numpy array": [
        *(np.arange(6).astype(kind) for kind in ("?", "i1", "u2", "<i4", ">i8", "f2", "f4", ">f8", "c8", "c16")),
        np.zeros((2, 0, 3)), np.array(3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(["a", "bb"]),
        np.array(["2026-01-02"], dtype="M8[D]"), np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
        np.zeros(2, dtype=[("a", "<i4"), ("b", "<f8", (2, 3))]), np.ones(3, ml_dtypes.bfloat16),
        np.random.default_rng(0).standard_normal(20_000),
    ],
    "torch.dtype, device, Size, layout": [
        torch.bfloat16, torch.device("cuda", 1), torch.Size([2, 3]), torch.strided, torch.channels_last,
        torch.__version__, torch.qint8, torch.uint4,
    ],
    "tensors inside": [
        (torch.arange(3), torch.tensor(2.5)), {1: {2: torch.ones(2, dtype=torch.bfloat16)}}, [torch.zeros(0)],
    ],
    "Parameter inside a tuple": [(nn.Parameter(torch.ones(2)),)],
    "quantized tensor": [
        torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8),
        torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.quint8),
    ],
    "sparse tensor": [torch.sparse_coo_tensor([[0, 1], [1, 0]], [1.0, 2.0], (2, 2)).coalesce()],
    "composed tensor, inside": [(TwoTensor(torch.ones(2), torch.zeros(2)),)],
    "many small values": [[*range(4200)], [{"a": n} for n in range(4200)], {n: torch.tensor([n]) for n in range(4200)}],
}  # fmt: skip
"""Every kind of value that a checkpoint keeps, with samples. ``docs/reference/state.md`` is made of it."""

CASES = [pytest.param(value, id=f"{kind} {n}") for kind, values in KINDS.items() for n, value in enumerate(values)]


class Holder:
    """Anything with a state."""

    def __init__(self, state: Any):
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.state, "inside": [{"deeper": self.state}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["value"]
        assert_same(state["inside"], [{"deeper": self.state}])


def through_manager(folder: Path, value: Any, mode: str) -> Any:
    config = CheckpointConfig(enable=True, interval=1, last_save_model_only=False, async_mode=mode)  # type: ignore[arg-type]
    saved, loaded = Holder(value), Holder(None)
    for holder in (saved, loaded):
        manager = CheckpointManager(folder, config, model=nn.Linear(1, 1), train_state=holder)
        if holder is saved:
            manager.save(1)
        else:
            manager.load()
        manager.close()
    return loaded.state


@pytest.mark.parametrize("value", CASES)
def test_a_value_comes_back_as_it_was(memory_path: Path, value: Any) -> None:
    """As a single value, in a nested state through ``save`` and ``load``, and through a manager."""
    assert_same(decode_object("value", encode_object("value", value), "here"), value)
    milepost.save(memory_path / "step-1", {"a": {"value": value}, "list": [{"b": value}]})
    into: dict[str, Any] = {"a": {"value": None}, "list": [{"b": None}]}
    milepost.load(memory_path / "step-1", into)
    assert_same(into, {"a": {"value": value}, "list": [{"b": value}]})
    assert_same(through_manager(memory_path / "run", value, "disabled"), value)


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_in_the_background_too(memory_path: Path, mode: str) -> None:
    value = [part for parts in KINDS.values() for part in parts]
    assert_same(through_manager(memory_path / "run", value, mode), value)


def test_a_stream_comes_back_where_it_was() -> None:
    stream = io.BytesIO(b"abc")
    stream.seek(1)
    found = decode_object("s", encode_object("s", stream), "here")
    assert (found.getvalue(), found.tell()) == (b"abc", 1)


@pytest.mark.parametrize("value", CASES)
def test_stock_torch_reads_the_value(value: Any) -> None:
    """The record of a value is what ``torch.save`` would make of it, or what its reader takes all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.load(io.BytesIO(encode_object("value", value)), weights_only=False)
    assert_same(found, value)


def test_stock_dcp_reads_values_and_tensors(memory_path: Path) -> None:
    state = {"part": {"when": datetime.date(2026, 1, 2), "counts": Counter("ab"), "w": torch.ones(2)}, "n": {1, 2}}
    milepost.save(memory_path / "step-1", state)
    into = {"part": {"when": None, "counts": Counter({"a": 0, "b": 0}), "w": torch.zeros(2)}, "n": None}
    dcp.load(into, checkpoint_id=memory_path / "step-1")
    assert_same(into, state)


# ---- nested states of all types ----

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.sampled_from([part for kind in ("Enum", "numpy scalar", "Path", "registered class") for part in KINDS[kind]]),
    st.datetimes(), st.timedeltas(), st.fractions(), st.uuids(),
)  # fmt: skip
keys = st.one_of(
    st.text(alphabet="abc.", max_size=4),
    st.integers(-9, 9),
    st.none(),
    st.tuples(st.integers(0, 3), st.text(max_size=2)),
)
tensors = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
) | st.builds(lambda size: TwoTensor(torch.ones(size), torch.zeros(size)), st.integers(1, 3))


def containers(children: Any) -> Any:
    mappings = st.dictionaries(keys, children, max_size=4)
    return st.one_of(
        st.lists(children, max_size=4), st.lists(children, max_size=3).map(tuple), mappings, mappings.map(OrderedDict),
        mappings.map(lambda items: defaultdict(list, items)), st.lists(children, max_size=3).map(deque),
        st.builds(Span, st.integers(), children),
    )  # fmt: skip


def has_distinct_keys(value: Any, path: str = "", seen: set[str] | None = None) -> bool:
    """Return whether all values would be stored under distinct keys; others are refused."""
    seen = set() if seen is None else seen
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            here = f"{path}.{key}"
            if here in seen:
                return False
            seen.add(here)
            if not has_distinct_keys(part, here, seen):
                return False
    return True


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    state=st.dictionaries(
        st.text("ab", max_size=2), st.recursive(scalars | tensors, containers, max_leaves=12), max_size=3
    ),
    mode=st.sampled_from(["disabled", "async", "async_with_pinned_mem"]),
)
def test_nested_states_of_all_types(memory_path: Path, state: dict[str, Any], mode: Any) -> None:
    if not has_distinct_keys(state):
        return
    holder, loaded = Holder(state), Holder(None)
    if mode == "disabled":
        milepost.save(memory_path / "step-1", {"holder": holder})
    else:
        milepost.async_save(memory_path / "step-1", {"holder": holder}, mode=mode).committed(60)
    milepost.load(memory_path / "step-1", {"holder": loaded})
    assert_same(loaded.state, state)


@pytest.mark.parametrize(
    "value",
    [
        [*range(2500)],
        [{"id": n, "name": f"sample {n % 7}", "part": (n / 3, None)} for n in range(700)],
        {f"key {n}": [n, True, "a"] for n in range(1100)},
        {n: torch.full((2,), float(n)) for n in range(1000)},
    ],
    ids=["ints", "dicts", "lists", "tensors"],
)
def test_large_plain_values_are_copied_at_once_and_encoded_later(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values written are those at the time of the save, in a form that stock torch reads."""
    monkeypatch.setattr("milepost.tensors.snapshot.FROM_PARTS", 1000)
    monkeypatch.setattr("milepost.tensors.snapshot._AT_ONCE", 300)
    copied = snapshot(value)
    assert copied is not None
    expected = copy.deepcopy(value)
    if isinstance(value, dict):
        first = next(iter(value))
        value[first] = value[first].zero_() if isinstance(value[first], torch.Tensor) else value[first].clear()
    else:
        value.append(1)
        value[0] = value[1].clear() if isinstance(value[1], dict) else 7
    data = copied.encode("value")
    assert_same(decode_object("value", data, "here"), expected)
    assert_same(torch.load(io.BytesIO(data), weights_only=True), expected)


def test_what_is_not_plain_or_small_is_encoded_at_once() -> None:
    assert snapshot([1, 2]) is None
    assert snapshot([*range(30_000), {1}]) is None
    assert snapshot([*range(30_000), np.float32(1)]) is None


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_mappings_of_many_small_values_are_one_value_of_their_own_type(memory_path: Path, mode: str) -> None:
    def made() -> dict[str, Any]:
        return {
            "counter": Counter({n: n for n in range(5000)}),
            "default": defaultdict(list, {f"key {n}": [n] for n in range(5000)}),
            "ordered": OrderedDict((n, -n) for n in range(5000)),
            "inner": {"counters": [Counter(range(4500)), Counter("abc")]},
        }

    config = CheckpointConfig(interval=1, async_mode=mode)  # type: ignore[arg-type]
    with CheckpointManager(memory_path / mode, config, model=nn.Linear(1, 1), train_state=Holder(made())) as manager:
        manager.save(1)
    manifest = read_manifest(LocalStorage(str(memory_path / mode)), "step-1")
    assert sum(key.startswith("train_state.") for key in manifest.objects) < 20
    loaded = Holder({})
    with CheckpointManager(memory_path / mode, config, model=nn.Linear(1, 1), train_state=loaded) as manager:
        manager.load()
    assert_same(loaded.state, made())


# ---- what can't be kept ----


class OfTheUser:
    pass


class Unregistered(enum.Enum):
    A = 1


@dataclasses.dataclass
class AlsoUnregistered:
    a: int = 1


class Attributes(dict[str, int]):
    pass


class Layers(list[Any]):
    pass


HOLDS_ITSELF: list[Any] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)

REFUSED = {
    "lambda": (lambda: None, "store its name"),
    "class": (OfTheUser, "store its name"),
    "builtin": (int, "store its name"),
    "instance": (OfTheUser(), "register_value"),
    "enum": (Unregistered.A, r"call milepost\.register_value\(Unregistered\)"),
    "dataclass": (AlsoUnregistered(), r"call milepost\.register_value\(AlsoUnregistered\)"),
    "generator": (torch.Generator(), r"store what its get_state\(\) returns"),
    "dict of another type": (Attributes(a=1), r"store dict\(\.\.\.\)"),
    "factory": (defaultdict(lambda: 1), "its default is made by"),
    "object array": (np.array([OfTheUser()]), "Python objects"),
    "without data": ((torch.empty(2, device="meta"),), "without data"),
    "contains itself": (HOLDS_ITSELF, "contains itself"),
    "list of another type": (Layers([torch.ones(1)]), r"store list\(\.\.\.\)"),
    "class of numpy": (np.float32, "store its name"),
    "array of another type": (np.ma.array([1]), r"store numpy\.asarray\(\.\.\.\)"),
}


@pytest.mark.parametrize(("value", "advice"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line(memory_path: Path, value: Any, advice: str) -> None:
    with pytest.raises(SaveError, match=advice) as caught:
        milepost.save(memory_path / "step-1", {"part": {"history": (1, [value])}})
    assert caught.value.message.startswith("part.history")
    assert "\n" not in caught.value.message
    if advice != "contains itself":
        assert "part.history[1][0]" in caught.value.message
    assert list(memory_path.iterdir()) == []


TENSORS_REFUSED = {
    "layers": (Layers([torch.ones(1)]), r"store list\(\.\.\.\)"),
    "masked": (torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])), "elements are not its own"),
    "fake": (FakeTensorMode().from_tensor(torch.ones(2)), "a FakeTensor|without data"),
    "nested": (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), r"tensor\.unbind\(\)"),
    "jagged": (torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), r"tensor\.unbind\(\)"),
    "mkldnn": (torch.ones(2).to_mkldnn(), r"tensor\.to_dense\(\)"),
    "half a byte": (torch.empty(2, dtype=torch.uint4), r"dtype uint4.*tensor\.view\(torch\.uint8\)"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of:UserWarning")
@pytest.mark.parametrize("name", TENSORS_REFUSED)
def test_tensors_that_have_no_bytes_of_their_own_are_refused(memory_path: Path, name: str) -> None:
    """Of its own or in a value: never stored as whatever lies where their elements would be."""
    tensor, advice = TENSORS_REFUSED[name]
    for state in ({"a": {name: tensor}}, {"a": {name: (tensor,)}}):
        with pytest.raises(SaveError, match=advice) as caught:
            milepost.save(memory_path / "step-1", state)
        assert caught.value.message.startswith(f"a.{name}")


def test_two_keys_that_look_alike_are_refused(memory_path: Path) -> None:
    with pytest.raises(
        SaveError, match=r"two values would be stored under the key 'a\.1': \('a', 1\) and \('a', '1'\)"
    ):
        milepost.save(memory_path / "step-1", {"a": {1: torch.ones(1), "1": torch.ones(1)}})


def test_a_class_that_this_program_does_not_know(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, with what to do; the step counts as undamaged, and nothing is changed."""
    milepost.save(memory_path / "step-1", {"phase": Phase.STABLE, "w": torch.ones(2)})
    monkeypatch.setattr(registry, "_by_name", {})
    into = {"phase": None, "w": torch.zeros(2)}
    with pytest.raises(ConfigError, match=r"Phase.*milepost\.register_value"):
        milepost.load(memory_path / "step-1", into)
    assert into["w"].tolist() == [0, 0]  # type: ignore[union-attr]


def test_a_class_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """New fields get their defaults; a removed member, or a field without a default, is reported."""
    data = encode_object("best", Best(3, Phase.STABLE))
    phase = registry._by_name[f"{Phase.__module__}.Phase"]
    name = f"{Best.__module__}.Best"

    @dataclasses.dataclass
    class Later:
        step: int
        note: str = "new"

    monkeypatch.setattr(registry, "_by_name", {phase.name: phase})
    milepost.register_value(Later, name=name)
    assert decode_object("best", data, "here") == Later(3)
    with pytest.raises(ConfigError, match="give encode and decode"):
        milepost.register_value(OfTheUser)


def test_values_of_a_checkpoint_of_an_older_version() -> None:
    """Values stored with ``torch.save``, as versions before these forms did, are still read."""
    for value in (
        (torch.arange(3), torch.ones(2)),
        torch.Size([2]),
        torch.bfloat16,
        {1, 2},
        OrderedDict(a=torch.ones(1)),
    ):
        stream = io.BytesIO()
        torch.save(value, stream)
        assert_same(decode_object("value", stream.getvalue(), "here"), value)


# ---- equal values, equal bytes ----


def test_equal_values_give_equal_bytes_whatever_their_objects_are() -> None:
    """Ranks compare them: neither the identity of parts nor the order of a set may make a difference."""
    name = "a name that no interpreter interns"
    one = {"x": [name, name], "s": {"b", "a", "c"}, "n": [(1, 2)] * 3, "t": (torch.ones(2), torch.ones(2))}
    tensor = torch.ones(2)
    other = {
        "x": [name, "".join(list(name))],
        "s": {"c", "a", "b"},
        "n": [(1, 2), (1, *[2]), (1, 2)],
        "t": (tensor, tensor),
    }
    assert encode_object("value", one) == encode_object("value", other)


SET_OF_TEXT = """
import hashlib
from milepost.tensors.value_writer import encode_object
value = {"s": {"b", "a", "c", ("d", 1)}, "f": [frozenset("xyz")]}
print(hashlib.sha256(encode_object("value", value)).hexdigest())
"""


def test_sets_of_text_give_the_same_bytes_in_every_process() -> None:
    """Each process hashes text in its own way."""
    found = {
        subprocess.run(
            [sys.executable, "-c", SET_OF_TEXT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=100,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
