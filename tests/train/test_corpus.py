"""Text in every supported form becomes the same tokens, once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from milepost.errors import ConfigError, StorageError
from milepost.train import corpus as corpus_module
from milepost.train.corpus import Corpus, find_files, load_corpus
from milepost.train.tokenizer import ByteTokenizer, HFTokenizer, build_tokenizer

DOCUMENTS = ["Ein Blatt\nPapier\n", "naïve", "end"]


def load(path: Path, tokenizer=None) -> Corpus:
    return load_corpus("", str(path), tokenizer or ByteTokenizer(), path.parent / "cache")


def as_text(corpus: Corpus) -> str:
    return corpus.tokens.tobytes().decode()


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in documents))


def write_parquet(path: Path, documents: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": documents, "n": [1] * len(documents)}), path)


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> HFTokenizer:
    """A tokenizer.json with one id a word, and the bos and eos that tokenizer_config.json names."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": 3 + i for i in range(400)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assets = tmp_path / "assets"
    assets.mkdir()
    tokenizer.save(str(assets / "tokenizer.json"))
    (assets / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    built = build_tokenizer(str(assets))
    assert isinstance(built, HFTokenizer)
    return built


def test_the_default_data_set_is_english_text_that_every_python_has(tmp_path: Path):
    corpus = load_corpus("python_docs", "", ByteTokenizer(), tmp_path)
    assert len(corpus.tokens) > 300_000
    assert "The assert statement" in as_text(corpus) or '"assert"' in as_text(corpus)


def test_each_form_of_text_gives_the_same_tokens(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    texts = tmp_path / "texts" / "below"
    texts.mkdir(parents=True)
    for number, text in enumerate(DOCUMENTS):
        (texts / f"{number}.txt").write_text(text)
    expected = "".join(text + "\0" for text in DOCUMENTS)
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "texts"):
        assert as_text(load(path)) == expected


def test_a_long_file_is_read_in_parts_that_end_at_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word_tokenizer
):
    monkeypatch.setattr(corpus_module, "_TEXT_PIECE", 10)
    words = [f"w{i}" for i in range(300)]
    (tmp_path / "long.txt").write_text("".join(f"{word}{' ' if i % 3 else chr(10)}" for i, word in enumerate(words)))
    tokens = load(tmp_path / "long.txt", word_tokenizer).tokens
    assert tokens.tolist() == [1, *range(3, 303), 2]


def test_a_tokenizer_json_is_used_with_its_begin_and_end(tmp_path: Path, word_tokenizer: HFTokenizer):
    write_jsonl(tmp_path / "a.jsonl", ["w0 w1", "w399 other"])
    corpus = load(tmp_path / "a.jsonl", word_tokenizer)
    assert corpus.tokens.tolist() == [1, 3, 4, 2, 1, 402, 0, 2]
    assert corpus.tokens.dtype == np.uint16
    assert word_tokenizer.vocab_size == 403


def test_assets_without_a_tokenizer_mean_bytes(tmp_path: Path):
    assert build_tokenizer(str(tmp_path)).name == "bytes"


def test_a_broken_tokenizer_is_reported(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"hf_assets_path: .*tokenizer\.json is not a tokenizer"):
        build_tokenizer(str(tmp_path))


def test_text_is_encoded_once_and_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = load(path)
    with monkeypatch.context() as patched:
        patched.setattr(ByteTokenizer, "encode", None)
        assert load(path).digest == first.digest
    path.write_text("three")
    second = load(path)
    assert as_text(second) == "three\0"
    assert second.digest != first.digest


def test_an_encoding_that_was_cut_short_is_made_again(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    load(path)
    (tokens_file,) = (tmp_path / "cache").glob("*.tokens")
    tokens_file.write_bytes(b"som")
    assert as_text(load(path)) == "some text\0"


@pytest.mark.parametrize("content", [b"", b"{", b'{"dtype": "uint8"}', b'{"dtype":"x","num_tokens":1,"digest":""}'])
def test_an_entry_that_a_power_cut_left_empty_or_torn_is_made_again(tmp_path: Path, content: bytes):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    digest = load(path).digest
    (entry,) = (tmp_path / "cache").glob("*.json")
    entry.write_bytes(content)
    assert load(path).digest == digest
    assert entry.read_bytes() != content


def test_a_cache_that_can_not_be_written_is_a_storage_error_that_names_it(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "cache").touch()
    with pytest.raises(StorageError, match=r"token cache can't be written: File exists: .*/cache\. It goes below job"):
        load(tmp_path / "a.txt")


def test_the_same_text_elsewhere_has_the_same_digest(tmp_path: Path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    assert load(tmp_path / "a.txt").digest == load(tmp_path / "b.txt").digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\xfa", r"a\.txt can't be read: 'utf-8' codec can't decode"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2 is not a JSON object with text in `text`"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1 is not a JSON object with text in `text`"),
        ("a.jsonl", b"text\n", r"a\.jsonl:1 is not a JSON object"),
        ("a.parquet", b"PAR1", r"a\.parquet can't be read"),
        ("a.jsonl", b"\n", r"a\.jsonl: there is no text in it"),
    ],
)
def test_anything_but_text_is_reported_with_its_place(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / name)
    assert not list((tmp_path / "cache").glob("*.draft"))


def test_a_parquet_file_without_text_is_reported(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no column `text`, only \['n'\]"):
        load(tmp_path / "a.parquet")


def test_only_text_files_are_found_and_in_the_order_of_their_names(tmp_path: Path):
    for name in ("b.txt", "a.jsonl", "c.bin"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(tmp_path)] == ["a.jsonl", "b.txt"]
    assert find_files(tmp_path / "c.bin") == []
