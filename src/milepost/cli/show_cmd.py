"""``milepost show``: print values of a tensor as numpy does."""

from __future__ import annotations

import argparse
import contextlib
import re
from typing import Any

from milepost.cli.paths import is_file
from milepost.cli.render import print_json, print_line
from milepost.errors import CheckpointNotFoundError, ConfigError
from milepost.format.box import Box
from milepost.run import checkpoint_record
from milepost.storage import open_storage
from milepost.storage.base import counted

MAX_NUMEL = 1 << 24
_SLICE = re.compile(r"-\d[-\d:,. ]*")
"""Matches a slice that begins like an option."""
_ONE_DIM = re.compile(r"-?\d{1,18}|(-?\d{1,18})?:(-?\d{1,18})?(:(-?\d{1,18})?)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost show``."""
    parser.description = (
        "Print values of a tensor, or a slice of it, as numpy does. Only the slice is read, and its digests "
        "are checked."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost show outputs/checkpoint/step-40 norm.weight\n"
        "  milepost show outputs/checkpoint/step-40 tok_embeddings.weight '0:4, -8:'\n\n"
        "exit status: 0, 2 wrong usage, 3 no such checkpoint or key, 5 it is damaged, 7 it can't be read\n"
    )
    parser.add_argument("path", metavar="STEP", help="a step, a Hugging Face folder, a .pt or a safetensors file")
    parser.add_argument("key", metavar="KEY", help="the key, or a glob of keys")
    parser.add_argument("slice", metavar="SLICE", nargs="?", default="", help="such as 0:4,-8: (default: all of it)")
    parser._negative_number_matcher = _SLICE  # so that -8: is not parsed as an option
    parser.add_argument("--json", action="store_true", help="print nested lists as JSON")


def run(args: argparse.Namespace) -> int:
    """Read the slice and print it."""
    import numpy as np

    from milepost.interop.weights.boxes import array_dtype
    from milepost.interop.weights.open import open_all
    from milepost.report.globs import matching_keys

    with open_all(args.path) as source:
        shown: dict[str, Any] = {}
        try:
            keys = matching_keys(source.tensors, [args.key], args.path)
        except CheckpointNotFoundError:
            _refuse_value(args.path, args.key)
            raise
        chosen = {key: parse_slice(args.slice, source.tensors[key].shape) for key in keys}
        num_elements = sum(box.numel for box, _ in chosen.values())
        if num_elements > MAX_NUMEL:
            raise ConfigError(f"that is {num_elements:,} elements to read: name a slice of at most {MAX_NUMEL:,}")
        for key, (box, index) in chosen.items():
            out = np.empty(box.sizes, array_dtype(source.tensors[key].dtype))
            if box.numel:
                source.read_into(key, box, out)
            shown[key] = out[index]
        source.check_digests()
    if args.json:
        print_json({key: _plain(array) for key, array in shown.items()})
        return 0
    for key, array in shown.items():
        if len(shown) > 1:
            print_line(f"{key}:")
        print(np.array2string(array.astype(np.float32) if array.dtype.kind == "V" else array))
    return 0


def _refuse_value(path: str, key: str) -> None:
    """Raise ConfigError if ``key`` exists but is not a tensor's."""
    from milepost.report.globs import matching_keys

    storage, name = open_storage(path)
    if is_file(storage, name):
        return
    with contextlib.suppress(CheckpointNotFoundError):
        matching_keys(checkpoint_record.read_manifest(storage, name).objects, [key], path)
        raise ConfigError(f"{key} is a value, not a tensor: milepost inspect {path} --tensors '{key}' prints it")


def _plain(array: Any) -> Any:
    """Convert to nested lists; complex numbers become [real, imaginary]."""
    if array.dtype.kind == "c":
        return [_plain(array.real), _plain(array.imag)]
    return (array.astype("float64") if array.dtype.kind == "V" else array).tolist()


def parse_slice(text: str, shape: tuple[int, ...]) -> tuple[Box, tuple[int | slice, ...]]:
    """Parse a slice into the box to read and the numpy index that selects from it.

    ``text`` is such as ``3``, ``0:4, -8:``, ``..., 2``, ``::2``.

    Raises:
        ConfigError: it has another form or too many dims, or a single index is out of range.
    """
    parts = [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if not parts[-1]:
        parts.pop()  # nothing at all, or a last comma
    if "..." in parts:
        at = parts.index("...")
        parts[at : at + 1] = [":"] * max(0, len(shape) - len(parts) + 1)
    if len(parts) > len(shape):
        raise ConfigError(f"slice '{text}' has {counted(len(parts), 'dim')}, the tensor {len(shape)}: {list(shape)}")
    offsets, sizes, index = [], [], list[int | slice]()
    for dim, size in enumerate(shape):
        part = parts[dim] if dim < len(parts) else ":"
        if not _ONE_DIM.fullmatch(part):
            raise ConfigError(f"slice '{text}': expected numbers such as 3, 0:4 or -8: in each dim, found '{part}'")
        if ":" in part:
            start, stop, step = _bounds(part, size, text)
            taken = range(start, stop, step)
            offsets.append(min(taken[0], taken[-1]) if taken else 0)
            sizes.append(max(taken[0], taken[-1]) + 1 - offsets[-1] if taken else 0)
            index.append(slice(None, None, step))
        else:
            start = int(part) + size if int(part) < 0 else int(part)
            if not 0 <= start < size:
                raise ConfigError(f"slice '{text}': index {part} is out of range for dim {dim} of size {size}")
            offsets.append(start)
            sizes.append(1)
            index.append(0)
    return Box(tuple(offsets), tuple(sizes)), tuple(index)


def _bounds(part: str, size: int, text: str) -> tuple[int, int, int]:
    bounds = [int(bound) if bound else None for bound in part.split(":")]
    if len(bounds) == 3 and bounds[2] == 0:
        raise ConfigError(f"slice '{text}': the step of '{part}' is 0")
    return slice(*bounds).indices(size)
