"""Elements are followed through programs that move them: what is read by the found boxes is what the program makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from milepost.format.box import Box
from milepost.interop.hf.kept import KeptNames
from milepost.interop.hf.save import parts
from milepost.interop.hf.traced import Tracer
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.rules import Link
from milepost.interop.weights.boxes import Array, TensorInfo

State = dict[str, torch.Tensor]


class Arrays:
    """Arrays to read from."""

    def __init__(self, arrays: Mapping[str, Array]):
        self.arrays = arrays
        self.tensors = {key: TensorInfo(str(array.dtype), array.shape) for key, array in arrays.items()}

    def read_into(self, key: str, box: Box, out: Array) -> None:
        out[...] = self.arrays[key][box.index()]

    def unit_rows(self, key: str) -> int:
        return 1


def heads(tensor: torch.Tensor, count: int, first: int) -> torch.Tensor:
    """Exchange rows within heads, as ``PermuteForRope`` of transformers does."""
    inner = (first, tensor.shape[0] // count // first)
    return tensor.view(count, *inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def interleaved(tensor: torch.Tensor, dim: int, inverse: bool = False) -> torch.Tensor:
    """Like ``Interleave`` of transformers."""
    shape, size = list(tensor.shape), tensor.shape[dim]
    shape[dim : dim + 1] = [2, size // 2] if inverse else [size // 2, 2]
    return tensor.reshape(shape).transpose(dim, dim + 1).reshape(tensor.shape).contiguous()


PROGRAMS: dict[str, Callable[[State], State]] = {
    "the same": lambda s: dict(s),
    "joined": lambda s: {"qkv": torch.cat([s["a"], s["b"]]), "c": s["c"], "v": s["v"]},
    "joined along columns": lambda s: {"ab": torch.cat([s["a"], s["b"]], dim=1)},
    "cut": lambda s: {f"c{n}": part.contiguous() for n, part in enumerate(torch.chunk(s["c"], 2, dim=1))},
    "experts apart": lambda s: {f"c{n}": part.squeeze(0) for n, part in enumerate(torch.chunk(s["c"], 3))},
    "experts apart, cut and turned": lambda s: {
        f"{n}.{half}": part[n].transpose(0, 1).contiguous()
        for half, part in enumerate(torch.chunk(s["c"], 2, dim=1))
        for n in range(3)
    },
    "stacked": lambda s: {"ab": torch.stack([s["a"], s["b"]])},
    "stacked, turned": lambda s: {"ab": torch.stack([s["a"].T.contiguous(), s["b"].T]).transpose(1, 2).contiguous()},
    "turned, joined, cut anew": lambda s: {
        f"{n}": part.contiguous() for n, part in enumerate(torch.cat([s["a"].T, s["b"].T], dim=1).split([3, 13], dim=1))
    },
    "heads to pairs": lambda s: {"a": heads(s["a"], 2, 2), "v": heads(s["v"], 2, 2)},
    "heads to halves": lambda s: {"a": heads(s["a"], 1, 4), "v": heads(s["v"], 1, 4)},
    "heads, then joined": lambda s: {"qkv": torch.cat([heads(s["a"], 2, 2), heads(s["b"], 1, 2), s["a"]])},
    "interleaved": lambda s: {"a": interleaved(s["a"], 0), "b": interleaved(s["b"], 0, inverse=True)},
    "experts interleaved": lambda s: {"c": interleaved(s["c"], 1), "v": interleaved(s["v"], 0, inverse=True)},
    "an empty one": lambda s: {"e": s["e"].clone(), "ae": torch.cat([s["e"], s["a"]])},
    "a number": lambda s: {"n": s["n"].clone(), "one": s["one"]},
}


def originals(device: str) -> State:
    sizes = {"a": (8, 6), "b": (8, 6), "c": (3, 8, 6), "v": (8,), "e": (0, 6), "n": (), "one": (1, 1, 1)}
    found, start = {}, 0
    for key, shape in sizes.items():
        numel = int(np.prod(shape))
        found[key] = torch.arange(start, start + numel, dtype=torch.float32).reshape(shape).to(device)
        start += numel
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_found_boxes_give_what_the_program_makes_and_back(name: str) -> None:
    meta = originals("meta")
    tracer = Tracer(meta)
    with tracer:
        results = PROGRAMS[name](meta)
    links, theirs = [], {}
    for key, result in results.items():
        moves = tracer.moves(result)
        assert moves is not None, key
        assert sum(move.box.numel for move in moves) == result.numel()
        theirs[key] = tuple(result.shape)
        links += [Link(move.key, move.original, key, move.box, move.op, move.head_dim) for move in moves]
    values = originals("cpu")
    used = {link.ours_key for link in links}
    names = KeptNames(ours={key: tuple(values[key].shape) for key in used}, theirs=theirs, links=tuple(links))
    expected = PROGRAMS[name](values)
    forward = Assembled(Arrays({key: tensor.numpy() for key, tensor in values.items()}), names.into_theirs())
    back = Assembled(Arrays({key: tensor.numpy() for key, tensor in expected.items()}), names.into_ours())
    for key, tensor in expected.items():
        check(forward, key, tensor.numpy())
    for number_of_ranks in (1, 2, 3):
        check_parts(links, values, expected, number_of_ranks)
    for key in used:
        if sum(link.ours.numel for link in links if link.ours_key == key) == values[key].numel():
            check(back, key, values[key].numpy())


def check(found: Assembled, key: str, expected: Array) -> None:
    """Compare it, as a whole and row by row: a reader cuts where it likes."""
    boxes = [Box.whole(expected.shape)]
    if expected.ndim:
        rest = expected.shape[1:]
        boxes += [Box((row, *(0 for _ in rest)), (1, *rest)) for row in range(expected.shape[0])]
    if expected.ndim == 3:
        boxes += [Box((1, row, 0), (1, 1, expected.shape[2])) for row in range(expected.shape[1]) if len(expected) > 1]
    for box in boxes:
        out = np.full(box.sizes, -1, expected.dtype)
        if box.numel:
            found.read_into(key, box, out)
        assert np.array_equal(out, expected[box.index()]), (key, box)


def check_parts(links: list[Link], values: State, expected: State, number_of_ranks: int) -> None:
    """Compare what ranks write that hold rows of the originals, wherever these are cut."""
    written = {key: np.full(tensor.shape, -1, np.float32) for key, tensor in expected.items()}
    for link in links:
        shape = tuple(values[link.ours_key].shape)
        for rank in range(number_of_ranks if shape else 1):
            box = Box.whole(shape)
            if shape:
                first, stop = (shape[0] * n // number_of_ranks for n in (rank, rank + 1))
                box = Box((first, *box.offsets[1:]), (stop - first, *shape[1:]))
            for place, part in parts(link, box, values[link.ours_key].numpy()[box.index()]):
                written[link.theirs_key][place.index()] = part
    for key, tensor in expected.items():
        assert np.array_equal(written[key], tensor.numpy()), (key, number_of_ranks)


@pytest.mark.parametrize(
    "program",
    [
        lambda s: {"a": s["a"] + 1},
        lambda s: {"a": torch.zeros(3, device="meta")},
        lambda s: {"a": s["a"].reshape(6, 8)},
        lambda s: {"c": s["c"].transpose(0, 1).contiguous()},
        lambda s: {"a": s["a"].half()},
        lambda s: {"a": s["a"].view(2, 2, 2, 6).permute(2, 1, 0, 3).reshape(8, 6)},
        lambda s: {"a": torch.cat([s["a"], torch.zeros(2, 6, device="meta")])},
    ],
)
def test_what_is_moved_otherwise_is_not_followed(program: Callable[[State], State]) -> None:
    meta = originals("meta")
    tracer = Tracer(meta)
    with tracer:
        results = program(meta)
    assert [tracer.moves(result) for result in results.values()] == [None]
