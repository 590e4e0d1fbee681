"""Identify files of other formats by their first bytes, for helpful errors.

Magic numbers are from the formats' specifications and ``file(1)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from milepost.errors import ConversionError

HEAD_NBYTES = 512
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_AGAIN = "load it (torch.load with weights_only=True, numpy.load) and save it again with torch.save"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`, or download it again"),
    (_TORCH_LEGACY, f"in torch's format from before version 1.6: {_AGAIN}"),
    (b"GGUF", "a GGUF file, of llama.cpp: convert the model's original safetensors"),
    (b"lmgg", "a GGML file, of llama.cpp: convert the model's original safetensors"),
    (b"tjgg", "a GGML file, of llama.cpp: convert the model's original safetensors"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes: convert the model's safetensors or PyTorch files"),
    (b"\x93NUMPY", f"a numpy array (.npy): {_AGAIN}"),
    (b"\x1f\x8b", "compressed with gzip: decompress it first"),
    (b"BZh", "compressed with bzip2: decompress it first"),
    (b"\xfd7zXZ\0", "compressed with xz: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it first"),
    (b"%PDF-", "a PDF document"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3\0", "an SQLite database"),
)
_DIRECTORY_LINE = re.compile(rb"PK\x01\x02.{24}(..)", re.DOTALL)
_MARKUP = (b"<!doctype html", b"<html", b"<?xml", b"<head", b"<script")


def kind_of(head: bytes, nbytes: int, name: str) -> str:
    """Describe a file by its name, size and first bytes, and what to do with it; empty if unknown.

    Files of torch (since 1.6) and safetensors are reported only under the other's suffix.
    """
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_MARKUP):
        return "a web page, perhaps sent by a server instead of the file: download it again"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b":") and b"torch" in head[:64].lower():
        return "an ONNX model: convert the model it was exported from"
    is_safetensors = len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= nbytes - 8
    if is_safetensors and not name.endswith(".safetensors"):
        return "a safetensors file: give it a name that ends in .safetensors"
    if head.startswith(b"PK\x03\x04") and name.endswith(".safetensors"):
        return "a torch.save or zip file: give it a name that ends in .pt"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and not name.endswith(".safetensors"):
        return "a plain pickle, not written by torch.save: it may run arbitrary code, and is not read"
    return ""


def kind_of_zip(names: list[str]) -> str:
    """Describe a zip file not written by ``torch.save``, by the names of its entries; empty if unknown."""
    if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program: load it with torch.jit.load and save its state_dict()"
    if names and all(name.endswith(".npy") for name in names):
        return f"a file of numpy arrays (.npz): {_AGAIN}"
    if any(name.startswith("[Content_Types]") or name == "META-INF/MANIFEST.MF" for name in names):
        return "a document or a program, not weights"
    return ""


def names_in_tail(tail: bytes) -> list[str]:
    """Return the names of a zip file's entries, as far as its directory is in ``tail``, for any entries."""
    names = []
    for match in _DIRECTORY_LINE.finditer(tail):
        start = match.start() + 46
        names.append(tail[start : start + int.from_bytes(match[1], "little")].decode("utf-8", "replace"))
    return names


def kind_of_pickle(pickled: bytes) -> str:
    """Describe unsupported content in the ``data.pkl`` of a ``torch.save`` file; empty if unknown."""
    if b"torch.nn.modules" in pickled or b"torch.nn.parallel" in pickled:
        return "a module, not its weights: save its state_dict() instead"
    for name, what in (
        (b"_rebuild_qtensor", "quantised tensors: save them dequantised"),
        (b"_rebuild_sparse", "sparse tensors: save them after to_dense()"),
        (b"_rebuild_nested_tensor", "nested tensors: save their parts"),
        (b"_rebuild_wrapper_subclass", "tensors of a subclass: save the wrapped tensors"),
    ):
        if name in pickled:
            return what
    return ""


def refuse_other_kind(read: Callable[[int, int], bytes], nbytes: int, path: str, name: str) -> None:
    """Refuse a file of ``nbytes``, read by ``read(offset, nbytes)``, that is known to be of another kind.

    ``name`` determines the expected format; for a link, ``path`` may have another name.

    Raises:
        ConversionError: with its actual kind.
    """
    what = kind_of(read(0, min(nbytes, HEAD_NBYTES)), nbytes, name)
    if what:
        raise ConversionError(f"{path} is {what}", path=path)
