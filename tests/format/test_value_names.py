"""Untrusted values examined without torch: exactly those are accepted that a load accepts."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch._weights_only_unpickler import _get_allowed_globals

from milepost.errors import FormatError
from milepost.format.dtype import DTYPES
from milepost.format.value_names import VALUE_NAMES, check_value
from milepost.tensors.value_reader import _STORAGES, decode_object
from milepost.tensors.value_types import VALUE_GLOBALS
from milepost.verification.verify import verify


class Runs:
    """A value whose pickle runs code when it is loaded."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


HARMLESS = [
    *(None, 3, 2.5, "text", b"bytes", [1, [2]], {"a": {"b": (1, None)}}, {1, 2}, frozenset({3})),
    *(np.arange(5), np.float32(2), collections.OrderedDict(a=1), collections.deque([1]), collections.Counter("aab")),
    *(datetime.datetime(2026, 1, 1), pathlib.PurePosixPath("/x"), io.BytesIO(b"x"), torch.Size([1]), torch.float16),
    *({"t": torch.ones(3)}, [torch.nn.Parameter(torch.ones(2))], collections.defaultdict(list, a=[1])),
]
REFUSED = [
    Runs(os.system, "true"),
    Runs(eval, "1"),
    {"deep": [{"in": Runs(getattr, "text", "upper")}]},
    [torch.ones(1), Runs(print)],
    argparse.Namespace(a=1),
    pickle.Pickler,
    torch.nn.Linear(1, 1),
]


def stored(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def fault(data: bytes) -> str | None:
    try:
        check_value(lambda at, nbytes: data[at : at + nbytes], len(data))
    except FormatError as error:
        return error.message
    return None


def test_the_names_are_those_that_the_loader_and_torch_know() -> None:
    newer = {f"torch.{name}" for name in DTYPES if not hasattr(torch, name)}
    known = {*VALUE_GLOBALS, *_STORAGES, *newer}
    assert known <= VALUE_NAMES
    assert VALUE_NAMES - known <= {*_get_allowed_globals(), "torch._utils._rebuild_tensor_v3"}


@pytest.mark.parametrize(
    "value", HARMLESS, ids=lambda value: f"{type(value).__name__} {value}".partition(" object at ")[0]
)
def test_a_value_that_loads_has_no_fault(value: Any) -> None:
    decode_object("key", stored(value), "path")
    assert fault(stored(value)) is None


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_a_value_that_a_load_refuses_is_named(value: Any) -> None:
    with pytest.raises(FormatError):
        decode_object("key", stored(value), "path")
    assert "not allowed" in (fault(stored(value)) or "")


def test_a_limit_is_the_end_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that one reader finds too large is given to another."""
    bomb: Any = []
    for _ in range(60):
        bomb = [bomb, bomb]
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    with pytest.raises(FormatError, match="can't be read: a value expands"):
        decode_object("key", stored(bomb), "path")


def test_verify_says_what_a_load_of_an_external_folder_would_refuse(memory_path: Path) -> None:
    dcp.save({"w": torch.ones(3), "fine": {"a": 1}}, checkpoint_id=memory_path / "c", no_dist=True)
    assert verify(memory_path / "c").verdict == "not_verified"
    dcp.save({"w": torch.ones(3), "evil": Runs(os.system, "true")}, checkpoint_id=memory_path / "c", no_dist=True)
    report = verify(memory_path / "c")
    assert report.verdict == "damaged"
    (problem,) = report.problems
    assert problem.key == "evil"
    assert "a load refuses this value" in problem.message
    assert "system" in problem.message
