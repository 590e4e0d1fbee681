"""``milepost.json`` of format 2: its head alone lists a step, and nothing misleading is accepted."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from manifests import StoredBox, lay_out, read_back, record_files

from milepost.config import PARTS
from milepost.errors import FormatError, NewerFormatError
from milepost.format.box import Box
from milepost.format.digest import crc32
from milepost.format.manifest import (
    MANIFEST_NAME,
    SHARDS_NAME,
    BranchStart,
    FileEntry,
    Lineage,
    Manifest,
    PartTotal,
)
from milepost.format.manifest_json import MAX_HEAD_NBYTES, from_json, listing_of, parse_head, to_json
from milepost.format.summary import totals_by_part

LINEAGE = Lineage(
    run="0123456789abcdef",
    order=7,
    branch="b2",
    parent="0123456789abcdef0123456789abcdef",
    parent_step=400,
    trail=(("b1", 3),),
    start=BranchStart(step=400, save_id="0123456789abcdef0123456789abcdef", launch="slurm 12"),
)


@pytest.fixture
def manifest() -> Manifest:
    laid = lay_out(
        {
            "layers.0.w": (
                "bfloat16",
                (4, 3),
                [StoredBox(Box((0, 0), (3, 3)), b"ab" * 9), StoredBox(Box((3, 0), (1, 3)), b"cd" * 3, "__1_0.distcp")],
            ),
            "norm.weight": ("float32", (2,), [StoredBox(Box((0,), (2,)), b"abcdefgh")]),
            "optimizer.state.norm.weight.exp_avg": ("float32", (2,), [StoredBox(Box((0,), (2,)), b"abcdefgh")]),
        },
        {"train_state.step": 500, "optimizer.param_groups.0.lr": 0.1},
        paths={"optimizer.param_groups.0.lr": ("optimizer", "param_groups", 0, "lr")},
    )
    return dataclasses.replace(laid.manifest, extra={"data": {"seed": 1}}, lineage=LINEAGE, metrics={"loss": 2.5})


@pytest.fixture
def record(manifest: Manifest) -> dict[str, bytes]:
    return record_files(manifest)


def framed(document: dict[str, Any]) -> bytes:
    """A document with right CRC-32s in the places where they belong: what an attacker would make."""
    head_names = list(document)[: list(document).index("head_crc32")]
    head = "{\n" + "".join(f"{json.dumps(name)}: {json.dumps(document[name])},\n" for name in head_names)
    rest = [name for name in document if name not in (*head_names, "head_crc32", "crc32")]
    body = head.encode() + b'"head_crc32": "%08x",\n' % crc32(head.encode())
    body += "".join(f"{json.dumps(name)}: {json.dumps(document[name])},\n" for name in rest).encode()
    return body + b'"crc32": "%08x"\n}\n' % crc32(body)


def edited(record: dict[str, bytes], edit: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(record[MANIFEST_NAME])
    edit(document)
    return framed(document)


def read(data: bytes, record: dict[str, bytes]) -> Manifest:
    return from_json(data, read_shards=lambda name, _: record[name])


# ---- what comes back ----


def test_a_manifest_comes_back_equal(manifest: Manifest, record: dict[str, bytes]):
    shards = record[SHARDS_NAME]
    files = {**manifest.files, SHARDS_NAME: FileEntry(len(shards), crc32(shards))}
    assert read_back(record) == dataclasses.replace(manifest, files=files)


def test_the_same_manifest_gives_the_same_bytes_whatever_the_order_of_its_keys(
    manifest: Manifest, record: dict[str, bytes]
):
    turned = dataclasses.replace(
        manifest,
        tensors=dict(reversed(manifest.tensors.items())),
        objects=dict(reversed(manifest.objects.items())),
        files=dict(reversed(manifest.files.items())),
        paths=dict(reversed(manifest.paths.items())),
    )
    assert record_files(turned) == record


def test_a_step_of_other_files_than_records_says_what_they_come_to():
    bare = lay_out({}, {}).manifest
    parts = (PartTotal("model", 3, 10, 20, 0, ("bfloat16",), 3),)
    files = {"model.safetensors": FileEntry(100, 5), "config.json": FileEntry(7, 6)}
    manifest = dataclasses.replace(bare, files=files, parts=parts, objects={}, paths={})
    found = from_json(to_json(manifest))
    assert found == manifest
    assert totals_by_part(found) == list(parts)


def test_it_is_json_that_people_and_tools_can_read(manifest: Manifest, record: dict[str, bytes]):
    text = record[MANIFEST_NAME].decode()
    document = json.loads(text)
    assert document["format_version"] == 2
    assert document["files"][1] == {"name": "__1_0.distcp", "nbytes": manifest.files["__1_0.distcp"].nbytes}
    assert [line for line in text.splitlines() if '"name": "__1_0.distcp"' in line]
    assert [part["part"] for part in document["parts"]] == ["model", "optimizer", "train_state"]


# ---- the head ----


def test_the_head_alone_says_what_a_listing_shows(manifest: Manifest, record: dict[str, bytes]):
    whole = record[MANIFEST_NAME]
    start = whole[: whole.index(b'"files": [')]
    head = parse_head(start)
    assert head is not None
    assert head == parse_head(whole)
    assert (head.manifest.step, head.manifest.save_id, head.manifest.kind) == (500, manifest.save_id, "full")
    assert (head.manifest.lineage, head.manifest.metrics) == (LINEAGE, {"loss": 2.5})
    assert totals_by_part(head.manifest) == totals_by_part(manifest)
    sizes = {name: entry.nbytes for name, entry in manifest.files.items()} | {SHARDS_NAME: len(record[SHARDS_NAME])}
    assert head.listing == listing_of(sizes.items())


@pytest.mark.parametrize("harm", ["missing", "longer", "renamed", "another"])
def test_a_listing_that_differs_in_any_name_or_size_is_detected_by_the_head(manifest: Manifest, harm: str):
    sizes = {name: entry.nbytes for name, entry in manifest.files.items()}
    listing = listing_of(sizes.items())
    name = next(iter(sizes))
    if harm == "missing":
        del sizes[name]
    elif harm == "longer":
        sizes[name] += 1
    elif harm == "renamed":
        sizes["__5_0.distcp"] = sizes.pop(name)
    else:
        sizes["notes.txt"] = 0
    assert listing_of(sizes.items()) != listing


def test_a_head_of_the_usual_fields_is_short():
    """Of 16,384 ranks, every part, lineage and metrics: below 4 KiB."""
    bare = lay_out({}, {}).manifest
    layout = {f"{name}_parallel_degree": 16384 for name in ("data", "tensor", "pipeline", "context", "expert")}
    manifest = dataclasses.replace(
        bare,
        step=10**9,
        world_size=16384,
        layout=layout,
        files={f"__{rank}_0.distcp": FileEntry(1 << 40, 1 << 31) for rank in range(16384)},
        parts=tuple(PartTotal(part, 10**6, 10**13, 10**14, 10**6, ("bfloat16", "float32"), 10**9) for part in PARTS),
        lineage=dataclasses.replace(LINEAGE, trail=tuple((f"{n:08x}", n) for n in range(8))),
        metrics={"loss": 1 / 3, "validation/loss": 2 / 3},
        objects={},
        paths={},
    )
    data = to_json(manifest)
    assert data.index(b'"head_crc32"') < 4000
    assert parse_head(data[:4096]) is not None


def test_a_head_that_a_scan_could_not_read_in_one_go_is_never_written(manifest: Manifest):
    wordy = dataclasses.replace(manifest, metrics={f"metric {n}": 0.5 for n in range(5000)})
    with pytest.raises(ValueError, match=f"at most {MAX_HEAD_NBYTES}"):
        to_json(wordy)


def test_a_head_does_not_say_more_than_the_rest(record: dict[str, bytes]):
    """Lists and loads must not disagree."""
    with pytest.raises(FormatError, match="its head does not match the rest"):
        read(edited(record, lambda d: d["files"][0].update(nbytes=d["files"][0]["nbytes"] + 1)), record)
    moved = json.loads(record[MANIFEST_NAME])
    kept = {name: moved[name] for name in ("format", "format_version", "head_crc32")}
    with pytest.raises(FormatError, match="its head does not match the rest"):
        read(framed(kept | {name: value for name, value in moved.items() if name not in kept}), record)


# ---- what is refused ----


def test_every_flipped_bit_and_every_truncation_is_found(record: dict[str, bytes]):
    for name, data in record.items():
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            for changed in (bytes(damaged), data[:position]):
                with pytest.raises(FormatError) as caught:
                    read_back({**record, name: changed})
                assert not isinstance(caught.value, NewerFormatError)


def test_shards_of_another_save_are_refused(manifest: Manifest, record: dict[str, bytes]):
    other = record_files(dataclasses.replace(manifest, save_id="fedcba9876543210"))
    with pytest.raises(FormatError, match=r"milepost\.json: it is of save .*, milepost\.shards beside it of"):
        read_back({**record, SHARDS_NAME: other[SHARDS_NAME]})
    again = record_files(dataclasses.replace(manifest, paths={}))  # of the same save id, and whole
    with pytest.raises(FormatError, match=r"milepost\.shards: it differs from the file that milepost\.json records"):
        read_back({**record, SHARDS_NAME: again[SHARDS_NAME]})


def test_a_newer_format_asks_for_an_upgrade(record: dict[str, bytes]):
    with pytest.raises(NewerFormatError, match=re.escape("written by a newer Milepost (format 3; this one reads up")):
        read(edited(record, lambda d: d.update(format_version=3, files="of another form")), record)
    aged = edited(record, lambda d: d.update(format_version=3))
    assert parse_head(aged) is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format="other"), "not a Milepost manifest"),
        (lambda d: d.update(format_version="2"), "does not exist"),
        (lambda d: d.update(format_version=True), "does not exist"),
        (lambda d: d.update(step=-1), "step: expected int >= 0"),
        (lambda d: d.update(save_id=None), "save_id: expected str, found null"),
        (lambda d: d.update(created_s="now"), "created_s: expected float, found str"),
        (lambda d: d.update(kind="most"), "kind"),
        (lambda d: d.update(world_size=0), "world_size"),
        (lambda d: d.update(layout={"tp": "2"}), "layout.tp: expected int, found str"),
        (lambda d: d.update(producer={"x": 1}), "producer.x: expected str, found int"),
        (lambda d: d.update(extra=[]), "extra: expected object, found array"),
        (lambda d: d.update(files={}), "files: expected array, found object"),
        (lambda d: d.pop("parts"), "parts is missing"),
        (lambda d: d["parts"][0].update(nbytes=-1), "parts[0].nbytes: expected int >= 0"),
        (lambda d: d["listing"].update(files=1.5), "listing.files: expected int, found float"),
        (lambda d: d.update(lineage={"run": "a"}), "lineage.order is missing"),
        (lambda d: d.update(metrics={"loss": "low"}), "metrics.loss: expected float | null, found str"),
        (lambda d: d["files"][0].update(name="../escape"), "not a plain name"),
        (lambda d: d["files"][0].update(name="\0"), "not a plain name"),
        (lambda d: d["files"][0].update(name="milepost.json"), "lists itself"),
        (lambda d: d["files"][0].update(name="__1_0.distcp"), "listed twice"),
        (lambda d: d["files"][0].update(nbytes=1 << 63), "2**62"),
        (lambda d: d["files"][0].update(crc32=1 << 33), "invalid CRC-32"),
    ],
)
def test_what_could_lead_astray_is_refused(
    record: dict[str, bytes], edit: Callable[[dict[str, Any]], object], message: str
):
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        read(edited(record, edit), record)
    assert caught.value.path == MANIFEST_NAME
    assert not isinstance(caught.value, NewerFormatError)


@pytest.mark.parametrize(
    "text", ['"a": 1, "a": 2,', '"a": NaN,', '"a": ' + "[" * 100_000 + ",", '"a": ' + "9" * 5000 + ",", '"\\x": 1,']
)
def test_invalid_json_is_refused(text: str):
    body = b'{"format": "milepost", ' + text.encode()
    with pytest.raises(FormatError, match="not the JSON of a manifest"):
        from_json(body + b'"crc32": "%08x"\n}\n' % crc32(body))


def test_data_files_that_the_manifest_does_not_list_are_refused(manifest: Manifest, record: dict[str, bytes]):
    def rename(document: dict[str, Any]) -> None:
        document["files"][0]["name"] = "__9_0.distcp"
        document["files"].sort(key=lambda file: file["name"])
        sizes = [(file["name"], file["nbytes"]) for file in document["files"]]
        document["listing"]["crc32"] = listing_of(sizes).crc32

    with pytest.raises(FormatError, match=r"'__0_0\.distcp', which is not a data file of this checkpoint"):
        read(edited(record, rename), record)
