"""Convert weights that keep their names: a transformers module already has the hub's names and needs no table.

The remaining work is to find the prefix added by a wrapper, to leave out what ``save_pretrained`` leaves out (an output
projection tied to the embedding), and to copy config and tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from milepost.errors import MAX_LISTED, ConversionError, listed, near
from milepost.format.box import Box
from milepost.format.huggingface import SINGLE_NAME
from milepost.format.safetensors import read_header
from milepost.interop.hf.class_names import names_of_class
from milepost.interop.hf.classes import architecture, is_known
from milepost.interop.hf.extras import HfExtras, lent_extras
from milepost.interop.hf.kept import ARCHITECTURE, KeptNames
from milepost.interop.names.adapter_keys import first_of_adapter
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.match import difference
from milepost.interop.names.rules import MappedBox, Op, Recipe
from milepost.interop.options import HUB, ConvertOptions
from milepost.interop.weights.boxes import Readable, Renamed, TensorInfo
from milepost.interop.weights.dequantized import METHODS, method_of, method_of_keys, without_quantization
from milepost.interop.weights.open import Weights
from milepost.storage import open_storage
from milepost.storage.base import join
from milepost.storage.links import open_linked

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Name components added by DDP, torch.compile, FSDP and checkpoint_wrapper, at any position."""
_NESTS = ("model.", "state_dict.", "model_state_dict.")
"""Prefixes of the model in programs' checkpoints (Accelerate: ``model.``). The hub has such names too."""

OUTPUTS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_VOCABULARIES = (*EMBEDDINGS, "shared.weight", "tok_embeddings.weight", "embeddings.weight", "word_embedding.weight")
"""Endings of the names of embeddings, which have one row per word."""
_MAX_REPEATED = 16
"""With more tensors than this that the other lacks, they are not copies but another model."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The tensors to write: name in the target -> name in the source. ``extras`` are added in a HF folder."""

    names: Mapping[str, str]
    extras: HfExtras | None
    notes: tuple[str, ...]
    of_class: KeptNames | None = None
    """Names and cuts of the tensors in files of their class, if the names are its module's."""

    def content(self, weights: Weights, dtype: str | None) -> Assembled:
        """Return a reader of the target's content; floating-point tensors in ``dtype``."""
        if self.of_class is None:
            return Assembled(weights.source, _recipes(self.names, weights.source.tensors, dtype))
        files = Assembled(Renamed(weights.source, self.names), self.of_class.into_theirs())
        return Assembled(files, _recipes({key: key for key in files.tensors}, files.tensors, dtype))

    def back(self, written: Readable) -> Assembled:
        """Return a reader of the written tensors under the names of the source."""
        names = {old: new for new, old in self.names.items()}
        module = written if self.of_class is None else Assembled(written, self.of_class.into_ours())
        return Assembled(module, _recipes(names, module.tensors, None))


def is_of_the_hub(weights: Weights, options: ConvertOptions) -> bool:
    """Return whether the tensors keep their names.

    True if requested, if a config or the step names a transformers class, or if a ``.pt`` file is the target or source
    of an unnamed model.
    """
    if options.model is not None:
        return options.model == HUB
    return bool(_recorded_class(weights) or architecture(weights.config)) or options.to == "pt"


def keep_names(weights: Weights, options: ConvertOptions) -> Kept:
    """Decide which tensors are written under which names. Reads tensors only to compare two that must be tied.

    Raises:
        ConversionError: there is nothing to write, no config for a Hugging Face folder, or the index of
        ``options.hf_assets`` belongs to another model: with missing and unexpected keys.
    """
    source = weights.source
    if not source.tensors:
        raise ConversionError(f"{source.path} holds no model tensors", path=source.path)
    extras = _extras(weights, options) if options.to == "hf" else None
    known = known_names(extras, options, source.tensors) if extras is not None else ()
    index = known
    if source.kind == "hf" and not known and not all(key.startswith(_WRAPPERS) for key in source.tensors):
        index = source.tensors.keys()  # a class may have a `module` of its own within
    names = _without_wrappers(_bare_of_nest(weights), index)
    if extras is None:
        return Kept(names, None, ())
    if source.kind != "hf":
        _refuse_adapter(names, extras.weight_map, source.path)
    bare, notes = _without_tied(weights, names, extras.config)
    repeated = repeated_in(Renamed(source, bare), known)
    notes += [f"{key} is {original}, which is stored once" for key, original in repeated.items()]
    kept = Kept({key: old for key, old in bare.items() if key not in repeated}, extras, tuple(notes))
    if kept.names.keys() != set(known) and (known or _recorded_class(weights) or is_known(architecture(extras.config))):
        kept = _by_class(weights, names, extras, known, options.dtype) or kept
    if kept.of_class is None:
        _check_known(kept.names, known, source.path)
    if options.max_shard_nbytes is not None:
        kept = replace(kept, extras=replace(extras, weight_map={}))
    if extras.config.get("auto_map"):
        note = "the config refers to custom code (auto_map): copy its files yourself, code is not copied"
        kept = replace(kept, notes=(*kept.notes, note))
    return kept


def _recorded_class(weights: Weights) -> str | None:
    """Return the class of transformers whose module has these names, as the step records; None if it records none."""
    said = weights.manifest.extra.get(ARCHITECTURE) if weights.manifest is not None else None
    return said if isinstance(said, str) and said else None


def _by_class(
    weights: Weights, names: Mapping[str, str], extras: HfExtras, known: Collection[str], dtype: str | None
) -> Kept | None:
    """Return the tensors to write if the names are those of the class's module; None if they are not.

    Raises:
        ConversionError: tensors that the class ties differ.
    """
    source = weights.source
    name = _recorded_class(weights) or architecture(extras.config)
    found = names_of_class(name, extras.config) if name is not None and source.kind != "hf" else None
    if found is None:
        return None
    held = {key: old for key, old in names.items() if not found.leaves_out(key)}
    shapes = {key: source.tensors[old].shape for key, old in held.items()}
    faults = list(_module_faults(found.ours, shapes))
    is_of_today = not known or set(known) == found.theirs.keys()  # hub folders of earlier versions have other names
    if len(faults) >= len(names.keys() ^ set(known)) > 0 or (faults and not (known and is_of_today)):
        return None  # they are not the names in files either, so the report is about those
    if faults:
        raise ConversionError(
            f"{source.path} does not hold a {name} as --hf-assets describes it:\n  " + "\n  ".join(listed(faults)),
            path=source.path,
            problems=faults,
        )
    for copy, original in found.copies.items():
        fault = difference(source, names[original], names[copy]) if copy in names else None
        if fault is not None:
            raise ConversionError(
                f"{source.path}: {name} ties {copy} to {original}, but {fault}: it would be lost", path=source.path
            )
    mixed = found.mixed({key: source.tensors[old].dtype for key, old in held.items()}) if dtype is None else []
    if mixed:
        raise ConversionError(
            f"{source.path} has tensors of several dtypes that are one tensor in the files: give --dtype\n  "
            + "\n  ".join(listed(mixed)),
            path=source.path,
            problems=mixed,
        )
    note = f"the names are those of the module of {name}: files have {len(found.theirs)} tensors for its {len(held)}"
    if not is_of_today:
        note += "; those of --hf-assets are of an earlier version of transformers, and were not kept"
    places_all = all(key in extras.weight_map for key in found.theirs)
    return Kept(held, extras if places_all else replace(extras, weight_map={}), (note,), found)


def as_in_module(files: Readable, config: Mapping[str, Any]) -> Readable:
    """Return the tensors in a class's files as its module has them; unchanged if they are not its files'."""
    name = architecture(config)
    found = names_of_class(name, config) if name is not None else None
    if found is None or {key: info.shape for key, info in files.tensors.items()} != found.theirs:
        return files
    return Assembled(files, found.into_ours())


def as_in_files(module: Readable, config: Mapping[str, Any], known: Collection[str]) -> tuple[Readable, str]:
    """Return the tensors of a complete module as its class's files have them, and a note; unchanged if unknown.

    ``known`` are the names in other files of the model, if there are any.
    """
    pair, ties = tied_pair(module.tensors), config.get("tie_word_embeddings")
    is_tied = ties is True and pair is not None and difference(module, *pair) is None
    left_out = set(repeated_in(module, known)) if ties is not False else set()
    if is_tied and pair is not None:
        left_out.add(pair[1])
    plain = Renamed(module, {key: key for key in module.tensors if key not in left_out})
    name = architecture(config)
    if name is None or plain.tensors.keys() == set(known):
        return plain, ""
    found = names_of_class(name, config)
    held = {key: info.shape for key, info in module.tensors.items()}
    if found is None or any(_module_faults(found.ours, {k: s for k, s in held.items() if not found.leaves_out(k)})):
        return plain, ""
    if any(copy in held and difference(module, original, copy) for copy, original in found.copies.items()):
        return plain, ""
    return Assembled(module, found.into_theirs()), f"the names are those of {name}'s files"


def _module_faults(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Report missing, misshapen and unexpected tensors of a module."""
    yield from (f"missing: {key}" for key in wanted if key not in found)
    for key, shape in found.items():
        if key not in wanted:
            yield f"unexpected: {key}"
        elif wanted[key] != shape:
            yield f"{key}: shape {list(shape)} instead of {list(wanted[key])}"


def _extras(weights: Weights, options: ConvertOptions) -> HfExtras:
    folder = os.fspath(options.hf_assets)
    if not folder and weights.config is not None:
        folder = weights.source.path
    if not folder:
        raise ConversionError(
            "a Hugging Face folder needs the model's config.json: name a folder that has it with --hf-assets",
            path=weights.source.path,
        )
    extras = lent_extras(folder, options.dtype, options.max_shard_nbytes, lends_index=bool(options.hf_assets))
    method = method_of(weights.source, extras.config)
    if method in METHODS and method_of_keys(weights.source.tensors) is None:  # the index describes the quantized files
        extras = replace(extras, config=without_quantization(extras.config), weight_map={})
    return extras


def known_names(extras: HfExtras, options: ConvertOptions, stored: Collection[str]) -> Collection[str]:
    """Return the names in the files of ``options.hf_assets``: of its index, or of its only file.

    Those of quantized files are ignored if the model is ``stored`` unquantized.
    """
    if extras.weight_map or not options.hf_assets:
        return extras.weight_map
    storage, folder = open_storage(options.hf_assets)
    if storage.stat(join(folder, SINGLE_NAME)) is None:
        return ()
    with open_linked(storage, join(folder, SINGLE_NAME), anywhere=True) as handle:
        names = read_header(handle).tensors.keys()
    return names if method_of_keys(names) in (None, method_of_keys(stored)) else ()


def _refuse_adapter(names: Mapping[str, str], index: Mapping[str, str], path: str) -> None:
    """Refuse a model that contains an adapter, unless its class itself has those names."""
    key = first_of_adapter(names)
    if key is not None and key not in index:
        raise ConversionError(
            f"{path} holds a PEFT adapter ({key}): no transformers class has weights with such names. Write the "
            f"adapter with `milepost export RUN DST --adapter`, or the model with --merge-adapter",
            path=path,
        )


def _recipes(names: Mapping[str, str], tensors: Mapping[str, TensorInfo], dtype: str | None) -> dict[str, Recipe]:
    recipes = {}
    for new, old in names.items():
        info = tensors[old]
        whole = Box.whole(info.shape)
        cast = dtype if dtype is not None and info.dtype.startswith(("float", "bfloat")) else None
        recipes[new] = Recipe(info.shape, (MappedBox(whole, old, whole, Op.SAME),), cast)
    return recipes


# ---- names ----


def bare_names(weights: Weights) -> dict[str, str]:
    """Return name without prefixes and components of programs and wrappers -> name in the source.

    In Hugging Face files all names are the model's own.
    """
    if weights.source.kind == "hf":
        return {key: key for key in weights.source.tensors}
    return _without_wrappers(_bare_of_nest(weights), ())


def _bare_of_nest(weights: Weights) -> dict[str, str]:
    """Return name without the prefix of the entry that holds the model, if it is known -> name in the source.

    A checkpoint records each key's path; in a ``.pt`` file only names that no module has show the entry.
    """
    keys = list(weights.source.tensors)
    paths = weights.manifest.paths if weights.manifest is not None else {}
    for nest in _NESTS:
        is_entry = nest != "model." or all(len(paths.get(key, ())) > 1 for key in keys)
        if is_entry and all(key.startswith(nest) for key in keys):
            return {key.removeprefix(nest): key for key in keys}
    return {key: key for key in keys}


def _without_wrappers(names: dict[str, str], index: Collection[str]) -> dict[str, str]:
    """Return name without wrappers' components -> name in the source."""
    for wrapper in _WRAPPERS:
        shorter = {key.replace(wrapper, ""): old for key, old in names.items()}
        is_wrapped = any(_parts_have(key, wrapper) for key in names) and len(shorter) == len(names)
        if is_wrapped and not any(_parts_have(key, wrapper) for key in index):
            names = shorter
    for nest in _NESTS:
        if all(key.startswith(nest) for key in names) and _is_nest(nest, names, index):
            names = {key.removeprefix(nest): old for key, old in names.items()}
    return names


def _parts_have(key: str, wrapper: str) -> bool:
    return key.startswith(wrapper) or f".{wrapper}" in key


def _is_nest(nest: str, names: Mapping[str, str], index: Collection[str]) -> bool:
    """Return whether a prefix common to all names is not the model's own. Without an index its repetition shows it."""
    if index:
        return sum(key.removeprefix(nest) in index for key in names) > sum(key in index for key in names)
    inner = [key.removeprefix(nest) for key in names]
    return any(key.startswith(nest) for key in inner) or any(key in OUTPUTS for key in inner)


def tied_pair(keys: Collection[str]) -> tuple[str, str] | None:
    """The names of the embedding and the output projection, which a model may tie, if it has one of each."""
    outputs = [key for key in OUTPUTS if key in keys]
    embeddings = [key for key in keys if key.endswith(EMBEDDINGS)]
    return (embeddings[0], outputs[0]) if len(outputs) == len(embeddings) == 1 else None


def repeated_in(tensors: Readable, known: Collection[str]) -> dict[str, str]:
    """Map each tied tensor that is not ``known`` by its name to the known one that is equal in every bit.

    A module's state has a tied tensor under all its names, its files under one. Only tensors with one row per word are
    considered: others may be equal by chance, for instance zeros.
    """
    found = tensors.tensors
    words = {info.shape[0] for key, info in found.items() if key.endswith(_VOCABULARIES) and info.shape}
    copies = [key for key, info in found.items() if key not in known and info.shape[:1] and info.shape[0] in words]
    if len(copies) > _MAX_REPEATED:
        return {}
    repeated = {}
    for key in copies:
        alike = (other for other, info in found.items() if other in known and info == found[key])
        original = next((other for other in alike if difference(tensors, other, key) is None), None)
        if original is not None:
            repeated[key] = original
    return repeated


def _without_tied(
    weights: Weights, names: Mapping[str, str], config: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """Drop an output projection that the config ties to the embedding."""
    pair = tied_pair(names)
    if config.get("tie_word_embeddings") is not True or pair is None:
        return dict(names), []
    embedding, output = pair
    found = difference(weights.source, names[embedding], names[output])
    if found is not None:
        raise ConversionError(
            f"{weights.source.path}: the config ties {output} to {embedding}, but {found}: it would be lost",
            path=weights.source.path,
        )
    kept = {key: old for key, old in names.items() if key != output}
    return kept, [f"{output} equals {embedding}, which is stored once"]


def _check_known(names: Mapping[str, str], known: Collection[str], path: str) -> None:
    """Refuse an index, or a file of weights, of another model."""
    missing = [key for key in known if key not in names]
    unexpected = [key for key in names if known and key not in known]
    if missing or unexpected:
        lines = list(_index_lines(missing, unexpected))
        raise ConversionError(
            f"{path} does not hold the model of the index or weights in --hf-assets: of its {len(known)} tensors "
            f"{len(missing)} are missing, and {len(unexpected)} are unexpected. If it is another model, give a folder "
            "with its config.json and tokenizer only\n  " + "\n  ".join(listed(lines)),
            path=path,
            problems=lines,
        )


def _index_lines(missing: list[str], unexpected: list[str]) -> Iterator[str]:
    for number, key in enumerate(missing):
        hint = near(key, unexpected) if number < MAX_LISTED else None
        yield f"missing: {key}" + (f" (found {hint})" if hint else "")
    yield from (f"unexpected: {key}" for key in unexpected)
