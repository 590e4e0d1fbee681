"""``docs/reference/state.md``, made of the samples that the tests save and load.

``python tests/fidelity/state_page.py`` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import test_schedulers
import test_values
import torch_optimizers

from milepost.tensors.value_reader import decode_object
from milepost.tensors.value_writer import encode_object

PAGE = Path(__file__).parents[2] / "docs/reference/state.md"
SINCE = "0.1"
NEWER: dict[str, str] = {}
"""Kinds that came later, and with which version."""
NOTES = {
    "Enum": "the same, if its class was given to `register_value`",
    "dataclass, NamedTuple": "the same, if its class was given to `register_value`",
    "registered class": "the result of its `decode`",
    "many small values": "the same; stored as one value",
    "sparse tensor": "the same, coalesced",
    "composed tensor, inside": "the same, if the program has imported its class",
    "tensors inside": "the same, on the CPU, each with its own memory",
    "Parameter inside a tuple": "a Parameter",
}

HEAD = """<!-- Written by tests/fidelity/state_page.py from the samples that the tests save and load. -->
# What a state may hold

Keys and values keep their types and order, and reading them runs no code. A value that can't be stored is refused by
the save, which names its key and what to store instead.

| kind of value | types tested | restored as | since |
|---|---|---|---|
"""


def text() -> str:
    """The page. Every sample is written and read for it."""
    rows = "".join(_row(kind, samples) for kind, samples in test_values.KINDS.items())
    return (
        HEAD + rows + "\n## Tensors\n\n"
        "A tensor in a nested dict or list is stored under its own key, whatever its dtype, strides and device, and is "
        "loaded into the tensor that is already there. DTensors are stored by shard, and load under any other "
        "placements. Tensors inside other values (tuples, sets of values) are stored with the value. An expanded "
        "tensor is filled once, if the stored values of its shared elements are equal. Refused, with what to store "
        "instead: nested and MKLDNN tensors, tensors without elements of their own (masked, fake, meta), dtypes "
        "smaller than a byte, and your own classes of lists and dicts. The class of a plain subclass of `Tensor` is "
        "not stored.\n\n"
        "Composed tensors (classes with `__tensor_flatten__`: torchao's 8-bit, 4-bit and fp8 optimizers, int8, NF4 "
        "and float8 weights, your own classes) are stored by their inner tensors, each under a key below the "
        "tensor's own (`layer.weight.scale`), which stock DCP can read. They are restored into the inner tensors that "
        "are there, or as new tensors of the same class, which the program must have imported. DTensors of composed "
        "tensors load under other degrees if the class supports slices of rows (`tensor[a:b]`); if not, or if the "
        "shards are of different kinds, each shard is stored separately and loads only under the same degrees. What "
        "a class keeps besides tensors is stored as plain data; functions are taken from the tensor that is loaded "
        "into, never looked up by name.\n"
        "\n## Modules, optimizers, schedulers\n\n"
        "Each is saved and loaded by its own `state_dict()` and `load_state_dict()`, with its hooks. A resumed run "
        "equals an uninterrupted one bit for bit with each of torch's classes:\n\n"
        f"- optimizers: {_names(torch_optimizers.CLASSES)}\n"
        f"- schedulers: {_names(test_schedulers.CLASSES)}\n\n"
        "The state of a parameter may have any form (a mapping, a tensor, a list, a number) and dtype, and so may the "
        "options of a group. PyTorch's `ZeroRedundancyOptimizer` needs no consolidation: each rank saves its part, "
        "which loads on any number of ranks. An optimizer that wraps another and leaves its state out of "
        "`state_dict()`, as implementations of SAM do, is refused by the save, which says what to pass instead.\n\n"
        "## Differences between ranks\n\n"
        "On the same number of ranks, `lr_scheduler`, `dataloader`, `train_state` and `states` are restored with the "
        "keys of each rank, in its order. Different values under one key are refused, except in the parts named in "
        "`per_rank`.\n"
        "\n## Objects that occur twice\n\n"
        "Tensors that share memory, each under its own key, share it again after a load. Any other object (a list, a "
        "dict, a tensor inside a tuple) that occurs twice is restored as two equal objects: if one list has to be in "
        "two places, store it once, and assign it to both in `load_state_dict()`.\n"
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
