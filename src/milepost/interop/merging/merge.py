"""``merge``: merge weights of one model, streaming, verified, and visible only when complete.

::

    sources --under the names of the first--> measure tensors --> merge part by part --> sink --> read back
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from milepost.errors import ConfigError, listed
from milepost.interop.hf.extras import lent_extras
from milepost.interop.hf.identity import recorded_identity
from milepost.interop.hf.kept import ARCHITECTURE
from milepost.interop.merging.inputs import Input, open_inputs
from milepost.interop.merging.measure import arcs, num_elements, thresholds
from milepost.interop.merging.merged import Merged, is_floating
from milepost.interop.merging.methods import Method, Slerp, TaskArithmetic, Ties, WeightedSum, ema_weights
from milepost.interop.merging.options import DEFAULT_DECAY, DEFAULT_DENSITY, WITH_BASE, MergeOptions, MergeReport
from milepost.interop.names.identity import RECORD
from milepost.interop.sinks import DcpSink, HfSink, Sink, TorchFileSink
from milepost.interop.weights.boxes import Readable, total_nbytes
from milepost.interop.weights.dequantized import without_quantization
from milepost.interop.weights.noted import Noted, compare_with_noted
from milepost.interop.weights.open import Weights
from milepost.interop.weights.stream import SlabReader, StageProgress, stage

RECORD_OF_MERGE = "merge"
"""Name of the record in a manifest's ``extra``: method, sources and weights."""
FILE_SUFFIXES = (".pt", ".pth")
_OF_OTHERS = (".safetensors", ".bin", ".ckpt")
"""Names of files that are not written: a folder of such a name would not be what was asked for."""


def merge(
    sources: Sequence[str | os.PathLike[str]],
    dst: str | os.PathLike[str],
    options: MergeOptions,
    progress: StageProgress | None = None,
) -> MergeReport:
    """Merge the weights at ``sources`` into ``dst``, which must not exist yet, and appears only when it is verified.

    ``dst`` becomes a ``.pt`` file if it is named so, else a Hugging Face folder if the first source (or the base) is
    one, else a checkpoint folder. Values are computed in float32, for dtypes of 32 or more bits in float64.

    Raises:
        ConfigError: options that contradict each other or the number of sources.
        ConversionError: the sources do not hold the same tensors; with all faults; nothing was written.
        DigestMismatchError: bytes of a source are damaged; ``dst`` does not appear.
        CheckpointDamagedError: files of a source are missing, truncated or malformed.
        StorageError: reading or writing failed; ``dst`` does not appear.
    """
    started = time.monotonic()
    options.check(len(sources))
    paths = [*([options.base] if options.method in WITH_BASE else []), *(os.fspath(path) for path in sources)]
    with ExitStack() as stack:
        inputs = open_inputs(paths, stack, options.dtype)
        weights = _weights(options, len(sources))
        sink = _sink(dst, inputs, options, weights)
        with sink.writing():
            method = _method(options, weights, [one.tensors for one in inputs], progress)
            merged = Merged([one.tensors for one in inputs], method, _dtypes(inputs[0].tensors, options.dtype))
            noted = Noted(merged)
            nbytes = total_nbytes(merged.tensors.values())
            reader = SlabReader(noted, options.budget_nbytes, stage(progress, "merging", nbytes))
            sink.write(reader, {})
            checked = sum(one.weights.source.check_digests() for one in inputs)
            with sink.reopen() as written:
                compare_with_noted(noted, written, reader.num_threads, stage(progress, "verifying", nbytes))
    return MergeReport(
        path=sink.path,
        kind=_kind(sink),
        method=options.method,
        sources=tuple(one.path for one in inputs),
        weights=weights if options.method != "slerp" else (),
        num_tensors=len(merged.tensors),
        written_nbytes=nbytes,
        checked_nbytes=checked,
        verified=True,
        seconds=time.monotonic() - started,
        notes=tuple(_notes(inputs, merged, options)),
    )


def _weights(options: MergeOptions, num_sources: int) -> tuple[float, ...]:
    if options.method == "ema":
        return ema_weights(num_sources, DEFAULT_DECAY if options.decay is None else options.decay)
    return options.weights or (1.0,) * num_sources


def _method(
    options: MergeOptions, weights: tuple[float, ...], inputs: Sequence[Readable], progress: StageProgress | None
) -> Method:
    """Return the method, with the measurements over complete tensors that it needs."""
    scale = 1.0 if options.scale is None else options.scale
    density = DEFAULT_DENSITY if options.density is None else options.density
    if options.method == "slerp":
        advance = stage(progress, "measuring", num_elements(inputs))
        return Slerp(arcs(inputs, weights[1] / sum(weights), advance))
    if options.method == "task-arithmetic":
        return TaskArithmetic(tuple(weight * scale for weight in weights))
    if options.method == "ties":
        advance = stage(progress, "measuring", 2 * len(weights) * num_elements(inputs))
        return Ties(weights, scale, thresholds(inputs, density, advance))
    return WeightedSum(weights, sum(weights) if options.method == "mean" else 1.0)


def _dtypes(tensors: Readable, dtype: str | None) -> dict[str, str]:
    return {key: dtype if dtype and is_floating(info) else info.dtype for key, info in tensors.tensors.items()}


def _sink(
    dst: str | os.PathLike[str], inputs: Sequence[Input], options: MergeOptions, weights: tuple[float, ...]
) -> Sink:
    """Create the sink that fits the first input, its model and files."""
    first = inputs[0].weights
    if os.fspath(dst).endswith(_OF_OTHERS):
        raise ConfigError(f"--to {dst}: a merge writes a folder or a file that ends in {' or '.join(FILE_SUFFIXES)}")
    if os.fspath(dst).endswith(FILE_SUFFIXES):
        return TorchFileSink(dst)
    if first.source.kind == "hf" and first.config is not None:
        extras = lent_extras(first.source.path, options.dtype, options.max_shard_nbytes, lends_index=True)
        if options.max_shard_nbytes is not None or not all(key in extras.weight_map for key in first.source.tensors):
            extras = replace(extras, weight_map={})  # or it is the index of quantized files
        return HfSink(dst, replace(extras, config=without_quantization(extras.config)))
    said = {"method": options.method, "weights": list(weights), "sources": [one.path for one in inputs]}
    return DcpSink(dst, {RECORD_OF_MERGE: said} | _record_of(first))


def _record_of(first: Weights) -> dict[str, Any]:
    """Return the first source's record of its model, for a manifest."""
    identity = recorded_identity(first)
    if identity is not None or first.manifest is None:
        return {RECORD: identity.record()} if identity is not None else {}
    extra = first.manifest.extra
    return {name: extra[name] for name in (RECORD, ARCHITECTURE) if name in extra}


def _kind(sink: Sink) -> str:
    return {HfSink: "hf", DcpSink: "dcp", TorchFileSink: "pt"}[type(sink)]


def _notes(inputs: Sequence[Input], merged: Merged, options: MergeOptions) -> list[str]:
    notes = [note for one in inputs for note in (*one.weights.notes, *one.notes)]
    twice = sorted({one.path for one in inputs if sum(other.path == one.path for other in inputs) > 1})
    notes += [f"{path} was given more than once" for path in twice]
    if options.method == "linear" and abs(sum(options.weights) - 1) > 1e-6:
        notes.append(f"the weights sum to {sum(options.weights):g}, not to 1: --method mean divides by that")
    first = inputs[0].tensors.tensors
    others = [key for key in first if any(one.tensors.tensors[key].dtype != first[key].dtype for one in inputs)]
    if others and options.dtype is None:
        notes.append(f"dtypes differ between the sources, the result has those of {inputs[0].path}: {_some(others)}")
    if merged.differing:
        where = inputs[0].path
        notes.append(f"differing integers were taken from {where}: {_some(sorted(merged.differing))}")
    if merged.not_finite:
        notes.append(f"merged values that are not finite (NaN or infinite): {_some(sorted(merged.not_finite))}")
    return notes


def _some(keys: Sequence[str]) -> str:
    return ", ".join(listed(keys, 3))
