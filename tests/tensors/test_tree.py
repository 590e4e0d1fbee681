"""The nesting of values is rebuilt from the checkpoint's record, each value in its own place."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from milepost.errors import FormatError
from milepost.format.manifest import Manifest, ObjectEntry
from milepost.tensors.tree import Ref, Tree


def manifest(paths: Mapping[str, tuple[str | int, ...]]) -> Manifest:
    objects = {key: ObjectEntry("__0_0.distcp", 100 * n, 100, None) for n, key in enumerate(("a.b", "a.c", "d"))}
    return Manifest(
        step=1, save_id="", created_s=0.0, kind="full", world_size=1, layout={}, producer={}, tensors={},
        objects=objects, files={}, paths=paths,
    )  # fmt: skip


def test_keys_stand_where_their_paths_say_or_where_their_dots_divide() -> None:
    nested = {"a": {"b": Ref("a.b"), "c": Ref("a.c")}, "d": Ref("d")}
    assert Tree.of(manifest({})).root == nested
    assert Tree.of(manifest({"a.b": ("a.b",)})).root == {"a.b": Ref("a.b"), "a": {"c": Ref("a.c")}, "d": Ref("d")}


@pytest.mark.parametrize("path", [("a", "c"), ("d",), ("a", "b", "c"), ()])
def test_a_path_that_is_another_keys_is_damage(path: tuple[str, ...]) -> None:
    """Otherwise the value of the other key would be lost, and its target left unchanged."""
    with pytest.raises(FormatError, match=r"the key 'a\.b' the path .*belongs to another key"):
        Tree.of(manifest({"a.b": path}))
