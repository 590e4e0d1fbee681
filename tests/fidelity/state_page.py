"""``docs/reference/state.md``, made of the samples that the tests save and load.

``python tests/fidelity/state_page.py`` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import test_optimizers
import test_schedulers
import test_values

from milepost.tensors.value_reader import decode_object
from milepost.tensors.value_writer import encode_object

PAGE = Path(__file__).parents[2] / "docs/reference/state.md"
SINCE = "0.1"
NEWER: dict[str, str] = {}
"""Kinds that came later, and with which version."""
NOTES = {
    "Enum": "of a class given to `register_value`",
    "dataclass, NamedTuple": "of a class given to `register_value`",
    "registered class": "what its `decode` makes of what its `encode` made",
    "many small values": "the same; stored as one value",
    "sparse tensor": "the same, coalesced",
    "tensor made of others, inside": "of a class that the program has imported",
    "tensors inside": "the same, on the CPU, with memory of their own",
    "Parameter inside a tuple": "a Parameter",
}

HEAD = """<!-- Written by tests/fidelity/state_page.py from the samples that the tests save and load. -->
# What a state may hold

Keys and values keep their type and order; reading runs no code. What can't be kept is refused at the save, with its
place and what to write instead.

| kind of value | types tried | what comes back | since |
|---|---|---|---|
"""


def text() -> str:
    """The page. Every sample is written and read for it."""
    rows = "".join(_row(kind, samples) for kind, samples in test_values.KINDS.items())
    return (
        HEAD + rows + "\n## Tensors\n\n"
        "A tensor of its own in a nested dict or list is stored by itself, whatever its dtype, strides and device: it "
        "is read into the tensor that is there. DTensors are stored by shards and read under any other placements. "
        "Tensors inside other values (tuples, sets of values) are stored with them. An expanded tensor is filled once, "
        "if what was saved for it is uniform. Refused, with what to store instead: nested and MKLDNN tensors, tensors "
        "without elements of their own (masked, fake, meta), dtypes of less than a byte, lists and dicts of classes of "
        "your own. The class of a plain subclass of `Tensor` is not stored.\n\n"
        "Tensors that are made of others (`__tensor_flatten__`: torchao's 8-bit, 4-bit and fp8 optimizers, int8, "
        "NF4 and float8 weights, classes of your own) are stored by their parts, each under a key below the "
        "tensor's own (`layer.weight.scale`), which stock DCP reads. They come back as what they were: into the "
        "parts that are there, else as new tensors of the same class, which the program must have imported. "
        "DTensors around them are read under other degrees where the class can cut its rows (`tensor[a:b]`); where "
        "it can't, or where shards are of different kinds, each shard is stored by itself and read on the same "
        "degrees alone. What a class keeps beside its tensors is stored as plain data; functions are taken from "
        "the tensor that is loaded into, never by name.\n"
        "\n## Modules, optimizers, schedulers\n\n"
        "Each through its own `state_dict()` and `load_state_dict()`, with its hooks. A run that is resumed equals the "
        "undisturbed one to the last bit with every one of torch's classes:\n\n"
        f"- optimizers: {_names(test_optimizers.CLASSES)}\n"
        f"- schedulers: {_names(test_schedulers.CLASSES)}\n\n"
        "The state of a parameter may have any form (a mapping, a tensor, a list, a number) and dtype, and so may the "
        "options of a group. PyTorch's `ZeroRedundancyOptimizer` needs no consolidation: each rank saves its part, and "
        "any number of ranks loads it. An optimizer that wraps another and leaves its state out of `state_dict()`, as "
        "implementations of SAM do, is refused at the save, with what to give instead.\n\n"
        "## Each rank\n\n"
        "`lr_scheduler`, `dataloader`, `train_state` and `states` come back with the keys and the order that each rank "
        "gave, on the same number of ranks. Different values under one key are refused, but for the parts in "
        "`per_rank`.\n"
        "\n## Objects that occur twice\n\n"
        "Tensors that share memory, each under a key of its own, share it again. Any other object (a list, a dict, a "
        "tensor inside a tuple) that occurs twice comes back as two equal ones: if one list has to be in two places, "
        "store it once, and put it there in `load_state_dict()`.\n"
    )


def _names(classes: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(classes))


def _row(kind: str, samples: list[Any]) -> str:
    types = list(dict.fromkeys(_type_name(sample) for sample in samples))
    comes_back = NOTES.get(kind, "the same")
    for sample in samples:
        found = decode_object("sample", encode_object("sample", sample), "memory")
        if type(found) is not type(sample):
            comes_back = f"a {_type_name(found)}"
    return f"| {kind} | {', '.join(types)} | {comes_back} | {NEWER.get(kind, SINCE)} |\n"


def _type_name(value: Any) -> str:
    kind = type(value)
    if kind.__module__.startswith("torch.testing"):
        return f"`{kind.__qualname__}`"
    return (
        f"`{kind.__module__}.{kind.__qualname__}`"
        if kind.__module__ not in ("builtins", "test_values")
        else (f"`{kind.__qualname__}`")
    )


if __name__ == "__main__":
    PAGE.write_text(text())
