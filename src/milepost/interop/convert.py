"""``convert``: convert weights between programs' formats, streaming, checked, and visible only when complete.

::

    source --names of the source -> ours--> our tensors --ours -> names of the target--> sink

Models without a table keep their names (``as_stored``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from milepost.collective.threads import map_in_threads
from milepost.errors import ConfigError, ConversionError, listed
from milepost.format.box import Slab
from milepost.format.huggingface import CONFIG_NAME
from milepost.interop.as_stored import is_of_the_hub, keep_names
from milepost.interop.by_config import Described, described_by
from milepost.interop.hf.classes import architecture
from milepost.interop.hf.config import identity_of
from milepost.interop.hf.extras import check_config, hf_extras
from milepost.interop.hf.identity import recorded_identity
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.families import META, family_of
from milepost.interop.names.identity import CUSTOM, RECORD, ModelIdentity, size_differences, with_settings
from milepost.interop.names.match import Match, match, repeated, tied_fault
from milepost.interop.names.model_sizes import ModelArgs, model_args
from milepost.interop.names.nearest import advice
from milepost.interop.names.rules import Family, correspond
from milepost.interop.names.sizes import Args
from milepost.interop.options import HUB, ConvertOptions, ConvertReport
from milepost.interop.sinks import DcpSink, HfSink, Sink, TorchFileSink
from milepost.interop.training_state import plan_training_step
from milepost.interop.weights.boxes import Readable, Source, as_bytes, total_nbytes
from milepost.interop.weights.dequantized import plain_weights
from milepost.interop.weights.noted import Infinite
from milepost.interop.weights.open import Weights, open_weights, read_config, refuse_one_of_several
from milepost.interop.weights.stream import SlabReader, StageProgress, stage
from milepost.storage import open_storage


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    options: ConvertOptions,
    progress: StageProgress | None = None,
) -> ConvertReport:
    """Convert the weights at ``src`` to ``dst``, which must not exist yet, and appears only when it is complete.

    Raises:
        ConversionError: source, sizes and target do not match; with all faults; nothing was written.
        DigestMismatchError: bytes of the source are damaged; ``dst`` does not appear.
        CheckpointDamagedError: files of the source are missing, truncated or malformed.
        StorageError: reading or writing failed; ``dst`` does not appear.
    """
    started = time.monotonic()
    refuse_one_of_several(src)
    weights = open_weights(src, whole=options.training_state)
    with weights.source as source:
        if weights.is_adapter:
            raise ConversionError(
                f"{source.path} is a PEFT adapter, not a full model: merge it into its base model (merge_and_unload() "
                "of PEFT), save that, and convert the result",
                path=source.path,
            )
        recorded = recorded_identity(weights)
        described = described_by(weights, options)
        keeps_names = options.model == HUB or (recorded is None and is_of_the_hub(weights, options))
        if not options.training_state and (described is not None or not keeps_names or options.dtype is not None):
            weights = plain_weights(weights, options.dtype)
        if options.training_state:
            plan, sink = _plan_training(src, dst, weights, recorded, options)
        elif described is not None:
            plan, sink = _plan_by_config(dst, weights, described, options)
        elif keeps_names:
            plan, sink = _plan_as_stored(dst, weights, options)
        else:
            plan, sink = _plan_by_table(dst, weights, recorded, options)
        infinite = Infinite(plan.content)
        if options.dtype == "float16":
            plan = replace(plan, content=infinite)
        checked = _run(source, plan, sink, options, progress)
    return ConvertReport(
        path=sink.path,
        model=plan.model,
        flavor=plan.flavor,
        source_kind=source.kind,
        source_names=plan.source_names,
        num_tensors=len(plan.content.tensors),
        written_nbytes=plan.written_nbytes,
        checked_nbytes=checked,
        verified=options.verify,
        seconds=time.monotonic() - started,
        notes=(*weights.notes, *plan.notes, *_overflow_notes(infinite)),
    )


def _overflow_notes(infinite: Infinite) -> Iterator[str]:
    if infinite.keys:
        keys = ", ".join(listed(sorted(infinite.keys), 3))
        yield f"infinite values, since float16 ends at 65,504: {keys}; --dtype bfloat16 keeps the range of float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a conversion. ``shared`` keys repeat others."""

    content: Readable
    shared: Mapping[str, str]
    written_nbytes: int
    original: Readable
    """The source's tensors."""
    back: Callable[[Readable], Readable]
    """Reads the written tensors under the same names, to compare them with the source's."""
    model: str
    flavor: str
    source_names: str
    notes: tuple[str, ...]


def _plan_as_stored(dst: str | os.PathLike[str], weights: Weights, options: ConvertOptions) -> tuple[Plan, Sink]:
    kept = keep_names(weights, options)
    content = kept.content(weights, options.dtype)
    plan = Plan(
        content=content,
        shared={},
        written_nbytes=total_nbytes(content.tensors.values()),
        original=weights.source,
        back=kept.back,
        model=HUB,
        flavor=architecture(kept.extras.config if kept.extras is not None else weights.config) or CUSTOM,
        source_names="as stored",
        notes=kept.notes,
    )
    if kept.extras is not None:
        return plan, HfSink(dst, kept.extras)
    return plan, DcpSink(dst, {}) if options.to == "dcp" else TorchFileSink(dst)


def _plan_by_table(
    dst: str | os.PathLike[str], weights: Weights, recorded: ModelIdentity | None, options: ConvertOptions
) -> tuple[Plan, Sink]:
    source = weights.source
    model, settings = _model(options, recorded, weights, source.path)
    family = family_of(model.name, model.sizes)
    notes = settings + _check_config(source, weights.config, family, model)
    found = match(source, family, model.sizes, source.path)
    _check_vocabulary(weights.config, found, source.path)
    plan = plan_conversion(found, family, model, notes, options)
    sink = _make_sink(dst, options, plan, family, replace(model, sizes=found.args))
    fault = tied_fault(found)
    if fault is not None:
        raise ConversionError(f"{source.path}: {fault}", path=source.path)
    return plan, sink


def _plan_by_config(
    dst: str | os.PathLike[str], weights: Weights, model: Described, options: ConvertOptions
) -> tuple[Plan, Sink]:
    source = weights.source
    found = match(source, model.family.tables, model.sizes, source.path)
    fault = tied_fault(found)
    if fault is not None:
        raise ConversionError(f"{source.path}: {fault}", path=source.path)
    vocab_size = found.args.named["vocab"]
    model = replace(model, sizes=found.args, config={**model.config, "vocab_size": vocab_size})
    plan = plan_conversion(found, model.family.tables, model, (), options)
    if options.to == "hf":
        return plan, HfSink(dst, model.extras(plan.content.tensors, weights, options))
    return plan, DcpSink(dst, {RECORD: model.record()}) if options.to == "dcp" else TorchFileSink(dst)


def _plan_training(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    weights: Weights,
    recorded: ModelIdentity | None,
    options: ConvertOptions,
) -> tuple[Plan, Sink]:
    source = weights.source
    if weights.manifest is None:
        raise ConversionError(f"{source.path} is not a checkpoint: it holds no training state", path=source.path)
    model, settings = _model(options, recorded, weights, source.path)
    step = plan_training_step(*open_storage(src), weights.manifest, source, model, options.names)
    plan = Plan(
        content=step.content,
        shared={},
        written_nbytes=total_nbytes(step.content.tensors.values()),
        original=step.ours,
        back=lambda written: Assembled(written, step.back),
        model=model.name,
        flavor=model.flavor,
        source_names="training state",
        notes=(*settings, *step.notes),
    )
    return plan, DcpSink(dst, {RECORD: model.record()}, objects=step.objects, paths=step.paths)


def _model(
    options: ConvertOptions, own: ModelIdentity | None, weights: Weights, path: str
) -> tuple[ModelIdentity, tuple[str, ...]]:
    """Return the model to convert, from the options or from the source's own record, and notes.

    Settings on which weights don't depend (RoPE, norm, context) are the source's if it records them.
    """
    name, flavor = options.model, options.flavor
    if name is not None and options.sizes is not None:
        given = ModelIdentity(name=name, flavor=flavor or CUSTOM, sizes=options.sizes)
    elif name is not None and flavor is not None:
        given = ModelIdentity(name=name, flavor=flavor, sizes=model_args(name, flavor))
    elif own is None:
        raise ConfigError(
            f"{path} does not record its model: give --model and --flavor, or --model {HUB} if it is a model of "
            f"transformers (or another whose tensors should keep their names)\n  "
            + "\n  ".join(advice(weights.source.tensors))
        )
    else:
        return own, ()
    if own is None and options.hf_assets:
        own = _identity_of_assets(os.fspath(options.hf_assets), given)
    if own is None:
        return given, ()
    if own.name != name:
        raise ConversionError(f"{path} holds {own}, not {given}", path=path)
    differences = size_differences(own.sizes, replace(given.sizes, vocab_size=own.sizes.vocab_size))
    if differences and own.flavor != CUSTOM:
        raise ConversionError(
            f"{path} holds {own}, not {given}: {', '.join(differences)}", path=path, problems=differences
        )
    sizes, changed = with_settings(given.sizes, own.sizes)
    notes = (f"differs from {given} as published: {', '.join(changed)}",) if changed else ()
    return replace(given, sizes=sizes), notes


def _identity_of_assets(folder: str, given: ModelIdentity) -> ModelIdentity | None:
    """Return the model of the assets folder's config, if it differs from the given one only in settings."""
    config = read_config(folder)
    found = identity_of(config) if config is not None else None
    return found if found is not None and found.name == given.name else None


def _check_config(
    source: Source, config: Mapping[str, Any] | None, family: Family, model: ModelIdentity
) -> tuple[str, ...]:
    """Refuse a Hugging Face source of another model, by its config; returns a note if there is none."""
    if source.kind != "hf":
        return ()
    if config is None:
        return (f"{source.path} has no {CONFIG_NAME}: RoPE and norm settings could not be checked",)
    check_config(config, family.name, model.sizes, f"{source.path}/{CONFIG_NAME}")
    return ()


def _check_vocabulary(config: Mapping[str, Any] | None, found: Match[ModelArgs], path: str) -> None:
    if config is not None and config.get("vocab_size") != found.args.vocab_size:
        raise ConversionError(
            f"{path}: {CONFIG_NAME} has vocab_size {config.get('vocab_size')}, the embedding has "
            f"{found.args.vocab_size} rows",
            path=path,
        )


def plan_conversion(
    found: Match[Args],
    family: Family,
    model: ModelIdentity | Described,
    notes: tuple[str, ...],
    options: ConvertOptions,
) -> Plan:
    """Plan the computation of each target tensor from the source's. Nothing is read yet."""
    scheme = options.names
    if options.to == "hf":
        scheme = "hf"
    elif options.to == "pt" and any(known.name == META for known in family.schemes):
        scheme = META
    target = correspond(family, family.scheme(scheme), found.args)
    ours = Assembled(found.tensors, found.found.into_ours())
    recipes = target.into_theirs()
    content = Assembled(ours, recipes, options.dtype)
    shared = repeated(recipes)
    stored = [info for key, info in content.tensors.items() if options.to != "pt" or key not in shared]

    def back(written: Readable) -> Readable:
        known = found.found.into_theirs()
        wanted = {key: recipe for key, recipe in known.items() if key in found.found.theirs}
        return Assembled(Assembled(written, target.into_ours()), wanted)

    return Plan(
        content=content,
        shared=shared,
        written_nbytes=total_nbytes(stored),
        original=found.tensors,
        back=back,
        model=model.name,
        flavor=model.flavor,
        source_names=found.found.scheme.name,
        notes=(*notes, *found.notes),
    )


def _make_sink(
    dst: str | os.PathLike[str],
    options: ConvertOptions,
    plan: Plan,
    family: Family,
    model: ModelIdentity,
) -> Sink:
    if options.to == "dcp":
        return DcpSink(dst, {RECORD: model.record()})
    if options.to == "pt":
        return TorchFileSink(dst)
    assets = os.fspath(options.hf_assets)
    extras = hf_extras(family.name, model.sizes, plan.content.tensors, assets, options.max_shard_nbytes)
    return HfSink(dst, extras)


def _run(source: Source, plan: Plan, sink: Sink, options: ConvertOptions, progress: StageProgress | None) -> int:
    """Write, check, verify and publish; on any failure remove the output. Returns the bytes checked."""
    advance = stage(progress, "converting", plan.written_nbytes)
    reader = SlabReader(plan.content, options.budget_nbytes, advance)
    with sink.writing():
        sink.write(reader, plan.shared)
        checked = source.check_digests()
        if options.verify:
            with sink.reopen() as written:
                verify_conversion(plan, written, options, progress)
    return checked


def verify_conversion(
    plan: Plan, written: Source, options: ConvertOptions, progress: StageProgress | None = None
) -> None:
    """Convert ``written`` back to the source's names and compare every byte, in the written dtype.

    Raises:
        ConversionError: naming the first tensor that differs.
        DigestMismatchError: the data read back differs from what was written.
    """
    back = plan.back(written)
    reader = SlabReader(back, options.budget_nbytes, stage(progress, "verifying", total_nbytes(back.tensors.values())))

    def compare(task: tuple[str, Slab]) -> None:
        key, slab = task
        values = reader.read(key, slab)
        original = np.empty_like(values)
        plan.original.read_into(key, slab.box, original)
        if not np.array_equal(as_bytes(values), as_bytes(original)):
            raise ConversionError(
                f"verification failed: {slab.box} of '{key}' in {written.path} does not convert back to the source",
                path=written.path,
            )

    slabs = ((key, slab) for key in back.tensors for slab in reader.slabs(key))
    map_in_threads(compare, slabs, reader.num_threads, name="milepost-convert")
    written.check_digests()
