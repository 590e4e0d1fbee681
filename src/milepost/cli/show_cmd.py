"""``milepost show``: the values of a tensor, as numpy prints them."""

from __future__ import annotations

import argparse
import re
from typing import Any

from milepost.cli.render import print_json
from milepost.cli.stats_cmd import matching_keys
from milepost.errors import ConfigError

MAX_NUMEL = 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost show``."""
    parser.description = (
        "Print values of a tensor, or a slice of it, as numpy does. Only the slice is read, and its bytes are checked."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost show outputs/checkpoint/step-40 norm.weight\n"
        "  milepost show outputs/checkpoint/step-40 tok_embeddings.weight '0:4, -8:'\n\n"
        "exit status: 0, 2 wrong usage, 3 no such checkpoint or key, 5 it is damaged, 7 it can't be read\n"
    )
    parser.add_argument("path", metavar="STEP", help="a step, a Hugging Face folder, a .pt or a safetensors file")
    parser.add_argument("key", metavar="KEY", help="the key, or a glob that matches some")
    parser.add_argument("slice", metavar="SLICE", nargs="?", default="", help="such as 0:4,-8: (default: all of it)")
    parser.add_argument("--json", action="store_true", help="print nested lists as JSON")


def run(args: argparse.Namespace) -> int:
    """Read the slice and print it."""
    import numpy as np

    from milepost.format.box import Box
    from milepost.interop.weights.boxes import array_dtype
    from milepost.interop.weights.open import open_all

    with open_all(args.path) as source:
        shown: dict[str, Any] = {}
        for key in matching_keys(source.tensors, [args.key], args.path):
            info = source.tensors[key]
            box, drop = parse_slice(args.slice, info.shape)
            if box.numel > MAX_NUMEL:
                raise ConfigError(f"that are {box.numel:,} elements: name a slice of at most {MAX_NUMEL:,}")
            out = np.empty(box.sizes, array_dtype(info.dtype))
            if box.numel:
                source.read_into(key, Box(box.offsets, box.sizes), out)
            shown[key] = out.reshape([n for dim, n in enumerate(box.sizes) if dim not in drop])
        source.check_digests()
    if args.json:
        print_json({key: _plain(array) for key, array in shown.items()})
        return 0
    for key, array in shown.items():
        if len(shown) > 1:
            print(f"{key}:")
        print(np.array2string(array.astype(np.float32) if array.dtype.kind == "V" else array))
    return 0


def _plain(array: Any) -> Any:
    """Nested lists; complex numbers as [real, imaginary]."""
    if array.dtype.kind == "c":
        return [_plain(array.real), _plain(array.imag)]
    return (array.astype("float64") if array.dtype.kind == "V" else array).tolist()


def parse_slice(text: str, shape: tuple[int, ...]) -> tuple[Any, set[int]]:
    """The box that ``text`` selects, and the dims that a single index drops: ``3``, ``0:4, -8:``, ``:, 2``.

    Raises:
        ConfigError: it is not of that form, or names more dims than there are, or a single index is out of range.
    """
    from milepost.format.box import Box

    parts = [part.strip() for part in text.strip().strip("[]").split(",")] if text.strip() else []
    if len(parts) > len(shape):
        raise ConfigError(f"slice '{text}' has {len(parts)} dims, the tensor {len(shape)}: {list(shape)}")
    offsets, sizes, drop = [], [], set()
    for dim, size in enumerate(shape):
        part = parts[dim] if dim < len(parts) else ":"
        if not re.fullmatch(r"-?\d+|(-?\d+)?:(-?\d+)?", part):
            raise ConfigError(f"slice '{text}': expected numbers such as 3, 0:4 or -8: in each dim, found '{part}'")
        if ":" in part:
            bounds = [int(bound) if bound else None for bound in part.split(":")]
            start, stop, _ = slice(*bounds).indices(size)
        else:
            start = int(part) + size if int(part) < 0 else int(part)
            stop = start + 1
            drop.add(dim)
            if not 0 <= start < size:
                raise ConfigError(f"slice '{text}': index {part} is out of range for dim {dim} of size {size}")
        offsets.append(start)
        sizes.append(max(0, stop - start))
    return Box(tuple(offsets), tuple(sizes)), drop
