"""``milepost.json`` of format 1: it is read back unchanged, and anything misleading is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from format_1 import to_json_1
from manifests import StoredBox, lay_out

from milepost.errors import MAX_LISTED, FormatError, NewerFormatError
from milepost.format.box import Box
from milepost.format.digest import crc32
from milepost.format.manifest import BranchStart, FileEntry, Lineage, Manifest
from milepost.format.manifest_check import is_plain_name, manifest_faults
from milepost.format.manifest_json import from_json

W = "layers.0.attention.wq.weight"


@pytest.fixture
def manifest() -> Manifest:
    laid = lay_out(
        {
            W: (
                "bfloat16",
                (4, 3),
                [StoredBox(Box((0, 0), (3, 3)), b"ab" * 9), StoredBox(Box((3, 0), (1, 3)), b"cd" * 3, "__1_0.distcp")],
            ),
            "norm.weight": ("float32", (2,), [StoredBox(Box((0,), (2,)), b"abcdefgh")]),
            "scalar": ("int64", (), [StoredBox(Box((), ()), b"abcdefgh")]),
            "empty": ("float32", (0, 5), [StoredBox(Box((0, 0), (0, 5)), b"")]),
            'odd "key"\né\ud800': ("bool", (1,), [StoredBox(Box((0,), (1,)), b"\1")]),
        },
        {"train_state.step": 500, "optimizer.param_groups.0.lr": 0.1},
        paths={"optimizer.param_groups.0.lr": ("optimizer", "param_groups", 0, "lr")},
    )  # fmt: skip
    return dataclasses.replace(laid.manifest, extra={"data": {"seed": 1, "names": ["a"]}}, structure=b"not recorded")


def edited(manifest: Manifest, edit: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest's JSON after a change, with a CRC-32 that is right again: what an attacker would make."""
    document = json.loads(to_json_1(manifest))
    del document["crc32"]
    edit(document)
    body = (json.dumps(document)[:-1] + ",\n").encode()
    return body + b'"crc32": "%08x"\n}\n' % crc32(body)


def test_a_manifest_comes_back_equal(manifest: Manifest):
    assert from_json(to_json_1(manifest)) == manifest


@pytest.mark.parametrize("text", ["#", "YQ", "é"])
def test_a_structure_that_is_no_base64_is_refused(manifest: Manifest, text: str):
    with pytest.raises(FormatError, match="its structure is malformed"):
        from_json(edited(manifest, lambda document: document["extra"].update(structure=text)))


LINEAGE = Lineage(
    run="a1",
    order=9,
    branch="b2",
    parent="c3",
    parent_step=400,
    trail=(("b1", 7), ("", 300)),
    start=BranchStart(400, "c3", "slurm-7"),
    seen=300,
)


@pytest.mark.parametrize("lineage", [LINEAGE, Lineage(run="a1", order=0, branch="b1")])
def test_lineage_and_metrics_come_back_equal(manifest: Manifest, lineage: Lineage):
    recorded = dataclasses.replace(manifest, lineage=lineage, metrics={"loss": 2.5, "accuracy": 0.0})
    assert from_json(to_json_1(recorded)) == recorded


def test_a_metric_that_is_not_finite_comes_back_as_nan(manifest: Manifest):
    values = {"loss": math.inf, "other": math.nan}
    found = from_json(to_json_1(dataclasses.replace(manifest, metrics=values))).metrics
    assert found.keys() == values.keys()
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    "harm",
    [
        {"lineage": 7},
        {"lineage": {}},
        {"lineage": {"run": "a", "order": -1, "branch": "b"}},
        {"lineage": {"run": "a", "order": 1, "branch": 2}},
        {"lineage": {"run": "a", "order": 1, "branch": "b", "trail": [["b"]]}},
        {"lineage": {"run": "a", "order": 1, "branch": "b", "trail": [["b", "1"]]}},
        {"lineage": {"run": "a", "order": 1, "branch": "b", "start": 400}},
        {"lineage": {"run": "a", "order": 1, "branch": "b", "start": {"step": -2}}},
        {"lineage": {"run": "a", "order": 1, "branch": "b", "seen": "x"}},
        {"metrics": [1]},
        {"metrics": {"loss": "2"}},
        {"metrics": {"loss": 10**400}},
    ],
)
def test_an_invalid_lineage_or_metric_is_refused(manifest: Manifest, harm: dict[str, Any]):
    with pytest.raises(FormatError):
        from_json(edited(manifest, lambda document: document.update(harm)))


def test_the_same_manifest_gives_the_same_bytes_whatever_the_order_of_its_keys(manifest: Manifest):
    turned = dataclasses.replace(
        manifest,
        tensors=dict(reversed(manifest.tensors.items())),
        files=dict(reversed(manifest.files.items())),
        paths=dict(reversed(manifest.paths.items())),
    )
    assert to_json_1(turned) == to_json_1(manifest)


def test_a_checkpoint_of_nothing_and_one_without_step_come_back(manifest: Manifest):
    empty = dataclasses.replace(manifest, step=None, tensors={}, objects={}, files={}, paths={}, extra={})
    assert from_json(to_json_1(empty)) == empty


def test_it_is_json_that_people_and_tools_can_read(manifest: Manifest):
    text = to_json_1(manifest).decode()
    document = json.loads(text)
    assert document["format_version"] == 1
    assert document["files"][1] == {"name": "__1_0.distcp", "nbytes": manifest.files["__1_0.distcp"].nbytes}
    assert document["tensors"][W]["shape"] == [4, 3]
    assert [line for line in text.splitlines() if line.startswith(f'"{W}"')]


def test_every_flipped_bit_and_every_truncation_is_found(manifest: Manifest):
    data = to_json_1(manifest)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(FormatError):
            from_json(bytes(damaged))
        with pytest.raises(FormatError):
            from_json(data[:position])


def test_a_newer_format_asks_for_an_upgrade(manifest: Manifest):
    with pytest.raises(NewerFormatError, match="format 3; this one reads up to 2"):
        from_json(edited(manifest, lambda d: d.update(format_version=3, tensors="of another form")))


def test_an_error_names_the_file_and_the_key(manifest: Manifest):
    def grow(document: dict[str, Any]) -> None:
        document["tensors"][W]["shape"] = [5, 3]

    with pytest.raises(FormatError, match=W) as caught:
        from_json(edited(manifest, grow), path="step-5/milepost.json")
    assert caught.value.path == "step-5/milepost.json"
    assert caught.value.key == W
    assert "step-5/milepost.json" in str(caught.value)


def _set(*path: object) -> Callable[[dict[str, Any]], None]:
    """Replace the value at ``path[:-1]`` in the document by ``path[-1]``."""

    def edit(document: Any) -> None:
        *way, last, value = path
        for part in way:
            document = document[part]
        document[last] = value

    return edit


SHARD = ("tensors", "norm.weight", "shards", 0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("format", "other"), "not a Milepost manifest"),
        (_set("format_version", "1"), "does not exist"),
        (_set("format_version", 0), "does not exist"),
        (_set("step", -1), "step"),
        (_set("step", 1.5), "step"),
        (_set("save_id", None), "save_id"),
        (_set("created_s", "now"), "created_s"),
        (_set("kind", "most"), "kind"),
        (_set("world_size", 0), "world_size"),
        (_set("layout", {"tp": "2"}), "layout.tp"),
        (_set("producer", {"x": 1}), "producer.x"),
        (_set("extra", []), "extra"),
        (_set("files", {}), "files"),
        (_set("files", 0, "name", "../escape"), "not a plain name"),
        (_set("files", 0, "name", "/etc/passwd"), "not a plain name"),
        (_set("files", 0, "name", "sub/file"), "not a plain name"),
        (_set("files", 0, "name", ".."), "not a plain name"),
        (_set("files", 0, "name", "nul\0"), "not a plain name"),
        (_set("files", 0, "name", "__1_0.distcp"), "listed twice"),
        (_set("files", 0, "name", "milepost.json"), "lists itself"),
        (_set("files", 0, "name", ".metadata"), "not a data file"),
        (_set("files", 0, "nbytes", 100), "has 100 bytes"),
        (_set("files", 0, "nbytes", 1 << 63), "2**62"),
        (_set("files", 0, "nbytes", True), "files[0].nbytes: expected int, found bool"),
        (_set("files", 0, "crc32", 1 << 33), "invalid CRC-32"),
        (_set("tensors", "norm.weight", "dtype", "float99"), "float99"),
        (_set("tensors", "norm.weight", "shape", [300]), "is not inside its record"),
        (_set("tensors", W, "shape", [5, 3]), "3 of 15 elements are in no shard"),
        (_set("tensors", "norm.weight", "shape", [-2]), "tensors.norm.weight.shape[0]: expected int >= 0"),
        (_set("tensors", "norm.weight", "shape", [1 << 61, 1 << 61]), "invalid shape"),
        (_set("tensors", "norm.weight", "shape", [1] * 65), "norm.weight.shape: expected array of length <= 64"),
        (_set("tensors", "norm.weight", "shape", 2), "tensors.norm.weight.shape: expected array, found int"),
        (_set("tensors", "norm.weight", "path", [1.5]), "path"),
        (_set("tensors", "norm.weight", "shards", []), "no shard holds"),
        (_set("tensors", "norm.weight", "shards", None), "tensors.norm.weight.shards: expected array, found null"),
        (_set("tensors", "norm.weight", []), "tensors.norm.weight: expected object, found array"),
        (_set(*SHARD, [0, 0]), "tensors.norm.weight.shards[0]: expected array of at least length 5, found 2"),
        (_set(*SHARD, 0, 9), "file number 9 of 2"),
        (_set(*SHARD, 0, 1), "has"),
        (_set(*SHARD, 1, 1 << 62), "is recorded in bytes"),
        (_set(*SHARD, 2, 1 << 40), "is recorded in bytes"),
        (_set(*SHARD, 2, 0), "is recorded in bytes"),
        (_set(*SHARD, 3, 0), "is not inside its record"),
        (_set(*SHARD, 3, None), "tensors.norm.weight.shards[0][3]: expected int, found null"),
        (_set(*SHARD, 4, 1 << 32), "invalid CRC-32"),
        (_set("tensors", W, "shards", 1, 5, [2, 0]), "stored more than once"),
        (_set("tensors", W, "shards", 1, 6, [2, 3]), "is not inside shape"),
        (_set("tensors", W, "shards", 1, 6, [1]), "is not inside shape"),
        (_set("tensors", W, "shards", 1, 5, [3]), "is not inside shape"),
        (_set("objects", "train_state.step", {}), "objects.train_state.step.record is missing"),
        (_set("objects", "train_state.step", "record", 1, 0), "overlap"),
        (_set("objects", "scalar", {"record": [1, 0, 10, 0]}), "both a tensor and an object"),
    ],
)  # fmt: skip
def test_what_could_lead_astray_is_refused(manifest: Manifest, edit: Callable[[dict[str, Any]], None], message: str):
    with pytest.raises(FormatError, match=re.escape(message)):
        from_json(edited(manifest, edit))


@pytest.mark.parametrize(
    "text", ['"a": 1, "a": 2,', '"a": NaN,', '"a": ' + "[" * 100_000 + ",", '"a": ' + "9" * 5000 + ",", '"\\x": 1,']
)
def test_invalid_json_is_refused(text: str):
    body = b'{"format": "milepost", ' + text.encode()
    with pytest.raises(FormatError, match="not the JSON of a manifest"):
        from_json(body + b'"crc32": "%08x"\n}\n' % crc32(body))


def test_all_faults_are_reported_at_once(manifest: Manifest):
    def break_two(document: dict[str, Any]) -> None:
        document["tensors"]["norm.weight"]["shape"] = [300]
        document["tensors"]["scalar"]["dtype"] = "float99"

    with pytest.raises(FormatError, match=r"norm\.weight.*float99"):
        from_json(edited(manifest, break_two))


def test_a_manifest_with_a_fault_is_never_written(manifest: Manifest):
    gap = dataclasses.replace(manifest.tensors[W], shards=manifest.tensors[W].shards[:1])
    with pytest.raises(ValueError, match=r"must not be committed.*3 of 12 elements"):
        to_json_1(dataclasses.replace(manifest, tensors={**manifest.tensors, W: gap}))


@pytest.mark.parametrize("field", ["data_offset", "crc32"])
def test_an_item_without_digest_or_place_is_never_written(manifest: Manifest, field: str):
    entry = manifest.tensors["scalar"]
    bare = dataclasses.replace(entry, shards=(dataclasses.replace(entry.shards[0], **{field: None}),))
    with pytest.raises(ValueError, match="can't be committed"):
        to_json_1(dataclasses.replace(manifest, tensors={**manifest.tensors, "scalar": bare}))


def test_an_object_without_digest_is_never_written(manifest: Manifest):
    bare = dataclasses.replace(manifest.objects["train_state.step"], crc32=None)
    with pytest.raises(ValueError, match="can't be committed"):
        to_json_1(dataclasses.replace(manifest, objects={"train_state.step": bare}, paths={}))


def test_paths_of_keys_that_are_not_stored_are_a_fault(manifest: Manifest):
    faults = manifest_faults(dataclasses.replace(manifest, paths={"ghost": ("ghost",)}))
    assert [fault.key for fault in faults] == ["ghost"]


def test_the_number_of_faults_is_limited(manifest: Manifest):
    many = {f"sub/{i}": FileEntry(0) for i in range(100)}
    assert len(manifest_faults(dataclasses.replace(manifest, files={**manifest.files, **many}))) == MAX_LISTED


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "a b", "é"])
def test_plain_names_are_allowed(name: str):
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "a\n", "\x1b[2J", "x" * 256, "\ud800"])
def test_other_names_are_not(name: str):
    assert not is_plain_name(name)
