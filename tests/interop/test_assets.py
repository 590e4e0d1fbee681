"""Untrusted ``--hf-assets``: nothing outside the folder is read, no unknown file is written, memory is bounded."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from milepost.errors import MAX_MESSAGE_LENGTH, ConversionError, FormatError, MilepostError
from milepost.format.huggingface import CONFIG_NAME, INDEX_NAME, MAX_DEPTH, SINGLE_NAME
from milepost.interop.hf.config import make_config
from milepost.interop.hf.extras import MAX_ASSET_NBYTES, HfExtras, hf_extras
from milepost.interop.names.model_sizes import model_args
from milepost.interop.weights.boxes import TensorInfo

ARGS = model_args("llama3", "debugmodel")
CONFIG = make_config("llama3", ARGS, "float32")
TENSORS = {"w": TensorInfo("float32", (4, 4)), "v": TensorInfo("float32", (4,))}


def extras(folder: Path) -> HfExtras:
    return hf_extras("llama3", ARGS, TENSORS, str(folder), None)


def written(folder: Path) -> dict[str, bytes]:
    found = extras(folder)
    return dict(found.files({SINGLE_NAME: list(TENSORS)}, TENSORS))


@pytest.fixture
def folder(memory_path: Path) -> Path:
    """Assets as they are downloaded, and a secret beside them."""
    (memory_path / "secret").write_text("root:x:0:0")
    made = memory_path / "assets"
    made.mkdir()
    (made / CONFIG_NAME).write_text(json.dumps(CONFIG))
    (made / "tokenizer.json").write_text("{}")
    (made / "LICENSE").write_text("free")
    (made / "notes.md").write_text("not taken")
    return made


def test_the_files_of_a_tokenizer_are_taken_and_no_others(folder: Path) -> None:
    assert set(written(folder)) == {CONFIG_NAME, "tokenizer.json", "LICENSE"}


@pytest.mark.parametrize("name", [CONFIG_NAME, "tokenizer.json", "LICENSE", "vocab.txt", INDEX_NAME])
@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "nowhere"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(ConversionError, match="nothing was written") as caught:
        extras(folder)
    assert name in caught.value.problems[0]


def test_all_files_that_are_not_taken_are_named_at_once(folder: Path) -> None:
    for name in ("LICENSE", "tokenizer.json"):
        (folder / name).unlink()
        (folder / name).symlink_to("../secret")
    with pytest.raises(ConversionError) as caught:
        extras(folder)
    assert len(caught.value.problems) == 2


def test_links_into_the_hubs_own_cache_are_followed(memory_path: Path) -> None:
    cache = memory_path / "models--meta-llama--Llama"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name, content in ((CONFIG_NAME, json.dumps(CONFIG)), ("tokenizer.json", '{"a": 1}')):
        (cache / "blobs" / f"blob-of-{name}").write_text(content)
        (snapshot / name).symlink_to(f"../../blobs/blob-of-{name}")
    assert written(snapshot)["tokenizer.json"] == b'{"a": 1}'
    (snapshot / "LICENSE").symlink_to("../../../elsewhere")
    with pytest.raises(ConversionError, match="LICENSE is a link that points outside its folder"):
        extras(snapshot)


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG_NAME, INDEX_NAME])
def test_a_huge_file_is_refused_by_its_size(folder: Path, name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (folder / name).open("wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(ConversionError, match=r"has 20\.0 GiB: more than the limit"):
        extras(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_ASSET_NBYTES >> 10


@pytest.mark.parametrize("name", ["fifo", "folder"])
def test_anything_but_a_regular_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / "LICENSE").unlink()
    if name == "fifo":
        os.mkfifo(folder / "LICENSE")
        with pytest.raises(ConversionError, match="not a regular file"):
            extras(folder)
    else:
        (folder / "LICENSE").mkdir()
        assert set(written(folder)) == {CONFIG_NAME, "tokenizer.json"}


@pytest.mark.parametrize(
    "file", ["-rf", ".hidden.safetensors", "a\nb.safetensors", "../x.safetensors", "config.json", ""]
)
def test_an_index_names_safetensors_files_by_plain_names(folder: Path, file: str) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, file)}))
    with pytest.raises(FormatError, match="expected a safetensors file beside it"):
        extras(folder)


HOSTILE: dict[str, Callable[[], str]] = {
    "a lone surrogate": lambda: json.dumps(CONFIG | {"note": "\ud800"}),
    "a lone surrogate as a name": lambda: json.dumps(CONFIG | {"\udfff": 1}),
    "deep": lambda: json.dumps(CONFIG)[:-1] + ', "a": ' + "[" * 900 + "]" * 900 + "}",
    "deeper than Python reads": lambda: '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "not JSON": lambda: "{",
    "not UTF-8": lambda: "\x80",
    "no object": lambda: "[]",
}


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME])
@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_json_is_malformed(folder: Path, name: str, content: str) -> None:
    (folder / name).write_bytes(HOSTILE[content]().encode("latin-1"))
    with pytest.raises(FormatError, match=name):
        extras(folder)


def test_nesting_up_to_the_limit_is_read(folder: Path) -> None:
    nested = "[" * (MAX_DEPTH - 3) + "]" * (MAX_DEPTH - 3)
    (folder / CONFIG_NAME).write_text(json.dumps(CONFIG)[:-1] + f', "a": {nested}}}')
    assert b'"a"' in written(folder)[CONFIG_NAME]


def test_what_a_file_says_of_itself_is_shown_in_some_kilobytes(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps(CONFIG | {"model_type": "x" * 10_000_000}))
    with pytest.raises(MilepostError) as caught:
        extras(folder)
    assert len(caught.value.message) < MAX_MESSAGE_LENGTH + 100
    assert "characters left out" in caught.value.message
