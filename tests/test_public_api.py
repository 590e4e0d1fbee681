"""The public names are stable, and looking one up imports only what it needs."""

from __future__ import annotations

import inspect
import typing

import pytest

import milepost
from milepost import errors

NAMES = [
    "HfModel",
    "CheckpointManager",
    "CheckpointConfig",
    "Commit",
    "save",
    "SaveReport",
    "async_save",
    "SaveHandle",
    "load",
    "LoadReport",
    "OpenCheckpoint",
    "StoredArray",
    "register_value",
    "verify",
    "VerifyReport",
    "StorageReader",
    "StorageWriter",
    "MilepostError",
    "CheckpointDamagedError",
    "CheckpointNotFoundError",
    "ConfigError",
    "ConversionError",
    "DigestMismatchError",
    "FormatError",
    "NewerFormatError",
    "PartlyLoadedError",
    "PlanError",
    "RunLockedError",
    "SaveError",
    "StateMismatchError",
    "StorageError",
]


def test_public_names_are_these() -> None:
    """Removing or renaming one breaks users' programs: only with a major version."""
    assert sorted(milepost.__all__) == sorted(NAMES)
    assert dir(milepost) == sorted([*NAMES, "__version__", "open"])


@pytest.mark.parametrize("name", NAMES)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(milepost, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(milepost.__all__)
    assert all(issubclass(getattr(milepost, name), milepost.MilepostError) for name in errors.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'milepost' has no attribute 'no_such_name'"):
        milepost.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", ["save", "load", "async_save", "verify"])
def test_functions_are_fully_typed(name: str) -> None:
    function = getattr(milepost, name)
    hints = typing.get_type_hints(function)
    assert set(inspect.signature(function).parameters) | {"return"} == set(hints)


def test_signatures_of_the_functions() -> None:
    """Arguments by position and by name, with their defaults."""

    def parameters(function: object) -> dict[str, tuple[str, object]]:
        found = inspect.signature(typing.cast("typing.Callable[..., object]", function)).parameters.values()
        return {p.name: (p.kind.name, None if p.default is p.empty else p.default) for p in found}

    by_position, by_name = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"
    comm = {"comm": (by_name, None)}
    step = {"step": (by_name, None), "kind": (by_name, "state"), "layout": (by_name, None)}
    state = {"path": (by_position, None), "state_dict": (by_position, None)}
    assert parameters(milepost.save) == state | comm | step
    assert parameters(milepost.async_save) == state | {"mode": (by_name, "async")} | comm | step
    assert parameters(milepost.load) == {
        "path": (by_position, None),
        "into": (by_position, None),
        "strict": (by_name, True),
        "allow_missing": (by_name, ()),
        "allow_unexpected": (by_name, ()),
        "mmap": (by_name, False),
        "comm": (by_name, None),
        "read": (by_name, "auto"),
    }
    assert list(parameters(milepost.verify))[:2] == ["path", "level"]
