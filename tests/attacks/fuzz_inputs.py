"""Valid inputs of the fuzzed readers: a small checkpoint and its files, and files of every other kind."""

from __future__ import annotations

import dataclasses
import json
import math

import torch.utils.serialization  # noqa: F401 - torch.load imports it at its first call, and nothing may be imported then
from manifests import StoredBox, lay_out, record_files

from milepost.format.box import Box
from milepost.format.dcp_writer import dump_metadata
from milepost.format.digest import crc32
from milepost.format.dtype import itemsize
from milepost.format.plain_pickle import dump_plain
from milepost.format.record import object_record, record_footer, tensor_record
from milepost.format.safetensors import plan_layout
from milepost.format.torch_file import plan_torch_file
from milepost.interop.hf.config import make_config
from milepost.interop.names.model_sizes import model_args
from milepost.run.owner import this_process
from milepost.run.signoff import SignOff, dump_sign_off, segment_of
from milepost.saving.writer import WrittenFile, WrittenObject, WrittenTensor
from milepost.tensors.plan import WriteItem
from milepost.train.config import TrainConfig
from milepost.train.options import to_toml
from milepost.verification.extents import records_of

LAYOUT = lay_out(
    {
        "w": ("float32", (4, 2), [StoredBox(Box((i, 0), (1, 2)), b"12345678", f"__{i}_0.distcp") for i in range(4)]),
        "optimizer.state.w.exp_avg": ("bfloat16", (3, 3), [StoredBox(Box((0, 0), (3, 3)), bytes(range(18)))]),
        "f8": ("float8_e4m3fn", (3,), [StoredBox(Box((0,), (3,)), b"abc")]),
        "scalar": ("int64", (), [StoredBox(Box((), ()), bytes(8))]),
        "empty": ("float32", (0, 4), [StoredBox(Box((0, 0), (0, 4)), b"")]),
    },
    {"optimizer.lr": 0.1, "deep": {"a": [1, (2, b"x"), {"b": None}], 3: "text"}},
    paths={"optimizer.lr": ("optimizer", "param_groups", 0, "lr")},
)
FILES = dict(LAYOUT.files)
RECORD_FILES = record_files(LAYOUT.manifest)
SIZES = {name: len(content) for name, content in FILES.items()}
RECORDS = [
    (layout := tensor_record(dtype, sizes)).header
    + (data := bytes(layout.data_nbytes))
    + record_footer(layout, crc32(data))
    for dtype, sizes in (("float32", (4, 2)), ("bfloat16", (3, 1, 5)), ("float8_e4m3fn", (7,)), ("int64", ()))
]
VALUES = (
    {"a": [1, 2.5, "x", b"y", None, True], "b": {"c": (1, 2)}},
    [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1, 2]}] * 2,
    -(1 << 70),
    "ünï",
)
STATE = {"model.w": ("float32", (4, 2)), "model.b": ("bfloat16", (5,)), "f8": ("float8_e4m3fn", (3,))}


def torch_file() -> bytes:
    layout = plan_torch_file(STATE, {"tied": "model.w"})
    data = bytearray(layout.nbytes)
    crcs = {key: crc32(bytes(math.prod(shape) * itemsize(dtype))) for key, (dtype, shape) in STATE.items()}
    for offset, part in layout.frame(crcs):
        data[offset : offset + len(part)] = part
    return bytes(data)


def safetensors(names: str = "abc") -> bytes:
    shapes = (("float32", (2, 3)), ("bfloat16", (4,)), ("int64", ()), ("float8_e5m2", (0, 3)))
    layout = plan_layout({name * 3: shapes[i % 4] for i, name in enumerate(names)})
    return layout.prefix + bytes(layout.nbytes - len(layout.prefix))


def sign_off() -> bytes:
    files = []
    for name, records in records_of(LAYOUT.manifest).items():
        tensors, objects = [], []
        for placed in records:
            entry = placed.entry
            if hasattr(entry, "box"):
                shape = LAYOUT.manifest.tensors[placed.key].shape
                item = WriteItem(
                    key=placed.key,
                    dtype=placed.dtype,
                    shape=shape,
                    box=entry.box,
                    record_offset=entry.record_offset,
                    record_nbytes=entry.record_nbytes,
                    data_offset=entry.data_offset or 0,
                    data_nbytes=entry.data_nbytes,
                )
                crcs = (entry.crc32 or 0,) if entry.data_nbytes else ()
                tensors.append(WrittenTensor(item, entry.crc32 or 0, crcs))
            else:
                objects.append(WrittenObject(placed.key, entry.record_offset, entry.record_nbytes, entry.crc32 or 0))
        files.append(WrittenFile(name, SIZES[name], tuple(tensors), tuple(objects)))
    return dump_sign_off(SignOff(0, "0123456789abcdef", segment_of(files)))


MARK = json.dumps({"record_id": "5-00000000", "reason": "bytes 1 to 2 changed", "created_s": 1.0}).encode()
INDEX = json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode()
HF_CONFIG = json.dumps(make_config("llama3", model_args("llama3", "debugmodel"), "float32")).encode()
BARE_CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()  # its family is looked up
FLAGS = (
    b"--training.steps\n100\n--training.seq_len=8\n--checkpoint.enable\n--checkpoint.interval\nauto\n--optimizer.lr=1"
)
TOML = to_toml(TrainConfig()).encode()
SHORT_TOML = b"[training]\nsteps = 5\n\n[parallelism]\ntensor_parallel_degree = 2\n\n[checkpoint]\nenable = true\n"
OWN = this_process(1.7e9)
OWNERS = [
    OWN.dump(),
    dataclasses.replace(OWN, host="elsewhere").dump(),
    dataclasses.replace(OWN, pid=1, started="1").dump(),
]
PICKLES = [dump_metadata(LAYOUT.manifest), *(dump_plain(value) for value in VALUES)]
OBJECTS = [object_record(value) for value in VALUES]
