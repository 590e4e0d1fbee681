"""Text to token ids: bytes, or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from milepost.errors import ConfigError

TokenIds = np.ndarray[Any, np.dtype[np.integer[Any]]]


class Tokenizer(Protocol):
    """Turns text into token ids below ``vocab_size``. ``begin`` and ``end`` go around each document."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Differs between tokenizers that give different ids."""

    @property
    def begin(self) -> tuple[int, ...]: ...

    @property
    def end(self) -> tuple[int, ...]: ...

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """The ids of each text, without ``begin`` and ``end``."""


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

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer as RustTokenizer  # only with such a file: it is an extra dependency
        except ImportError as error:
            raise ConfigError(
                f"model.hf_assets_path: {path} needs the package tokenizers: pip install 'milepost[train]'"
            ) from error
        try:
            content = path.read_bytes()
            self._tokenizer = RustTokenizer.from_buffer(content)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.hf_assets_path: {path} is not a tokenizer: {error}") from error
        self.name = str(path)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.begin, self.end = (self._special(path.with_name("tokenizer_config.json"), k) for k in ("bos", "eos"))

    def _special(self, config_path: Path, kind: str) -> tuple[int, ...]:
        if not config_path.is_file():
            return ()
        try:
            token = dict(json.loads(config_path.read_text(encoding="utf-8"))).get(f"{kind}_token")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"model.hf_assets_path: {config_path} is not a tokenizer's config: {error}") from error
        text = token.get("content") if isinstance(token, dict) else token
        token_id = self._tokenizer.token_to_id(text) if text else None
        return () if token_id is None else (token_id,)

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def build_tokenizer(hf_assets_path: str) -> Tokenizer:
    """The tokenizer of ``hf_assets_path`` where that folder has a ``tokenizer.json``; bytes otherwise."""
    path = Path(hf_assets_path) / "tokenizer.json"
    return HFTokenizer(path) if hf_assets_path and path.is_file() else ByteTokenizer()
