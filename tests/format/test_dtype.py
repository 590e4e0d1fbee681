"""The dtype table against torch, numpy and safetensors themselves."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

from milepost.errors import FormatError
from milepost.format.dtype import DTYPES, from_safetensors, from_storage_class, itemsize, lookup, numpy_dtype


def test_every_dtype_that_torch_save_takes_as_plain_elements_is_in_the_table():
    taken = set()
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # complex32 and quantized dtypes warn
            tensor = torch.empty(1, dtype=dtype)
        try:
            torch.save(tensor, io.BytesIO())
        except (KeyError, RuntimeError):  # sub-byte integers; quantized tensors without a quantizer
            continue
        taken.add(str(dtype).removeprefix("torch."))
    assert taken == {name for name in DTYPES if hasattr(torch, name)}  # the others are of a newer torch


@pytest.mark.parametrize("name", [name for name in DTYPES if hasattr(torch, name)])
def test_size_and_storage_class_are_torchs(name: str):
    dtype = getattr(torch, name)
    assert itemsize(name) == dtype.itemsize
    classes = torch.storage._dtype_to_storage_type_map()
    assert lookup(name).storage_class == classes.get(dtype)
    if lookup(name).storage_class is not None:
        assert from_storage_class(lookup(name).storage_class) == name


@pytest.mark.parametrize("name", [name for name, entry in DTYPES.items() if entry.numpy_name])
def test_numpy_reads_the_elements_as_torch_does(name: str):
    raw = bytes(range(0x30, 0x40))
    dtype = numpy_dtype(name)
    assert dtype is not None
    assert dtype.itemsize == itemsize(name)
    if name == "bool":
        raw = bytes([0, 1] * 8)
    ours = np.frombuffer(raw, dtype=dtype)
    theirs = torch.frombuffer(bytearray(raw), dtype=getattr(torch, name))
    wide, torch_wide = (np.complex128, torch.complex128) if "complex" in name else (np.float64, torch.float64)
    np.testing.assert_array_equal(ours.astype(wide), theirs.to(torch_wide).numpy())


def test_a_dtype_without_numpy_counterpart_gives_none():
    assert numpy_dtype("float4_e2m1fn_x2") is None


@pytest.mark.parametrize(("code", "dtype"), safetensors.torch._TYPES.items())
def test_safetensors_codes_are_those_of_safetensors(code: str, dtype: torch.dtype):
    assert from_safetensors(code) == str(dtype).removeprefix("torch.")


def test_unknown_names_are_refused():
    with pytest.raises(FormatError, match="qint8"):
        itemsize("qint8")
    with pytest.raises(FormatError, match="F99"):
        from_safetensors("F99")
    assert from_storage_class("QInt8Storage") is None
