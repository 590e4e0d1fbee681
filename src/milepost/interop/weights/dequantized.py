"""Read quantized weights dequantized: block-wise fp8 and MXFP4, box by box, in fixed memory.

Block-wise fp8 (DeepSeek-V3): ``X`` in an 8-bit float with ``X_scale_inv``, one factor per block of rows and columns
(usually 128 x 128). MXFP4 (gpt-oss; OCP Microscaling Formats, v1.0): ``X_blocks``, two 4-bit floats per byte, the low
half first, and ``X_scales``, one exponent per 32 of them; as in transformers, ``X`` has the last two dims exchanged.
Values and factors are exact in float32, in which they are multiplied; the product is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from milepost.errors import ConversionError, listed
from milepost.format.box import Box
from milepost.interop.weights.boxes import Array, Readable, Source, TensorInfo, array_dtype, cast_into
from milepost.interop.weights.open import Weights

FP8_SCALE = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"
_DEFAULT_BLOCK = (128, 128)
_CHUNK_ELEMENTS = 1 << 18
"""Elements dequantized at a time, so that float32 copies need little memory."""
_MX_VALUES = 32
"""Number of values that share one exponent, in ``_MX_NBYTES`` bytes."""
_MX_NBYTES = 16
_TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_PAIRS = np.stack([_TWICE_E2M1[np.arange(256) & 15], _TWICE_E2M1[np.arange(256) >> 4]], axis=-1)
_HALF_POWERS = np.exp2(np.arange(256, dtype=np.float64) - 128).astype(np.float32)
"""For each E8M0 exponent: factors are halved and values doubled, because float32 does not reach 2 to the 128."""

_BNB = "bitsandbytes"
_MAX_LENGTH = 50
METHODS = ("fp8", "mxfp4")
"""The methods supported here."""
_ENDINGS = {
    FP8_SCALE: "fp8",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".SCB": "bitsandbytes int8",
    ".g_idx": "gptq",
    ".qzeros": "awq",
    ".weight_packed": "compressed-tensors",
}
"""Key suffixes specific to one quantization method."""
_WHAT_WOULD_DO = {
    "gptq": "convert the original model: GPTQ's rounding can't be undone",
    "awq": "convert the original model: AWQ's rounding can't be undone",
    "": ("convert the original model, or load it with transformers, call dequantize() and save_pretrained()"),
}


@dataclass(frozen=True, slots=True)
class _Fp8:
    """A tensor of 8-bit floats and its factors."""

    key: str
    scale_key: str
    block: tuple[int, int]
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class _Mxfp4:
    """A tensor's blocks and exponents. ``info`` describes the dequantized tensor."""

    blocks_key: str
    scales_key: str
    info: TensorInfo


class Dequantized(Source):
    """The tensors of ``base``, with those of ``quantized`` dequantized. Takes ownership of ``base``."""

    def __init__(self, base: Source, quantized: Mapping[str, _Fp8 | _Mxfp4]):
        super().__init__(base.path, base.kind, (), {})
        self._base = base
        self._quantized = quantized
        hidden = {key for found in quantized.values() for key in _stored_keys(found)}
        plain = {key: info for key, info in base.tensors.items() if key not in hidden}
        self.tensors: Mapping[str, TensorInfo] = plain | {key: found.info for key, found in quantized.items()}

    def unit_rows(self, key: str) -> int:
        """See :class:`Readable`."""
        found = self._quantized.get(key)
        if found is None:
            return self._base.unit_rows(key)
        return found.info.shape[-2] if isinstance(found, _Mxfp4) else 1

    def read_into(self, key: str, box: Box, out: Array) -> None:
        """See :class:`Readable`."""
        found = self._quantized.get(key)
        if found is None:
            self._base.read_into(key, box, out)
            return
        stated = array_dtype(found.info.dtype)
        target = out if out.dtype == stated else np.empty(box.sizes, stated)
        for part in _chunks(box, by_columns=isinstance(found, _Mxfp4)):
            inner = target[part.relative_to(box).index()]
            if isinstance(found, _Fp8):
                self._read_fp8(found, part, inner)
            else:
                self._read_mxfp4(found, part, inner)
        if target is not out:
            cast_into(out, target)

    def _read_fp8(self, found: _Fp8, box: Box, out: Array) -> None:
        values = np.empty(box.sizes, array_dtype(self._base.tensors[found.key].dtype))
        self._base.read_into(found.key, box, values)
        first = [offset // block for offset, block in zip(box.offsets[-2:], found.block, strict=True)]
        stop = [-(-(o + n) // b) for o, n, b in zip(box.offsets[-2:], box.sizes[-2:], found.block, strict=True)]
        lead = len(box.sizes) - 2
        counts = [end - begin for begin, end in zip(first, stop, strict=True)]
        factors = np.empty((*box.sizes[:lead], *counts), np.float32)
        self._base.read_into(found.scale_key, Box((*box.offsets[:lead], *first), factors.shape), factors)
        for dim, block in zip((-2, -1), found.block, strict=True):
            start = box.offsets[dim] % block
            factors = np.repeat(factors, block, axis=dim)
            factors = factors[..., start : start + box.sizes[-1]] if dim == -1 else factors[..., start:, :]
        product = values.astype(np.float32)
        np.multiply(product, factors[..., : box.sizes[-2], :], out=product)
        cast_into(out, product)

    def _read_mxfp4(self, found: _Mxfp4, box: Box, out: Array) -> None:
        """Fill ``out`` (..., inputs, outputs) from blocks (..., outputs, inputs / 32, 16)."""
        *lead, inputs, outputs = range(len(box.sizes))
        start, size = box.offsets[inputs], box.sizes[inputs]
        first, stop = start // _MX_VALUES, -(-(start + size) // _MX_VALUES)
        offsets = (*(box.offsets[dim] for dim in lead), box.offsets[outputs], first)
        sizes = (*(box.sizes[dim] for dim in lead), box.sizes[outputs], stop - first)
        packed, exponents = np.empty((*sizes, _MX_NBYTES), np.uint8), np.empty(sizes, np.uint8)
        self._base.read_into(found.blocks_key, Box((*offsets, 0), packed.shape), packed)
        self._base.read_into(found.scales_key, Box(offsets, sizes), exponents)
        with np.errstate(over="ignore"):
            values = _PAIRS[packed].reshape(*sizes, _MX_VALUES) * _HALF_POWERS[exponents][..., np.newaxis]
        rows = values.reshape(*sizes[:-1], sizes[-1] * _MX_VALUES)[..., start - first * _MX_VALUES :][..., :size]
        cast_into(out, rows.swapaxes(-1, -2))

    def check_digests(self) -> int:
        """See :class:`Source`."""
        return self._base.check_digests()

    def check(self, key: str) -> None:
        """See :class:`Source`."""
        found = self._quantized.get(key)
        for stored in (key,) if found is None else _stored_keys(found):
            self._base.check(stored)

    def close(self) -> None:
        """See :class:`Source`."""
        self._base.close()


def _stored_keys(found: _Fp8 | _Mxfp4) -> tuple[str, str]:
    return (found.key, found.scale_key) if isinstance(found, _Fp8) else (found.blocks_key, found.scales_key)


def _chunks(box: Box, *, by_columns: bool) -> Sequence[Box]:
    """Cut a box, along rows or columns, into parts of about ``_CHUNK_ELEMENTS``."""
    dim = len(box.sizes) - (1 if by_columns else 2)
    step = max(1, _CHUNK_ELEMENTS * box.sizes[dim] // max(1, math.prod(box.sizes)))
    parts = []
    for start in range(0, box.sizes[dim], step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim] += start
        sizes[dim] = min(step, box.sizes[dim] - start)
        parts.append(Box(tuple(offsets), tuple(sizes)))
    return parts


# ---- recognising ----


def plain_weights(weights: Weights, dtype: str | None) -> Weights:
    """Return ``weights`` with fp8 and MXFP4 dequantized to ``dtype`` (None: bfloat16), with a note.

    Raises:
        ConversionError: they use another method (named, with advice), or a factor is missing or has the wrong shape.
    """
    source, config = weights.source, weights.config
    method = method_of(source, config)
    if method is None:
        return weights
    to = "bfloat16" if dtype is None else dtype
    plain = _dequantized(source, method, config, "float32" if to == "float16" else to)
    plain_config = without_quantization(config) if config is not None else None
    note = f"its {method} weights were dequantized to {to}"
    return replace(weights, source=plain, config=plain_config, notes=(*weights.notes, note))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` without quantization."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def method_of(source: Readable, config: Mapping[str, Any] | None) -> str | None:
    """Return the quantization method by config or names; None if not quantized."""
    said = config.get("quantization_config") if config is not None else None
    if isinstance(said, Mapping) and (said.get("quant_method") == _BNB or _bits(said)):
        return _bitsandbytes(said, source.tensors)
    if said is not None:
        return str(said.get("quant_method", "unknown") if isinstance(said, Mapping) else "unknown")[:_MAX_LENGTH]
    return method_of_keys(source.tensors) or _other_fp8(source.tensors)


def _bitsandbytes(said: Mapping[str, Any], keys: Collection[str]) -> str:
    """Return the kind of bitsandbytes' quantization: that of the tensors, else as transformers reads the config."""
    stored = method_of_keys(keys) or ""
    if stored.startswith(_BNB):
        return stored
    kinds = {8: "int8", 4: said.get("bnb_4bit_quant_type") or "fp4"}  # the default of transformers and bitsandbytes
    return f"{_BNB} {kinds.get(_bits(said), '')}".strip()[:_MAX_LENGTH]


def _bits(said: Mapping[str, Any]) -> int:
    """Return the number of bits that a config asks bitsandbytes for; 0 if none."""
    return next((bits for bits in (8, 4) for name in ("load_in", "_load_in") if said.get(f"{name}_{bits}bit")), 0)


def method_of_keys(keys: Collection[str]) -> str | None:
    """Return the quantization method by names; None if no name shows one."""
    for ending, method in _ENDINGS.items():
        if any(key.endswith(ending) for key in keys):
            return method
    return "mxfp4" if any(key.endswith(_BLOCKS) and _scales_of(key) in keys for key in keys) else None


def _other_fp8(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return the method of 8-bit floats with factors other than per block."""
    has_factor = any(info.dtype.startswith("float8_") and f"{key}_scale" in tensors for key, info in tensors.items())
    return "fp8 with a factor (_scale) for each tensor or row" if has_factor else None


def _scales_of(key: str) -> str:
    return key.removesuffix(_BLOCKS) + _SCALES


def _dequantized(source: Source, method: str, config: Mapping[str, Any] | None, dtype: str) -> Source:
    """Return ``source`` with its fp8 or MXFP4 tensors in ``dtype``: float32 or bfloat16."""
    path = source.path
    if method not in METHODS:
        hint = next(hint for name, hint in _WHAT_WOULD_DO.items() if name in method.lower())
        raise ConversionError(
            f"{path} holds quantized weights ({method}), and only block-wise fp8 and MXFP4 are dequantized: {hint}",
            path=path,
        )
    faults: list[str] = []
    if method == "fp8":
        found: dict[str, _Fp8 | _Mxfp4] = dict(_find_fp8(source, _block(config), dtype, faults))
    else:
        found = dict(_find_mxfp4(source, dtype, faults))
    if not found and not faults:
        faults.append("no tensor is quantized: if that is right, remove quantization_config from the config")
    if faults:
        raise ConversionError(
            f"{path} should hold quantized weights ({method}):\n  " + "\n  ".join(listed(faults)),
            path=path,
            problems=faults,
        )
    return Dequantized(source, found)


def _block(config: Mapping[str, Any] | None) -> tuple[int, int]:
    said = config.get("quantization_config") if config is not None else None
    block = said.get("weight_block_size") if isinstance(said, Mapping) else None
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return block[0], block[1]
    return _DEFAULT_BLOCK


def _find_fp8(source: Source, block: tuple[int, int], dtype: str, faults: list[str]) -> dict[str, _Fp8]:
    found = {}
    for key, info in source.tensors.items():
        if not info.dtype.startswith("float8_") or key.endswith(FP8_SCALE):
            continue
        scale = source.tensors.get(key + FP8_SCALE)
        expected = (*info.shape[:-2], *(-(-n // size) for n, size in zip(info.shape[-2:], block, strict=False)))
        if scale is None:
            faults.append(f"{key} is {info.dtype} without a {key.rpartition('.')[2]}{FP8_SCALE}")
        elif len(info.shape) < 2 or scale.shape != expected or not _is_factor(scale.dtype):
            faults.append(
                f"{key}{FP8_SCALE} is {scale.dtype} {list(scale.shape)}: expected floats {list(expected)}, one for "
                f"each {block[0]} x {block[1]} of {list(info.shape)}"
            )
        else:
            found[key] = _Fp8(key, key + FP8_SCALE, block, TensorInfo(dtype, info.shape))
    faults += [
        f"{key} is a scale without weights"
        for key in source.tensors
        if key.endswith(FP8_SCALE) and key.removesuffix(FP8_SCALE) not in source.tensors
    ]
    return found


def _is_factor(dtype: str) -> bool:
    return dtype in ("float32", "bfloat16", "float16", "float8_e8m0fnu")


def _find_mxfp4(source: Source, dtype: str, faults: list[str]) -> dict[str, _Mxfp4]:
    found = {}
    for key, info in source.tensors.items():
        if not key.endswith(_BLOCKS):
            continue
        scales = source.tensors.get(_scales_of(key))
        fits = info.dtype == "uint8" and len(info.shape) >= 3 and info.shape[-1] == _MX_NBYTES
        if scales is None:
            faults.append(f"{key} is present without {_scales_of(key)}")
        elif not fits or scales != TensorInfo("uint8", info.shape[:-1]):
            faults.append(
                f"{key} is {info.dtype} {list(info.shape)} with {scales.dtype} {list(scales.shape)} of scales: "
                f"expected uint8 [..., {_MX_NBYTES}] and uint8 [...]"
            )
        else:
            *lead, outputs, num_blocks, _ = info.shape
            shape = (*lead, num_blocks * _MX_VALUES, outputs)
            found[key.removesuffix(_BLOCKS)] = _Mxfp4(key, _scales_of(key), TensorInfo(dtype, shape))
    faults += [
        f"{key} is present without {key.removesuffix(_SCALES)}{_BLOCKS}"
        for key in source.tensors
        if key.endswith(_SCALES) and key.removesuffix(_SCALES) + _BLOCKS not in source.tensors
    ]
    return found
