"""Encode text files into one array of token ids on disk, which every rank maps into memory.

Text is encoded once: the array's file name is a digest of its inputs (the files' names, sizes and times, and the
tokenizer), so that a restart or another rank maps it at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np

from milepost.errors import ConfigError, StorageError
from milepost.train.tokenizer import TokenIds, Tokenizer

SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Suffixes of the supported text files."""

_PIECES_AT_ONCE = 256
_TEXT_PIECE = 1 << 20


class TextPart(NamedTuple):
    """A document or a part of one. Long files come in parts, so that they need not fit in memory."""

    text: str
    begins: bool = True
    ends: bool = True


def _python_docs() -> Iterator[TextPart]:
    from pydoc_data import topics  # imported here: 0.5 MB, needed only for this data set

    for name in sorted(topics.topics):
        yield TextPart(topics.topics[name])


BUILT_IN: dict[str, Callable[[], Iterator[TextPart]]] = {"python_docs": _python_docs}
"""Built-in data sets: name -> documents."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """An array of token ids. ``digest`` covers the ids, so it does not change when files are moved or touched."""

    tokens: TokenIds
    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """The record beside a token file that marks it as complete."""

    dtype: str
    num_tokens: int
    digest: str


def find_files(path: Path) -> list[Path]:
    """Return ``path`` itself if it is a text file, else all text files below it, sorted by name."""
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    return sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())


def load_corpus(dataset: str, dataset_path: str, tokenizer: Tokenizer, cache_folder: Path) -> Corpus:
    """Load the tokens of the files at ``dataset_path`` or, if that is empty, of the built-in ``dataset``.

    Several processes may call this at once: each result is put in place atomically.

    Raises:
        ConfigError: a file can't be read in the format of its suffix.
        StorageError: ``cache_folder`` can't be written.
    """
    if dataset_path:
        files = find_files(Path(dataset_path))
        name = Path(dataset_path).resolve().name
        pieces: Iterator[TextPart] = itertools.chain.from_iterable(map(_read_file, files))
        source = [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    else:
        name = dataset
        source = [dataset, sys.version]
        pieces = BUILT_IN[dataset]()
    key = hashlib.sha256(json.dumps([source, tokenizer.fingerprint]).encode()).hexdigest()[:16]
    entry_path = cache_folder / f"{name}-{key}.json"
    entry = _read_entry(entry_path) or _write_entry(pieces, tokenizer, entry_path)
    if entry.num_tokens == 0:
        raise ConfigError(f"training.dataset_path {dataset_path}: there is no text in it")
    tokens = np.memmap(_data_path(entry_path), dtype=entry.dtype, mode="r", shape=(entry.num_tokens,))
    return Corpus(tokens, name, entry.digest)


def _read_entry(entry_path: Path) -> _Entry | None:
    """Return the entry if it and its token file are complete; after a power cut either may be empty or truncated."""
    try:
        entry = msgspec.json.decode(entry_path.read_bytes(), type=_Entry)
        expected_nbytes = entry.num_tokens * np.dtype(entry.dtype).itemsize
        found_nbytes = _data_path(entry_path).stat().st_size
    except (OSError, TypeError, msgspec.DecodeError):
        return None
    return entry if found_nbytes == expected_nbytes else None


def _write_entry(pieces: Iterator[TextPart], tokenizer: Tokenizer, entry_path: Path) -> _Entry:
    try:
        entry_path.parent.mkdir(parents=True, exist_ok=True)
        return _encode(pieces, tokenizer, entry_path)
    except OSError as error:
        raise StorageError(
            f"the token cache can't be written: {error.strerror or error}: {error.filename or entry_path}. It goes "
            "below job.dump_folder",
            operation="write",
            path=str(entry_path),
            errno=error.errno,
        ) from error


def _data_path(entry_path: Path) -> Path:
    return entry_path.with_suffix(".tokens")


def _encode(pieces: Iterator[TextPart], tokenizer: Tokenizer, entry_path: Path) -> _Entry:
    """Write the token file, then its entry, each under a temporary name and, once durable, renamed into place."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    data_path = _data_path(entry_path)
    draft_path = data_path.with_suffix(f".{os.getpid()}.draft")
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with draft_path.open("wb") as draft:
            for batch in _batched(pieces):
                for piece, ids in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
                    begin = tokenizer.begin if piece.begins else ()
                    end = tokenizer.end if piece.ends else ()
                    data = np.concatenate([begin, ids, end]).astype(dtype).tobytes()
                    digest.update(data)
                    num_bytes += draft.write(data)
            _make_durable(draft)
        draft_path.replace(data_path)
        entry = _Entry(dtype.name, num_bytes // dtype.itemsize, digest.hexdigest()[:32])
        with draft_path.open("wb") as draft:
            draft.write(msgspec.json.encode(entry))
            _make_durable(draft)
        draft_path.replace(entry_path)
    finally:
        draft_path.unlink(missing_ok=True)
    return entry


def _make_durable(file: IO[bytes]) -> None:
    """Sync a file and its folder: a name must not survive a power cut without its content."""
    file.flush()
    os.fsync(file.fileno())


def _batched(pieces: Iterator[TextPart]) -> Iterator[list[TextPart]]:
    while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        yield batch


def _read_file(path: Path) -> Iterator[TextPart]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        yield from readers[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"training.dataset_path: {path} can't be read: {error}") from error


def _read_text(path: Path) -> Iterator[TextPart]:
    def part() -> str:
        return file.read(_TEXT_PIECE) + file.readline()  # to the end of a line, so that no word is split

    with path.open(encoding="utf-8") as file:
        text, begins = part(), True
        while text:
            following = part()
            yield TextPart(text, begins, ends=not following)
            text, begins = following, False


def _read_jsonl(path: Path) -> Iterator[TextPart]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ConfigError(f"training.dataset_path: {path}:{number} is not a JSON object with text in `text`")
            if text:
                yield TextPart(text)


def _read_parquet(path: Path) -> Iterator[TextPart]:
    try:
        from pyarrow import ArrowInvalid, parquet  # imported only for such a file: an optional dependency
    except ImportError as error:
        raise ConfigError(
            f"training.dataset_path: {path} needs the package pyarrow: pip install 'milepost[train]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ConfigError(f"training.dataset_path: {path} can't be read: {error}") from error
    if "text" not in file.schema_arrow.names:
        raise ConfigError(f"training.dataset_path: {path} has no column `text`, only {file.schema_arrow.names}")
    for batch in file.iter_batches(columns=["text"], batch_size=_PIECES_AT_ONCE):
        yield from (TextPart(text) for text in batch.column(0).to_pylist() if text)
