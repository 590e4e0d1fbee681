"""PEFT adapters in a step: written as PEFT's own folder, or merged into the base model (LoRA). Torch-free.

In a model's state, keys of an adapter's tensors contain its name (``lora_A.default.weight``), and the wrapped module is
a ``base_layer``; keys in PEFT's files contain neither.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from milepost.errors import ConversionError, listed
from milepost.format.box import Box
from milepost.format.huggingface import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from milepost.format.safetensors import plan_layout
from milepost.interop.as_stored import EMBEDDINGS, OUTPUTS, as_in_files, as_in_module, known_names
from milepost.interop.hf.extras import HfExtras, lent_extras
from milepost.interop.lora import PREFIX, Adapter, LoraMerged
from milepost.interop.names.adapter_keys import ADAPTER_KEY
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.rules import MappedBox, Op, Recipe
from milepost.interop.options import HUB, ConvertOptions, ConvertReport
from milepost.interop.sinks import HfSink, Sink
from milepost.interop.weights.base_samples import NAME as SAMPLES
from milepost.interop.weights.base_samples import ONLY_TRAINABLE, Sample, differences, parse, sample_of
from milepost.interop.weights.boxes import Readable, Renamed, Source, TensorInfo, total_nbytes
from milepost.interop.weights.dequantized import plain_weights, without_quantization
from milepost.interop.weights.noted import Noted, compare_with_noted
from milepost.interop.weights.open import Weights, open_weights, read_config
from milepost.interop.weights.stream import SlabReader, StageProgress, stage
from milepost.run.values import read_values
from milepost.storage import open_storage

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of an adapter that change the base's weights."""
_EMBEDDING_LAYERS = ("embed_tokens", "lm_head")
"""PEFT's names of them."""
MAX_NBYTES = 256 << 20


def adapters_in(keys: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
    """Return for each adapter: key in PEFT's files -> key in the state."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = ADAPTER_KEY.fullmatch(key)
        if match is None:
            continue
        module, what, name, rest = match.groups()
        # A module trained instead of the base's has the base's name in PEFT's files.
        inner = f"{module}{what}{rest}" if what != "modules_to_save" else f"{module.removesuffix('.')}{rest}"
        if what == "lora_magnitude_vector":
            inner = inner.removesuffix(".weight")
        found.setdefault(name, {})[_file_key(inner)] = key
    return found


def export_adapter(
    src: str, dst: str | os.PathLike[str], config: Mapping[str, Any], name: str, options: ConvertOptions
) -> ConvertReport:
    """Write the adapter of a step in PEFT's form: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        ConversionError: the step holds none, or ``name`` does not select one of several; nothing was written.
    """
    started = time.monotonic()
    weights = open_weights(src)
    with weights.source:
        adapter = _adapter(weights, config, name)
        _check_beside(config, weights.source.path, ("bias", "trainable_token_indices"), "save_pretrained()")
        beside = _trained_beside(weights)
        if beside:
            raise ConversionError(
                f"the step in {src} has trained values outside the adapter, which PEFT's files can't hold: "
                f"{', '.join(listed(beside))}. Name such modules in modules_to_save before training; for this step, "
                "write the full model with --merge-adapter",
                path=src,
            )
        beside_it, notes = _embeddings_to_store(weights, config)
        own = adapters_in(weights.source.tensors)[adapter.name]
        content = _cast(Renamed(weights.source, {**own, **beside_it}), options.dtype)
        sink = AdapterSink(dst, adapter.config)
        flavor = f"adapter {adapter.name}"
        return _written(weights, (weights.source,), content, sink, options, started, None, flavor, notes)


def export_merged(
    src: str,
    dst: str | os.PathLike[str],
    config: Mapping[str, Any],
    name: str,
    base: str,
    options: ConvertOptions,
    progress: StageProgress | None = None,
) -> ConvertReport:
    """Write the base model with the LoRA adapter of a step merged in, as a Hugging Face folder.

    The base is the Hugging Face folder ``base``, or else the step's own, with the config of ``hf_assets``.

    Raises:
        ConversionError: the adapter is not a plain LoRA, or does not fit the base; nothing was written.
    """
    started = time.monotonic()
    weights = open_weights(src)
    with weights.source:
        adapter = _adapter(weights, config, name)
        below = open_weights(base) if base else None
        try:
            if below is not None:
                _check_beside(config, src, ("bias",), "merge_and_unload()")
                _check_start(config, src)
            lent = os.fspath(options.hf_assets) or base
            if not lent:
                raise ConversionError(
                    "a Hugging Face folder needs a config.json: name the base model's folder with --base or --hf-assets"
                )
            extras = lent_extras(lent, options.dtype, options.max_shard_nbytes, lends_index=bool(base))
            plain = plain_weights(below if below is not None else weights, options.dtype)
            if below is None:
                _check_holds_base(weights)
            held = plain.source if below is not None else _base_in(plain)
            if below is not None:
                adapter = _with_trained_beside(weights, adapter)
                if not _changed_by(adapter) <= held.tensors.keys() | set(OUTPUTS):
                    held = as_in_module(held, extras.config)
            held, is_untied = _untied(held, weights, adapter, extras.config)
            merged = LoraMerged(_cast(held, None), adapter, src)
            if below is not None:
                _check_base(weights, held, adapter)
            config = without_quantization(extras.config) | ({"tie_word_embeddings": False} if is_untied else {})
            content, note = _cast(merged, options.dtype), ""
            if held is not plain.source:  # it may have the module's names
                known = below.source.tensors if below is not None else known_names(extras, options, merged.tensors)
                content, note = as_in_files(content, config, known)
            places_all = options.max_shard_nbytes is None and all(key in extras.weight_map for key in content.tensors)
            extras = replace(extras, config=config, weight_map=extras.weight_map if places_all else {})
            sink = HfSink(dst, extras)
            read = (weights.source,) if below is None else (weights.source, below.source)
            notes = (*plain.notes[len((below or weights).notes) :], *merged.notes, *filter(None, [note]))
            return _written(weights, read, content, sink, options, started, progress, f"{adapter.name} merged", notes)
        finally:
            if below is not None:
                below.source.close()


def _written(
    weights: Weights,
    read: Sequence[Source],
    content: Readable,
    sink: Sink,
    options: ConvertOptions,
    started: float,
    progress: StageProgress | None,
    flavor: str,
    notes: tuple[str, ...] = (),
) -> ConvertReport:
    """Write ``content``, computed from ``read``; read it back, and report."""
    nbytes = total_nbytes(content.tensors.values())
    noted = Noted(content)
    reader = SlabReader(noted, options.budget_nbytes, stage(progress, "exporting", nbytes))
    with sink.writing():
        sink.write(reader, {})
        checked = sum(source.check_digests() for source in read)
        with sink.reopen() as written:
            compare_with_noted(noted, written, reader.num_threads, stage(progress, "verifying", nbytes))
    return ConvertReport(
        path=sink.path,
        model=HUB,
        flavor=flavor,
        source_kind=weights.source.kind,
        source_names="PEFT",
        num_tensors=len(content.tensors),
        written_nbytes=nbytes,
        checked_nbytes=checked,
        verified=True,
        seconds=time.monotonic() - started,
        notes=(*weights.notes, *notes),
    )


def _adapter(weights: Weights, config: Mapping[str, Any], name: str) -> Adapter:
    path = weights.source.path
    found = adapters_in(weights.source.tensors)
    kind = config.get("peft_type")
    if not found and isinstance(kind, str):
        raise ConversionError(
            f"{path} holds no adapter of a kind that can be taken from a step, its configuration says {kind}: use "
            "save_pretrained() of PEFT",
            path=path,
        )
    if not found:
        raise ConversionError(f"{path} holds no PEFT adapter: export the model without --adapter", path=path)
    if name not in found and (name or len(found) > 1):
        wanted = f"no adapter {name}" if name else f"{len(found)} adapters"
        raise ConversionError(
            f"{path} holds {wanted}: give --adapter-name, one of {', '.join(sorted(found))}", path=path
        )
    chosen = name or next(iter(found))
    return Adapter(chosen, Renamed(weights.source, found[chosen]), config)


def _check_beside(config: Mapping[str, Any], path: str, options: Sequence[str], instead: str) -> None:
    """Refuse an adapter with trained values outside its own tensors, which would be lost. Raises ConversionError."""
    found = [option for option in options if config.get(option) not in (None, "none")]
    if found:
        raise ConversionError(
            f"the adapter in {path} was trained with {' and '.join(found)}: use {instead} of PEFT", path=path
        )


def _embeddings_to_store(weights: Weights, config: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the base's embeddings that PEFT stores with an adapter: wrapped or resized ones.

    As by ``save_embedding_layers="auto"``: the key in PEFT's files and that in the step, and notes.

    Raises:
        ConversionError: the step does not hold what the adapter can't be loaded without.
    """
    path, tensors = weights.source.path, weights.source.tensors
    targets = config.get("target_modules")
    is_target = isinstance(targets, list) and any(name in targets for name in _EMBEDDING_LAYERS)
    if is_target:
        held = [key for key in tensors if key.endswith(tuple(f"{n}.base_layer.weight" for n in _EMBEDDING_LAYERS))]
        note = "the adapter is over an embedding, which this step leaves out: PEFT takes that of the base model"
        return {_file_key(key): key for key in held}, () if held else (note,)
    layers = tuple(f"{name}.weight" for name in _EMBEDDING_LAYERS)
    rows = {s.shape[0] for key, s in _recorded_base(weights).items() if key.endswith(layers) and s.shape}
    base = config.get("base_model_name_or_path")
    words = _words_of(base) if isinstance(base, str) and base else None
    if words is None or rows <= {words}:
        return {}, ()
    held = [key for key in tensors if key.endswith(layers)]
    if not held:
        raise ConversionError(
            f"the model in {path} has {max(rows)} words, its base {base} has {words}: the adapter can't be loaded "
            "without the changed embedding, which a step of checkpoint.only_trainable leaves out unless it is trained "
            "(modules_to_save); save steps without it",
            path=path,
        )
    return {_file_key(key): key for key in held}, (f"with the embedding, as the base has {words} words",)


def _words_of(base: str) -> int | None:
    """The size of the vocabulary of a base model in a local folder; None if there is none."""
    config = read_config(base) if os.path.isdir(base) else None
    words = config.get("vocab_size") if config is not None else None
    return words if isinstance(words, int) else None


def _file_key(key: str) -> str:
    return key if key.startswith(PREFIX) else PREFIX + key


def _check_start(config: Mapping[str, Any], path: str) -> None:
    """Refuse an adapter whose initialisation changed the base, which only the step holds. Raises ConversionError."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ConversionError(
            f"the adapter in {path} changed the weights of the base at its initialisation (init_lora_weights = "
            f"{start}), so it does not fit the published ones: for a step with the full model leave out --base and "
            f"give --hf-assets, else use merge_and_unload() of PEFT",
            path=path,
        )


def _base_name(key: str) -> str:
    """Return the base model's name of a tensor wrapped by adapters."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def _base_in(weights: Weights) -> Readable:
    """Return the base of a step's adapters, under the base's names."""
    names = {_base_name(key): key for key in weights.source.tensors if ADAPTER_KEY.fullmatch(key) is None}
    return Renamed(weights.source, names)


def _check_holds_base(weights: Weights) -> None:
    """Refuse a step that holds only the adapter. Raises ConversionError."""
    path, manifest = weights.source.path, weights.manifest
    if manifest is not None and manifest.extra.get(ONLY_TRAINABLE):
        raise ConversionError(
            f"{path} holds only the trained tensors, not the base (checkpoint.only_trainable): name its base model "
            f"with --base",
            path=path,
        )


def _check_base(weights: Weights, given: Readable, adapter: Adapter) -> None:
    """Refuse a base with other values than the one that the adapter was trained on, as far as the step records them.

    Raises:
        ConversionError: naming the tensors.
    """
    path = weights.source.path
    recorded = _recorded_base(weights)
    # A base quantized only for training, as in QLoRA, has other dtypes and shapes.
    recorded = {key: sample for key, sample in recorded.items() if sample.dtype.startswith(("float", "bfloat"))}
    known = {_base_name(key): sample for key, sample in recorded.items()}
    names = {key: name for key in recorded if (name := _base_name(key)) in given.tensors}
    found = {_base_name(key): sample for key, sample in sample_of(given, names).items()}
    trained = {key.removeprefix(PREFIX) for key in adapter.tensors.tensors}
    lines = list(differences(known, {key: sample for key, sample in found.items() if key not in trained}))
    if lines:
        raise ConversionError(
            f"the adapter in {path} was trained on another base than --base: {len(lines)} of {len(found)} tensors "
            "differ, nothing was written\n  " + "\n  ".join(listed(lines)),
            path=path,
            problems=lines,
        )


def _untied(held: Readable, weights: Weights, adapter: Adapter, config: Mapping[str, Any]) -> tuple[Readable, bool]:
    """Give the base a separate output projection if the adapter changes it or the embedding it is tied to.

    PEFT trains a copy of one and leaves the other unchanged, so that the result is no longer tied.

    Raises:
        ConversionError: they are tied in an unknown way.
    """
    if config.get("tie_word_embeddings") is False:
        return held, False
    trained = {key.removeprefix(PREFIX) for key in adapter.tensors.tensors}
    modules = _changed_by(adapter)
    embeddings = [key for key in held.tensors if key.endswith(EMBEDDINGS)]
    outputs = [key for key in OUTPUTS if key in held.tensors]
    if not any(key in modules for key in (*embeddings, *OUTPUTS)):
        return held, False
    if outputs:
        return held, bool(embeddings)
    known = {_base_name(key) for key in _recorded_base(weights)} | trained
    output = [key for key in OUTPUTS if key in known]
    if len(output) != 1 or len(embeddings) != 1:
        raise ConversionError(
            f"the adapter in {weights.source.path} has trained an embedding or output projection, which the base ties "
            f"to each other in an unknown way: use merge_and_unload() of PEFT",
            path=weights.source.path,
        )
    names = {key: key for key in held.tensors} | {output[0]: embeddings[0]}
    return Renamed(held, names), True


def _changed_by(adapter: Adapter) -> set[str]:
    """Return the base's tensors that the adapter changes."""
    trained = {key.removeprefix(PREFIX) for key in adapter.tensors.tensors}
    return {key.partition(".lora_")[0] + ".weight" if ".lora_" in key else key for key in trained}


def _trained_beside(weights: Weights) -> list[str]:
    """Return keys of trained parameters outside the adapter. In a full step, those with optimizer state."""
    manifest, tensors = weights.manifest, weights.source.tensors
    if manifest is None:
        return []
    others = [key for key in tensors if ADAPTER_KEY.fullmatch(key) is None]
    if manifest.extra.get(ONLY_TRAINABLE):
        return others
    start = "optimizer.state."
    with_state = {key.removeprefix(start).rpartition(".")[0] for key in manifest.tensors if key.startswith(start)}
    return [key for key in others if key in with_state]


def _with_trained_beside(weights: Weights, adapter: Adapter) -> Adapter:
    """Add values trained beside the adapter, treated like fully trained modules."""
    beside = {PREFIX + _base_name(key): key for key in _trained_beside(weights)}
    if not beside:
        return adapter
    own = adapters_in(weights.source.tensors)[adapter.name]
    return Adapter(adapter.name, Renamed(weights.source, {**own, **beside}), adapter.config)


def _recorded_base(weights: Weights) -> dict[str, Sample]:
    """Return samples of the base by the names in the step: recorded ones, or else of the tensors it holds."""
    path, manifest = weights.source.path, weights.manifest
    if manifest is None or not manifest.extra.get(ONLY_TRAINABLE):
        names = {key: key for key in weights.source.tensors if ADAPTER_KEY.fullmatch(key) is None}
        return sample_of(weights.source, names)
    key = f"attached.{SAMPLES}"
    if key not in manifest.objects:
        return {}  # from a version that recorded none
    storage, folder = open_storage(path)
    return parse(read_values(storage, folder, manifest, [key], max_nbytes=MAX_NBYTES)[key], path)


def _cast(base: Readable, dtype: str | None) -> Readable:
    recipes = {}
    for key, info in base.tensors.items():
        whole = Box.whole(info.shape)
        cast = dtype if dtype is not None and info.dtype.startswith(("float", "bfloat")) else None
        recipes[key] = Recipe(info.shape, (MappedBox(whole, key, whole, Op.SAME),), cast)
    return Assembled(base, recipes)


class AdapterSink(HfSink):
    """A folder for ``PeftModel.from_pretrained``."""

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]):
        super().__init__(path, HfExtras(config={}))
        self._config = config

    def write(self, reader: SlabReader, shared: Mapping[str, str]) -> None:
        """See ``Sink``."""
        tensors = reader.content.tensors
        layout = plan_layout({key: (info.dtype, info.shape) for key, info in tensors.items()})
        self._write_file(self.place.path(ADAPTER_NAME), layout, reader)
        content = json.dumps(dict(self._config), indent=2, sort_keys=True) + "\n"
        self.storage.write(self.place.path(ADAPTER_CONFIG_NAME), content.encode())
