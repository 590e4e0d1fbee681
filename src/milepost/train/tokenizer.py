"""Convert text to token ids: bytes, or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from milepost.errors import ConfigError, StorageError
from milepost.storage import join_path, open_storage

TOKENIZER_NAME = "tokenizer.json"

TokenIds = np.ndarray[Any, np.dtype[np.integer[Any]]]


class Tokenizer(Protocol):
    """Turns text into token ids below ``vocab_size``. ``begin`` and ``end`` go around each document."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """An identifier that differs between tokenizers that give different ids."""

    @property
    def begin(self) -> tuple[int, ...]: ...

    @property
    def end(self) -> tuple[int, ...]: ...

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the ids of each text, without ``begin`` and ``end``."""


class ByteTokenizer:
    """The UTF-8 bytes of the text. A zero byte, which text doesn't contain, ends a document."""

    name = "bytes"
    vocab_size = 256
    fingerprint = "bytes"
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = (0,)

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]


class HFTokenizer:
    """A ``tokenizer.json``, read by the ``tokenizers`` library.

    ``begin`` and ``end`` are the tokens that ``tokenizer_config.json`` beside it names as bos and eos, if any.
    """

    def __init__(self, folder: str):
        path = join_path(folder, TOKENIZER_NAME)
        try:
            from tokenizers import Tokenizer as RustTokenizer  # imported only for such a file: an optional dependency
        except ImportError as error:
            raise ConfigError(
                f"model.hf_assets_path: {path} needs the package tokenizers: pip install 'milepost[train]'"
            ) from error
        try:
            content = _read(path)
            self._tokenizer = RustTokenizer.from_buffer(content)
        except (StorageError, ValueError) as error:
            raise ConfigError(f"model.hf_assets_path: {path} is not a tokenizer: {error}") from error
        self.name = path
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        config = _read_config(join_path(folder, "tokenizer_config.json"))
        self.begin, self.end = (self._special(config, kind) for kind in ("bos", "eos"))

    def _special(self, config: Mapping[str, Any], kind: str) -> tuple[int, ...]:
        token = config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        token_id = self._tokenizer.token_to_id(text) if text else None
        return () if token_id is None else (token_id,)

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def build_tokenizer(hf_assets_path: str) -> Tokenizer:
    """Return the tokenizer of ``hf_assets_path`` if that folder has a ``tokenizer.json``, else bytes."""
    if hf_assets_path and _is_file(join_path(hf_assets_path, TOKENIZER_NAME)):
        return HFTokenizer(hf_assets_path)
    return ByteTokenizer()


def _read_config(path: str) -> dict[str, Any]:
    """Read a ``tokenizer_config.json``; empty if there is none."""
    if not _is_file(path):
        return {}
    try:
        return dict(json.loads(_read(path).decode()))
    except (StorageError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"model.hf_assets_path: {path} is not a tokenizer's config: {error}") from error


def _is_file(path: str) -> bool:
    storage, name = open_storage(path)  # follows links, of which the hub's cache consists
    found = storage.stat(name)
    return found is not None and not found.is_folder


def _read(path: str) -> bytes:
    storage, name = open_storage(path)
    return storage.read(name)
