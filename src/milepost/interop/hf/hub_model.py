"""Train any model of transformers from and to Hugging Face files in one's own loop, sharded or not."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from milepost.errors import ConfigError, ConversionError, StateMismatchError, listed
from milepost.format.box import Box
from milepost.format.huggingface import GENERATION_CONFIG_NAME
from milepost.format.manifest import Manifest
from milepost.interop.any_weights import check_fit, fill, weights_report
from milepost.interop.hf.form import HfForm
from milepost.interop.hf.hub_names import kept_names, names_at_load
from milepost.interop.hf.kept import ARCHITECTURE, KeptNames, KeptTarget
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.match import difference
from milepost.interop.names.rules import MappedBox, Op, Recipe
from milepost.interop.weights.boxes import Readable, Renamed
from milepost.interop.weights.dequantized import plain_weights
from milepost.interop.weights.open import open_weights, refuse_one_of_several
from milepost.loading.fit import check_unexpected
from milepost.loading.load_from import LoadReport
from milepost.loading.module import DERIVED
from milepost.loading.names import Translation, renames
from milepost.loading.policy import Policy
from milepost.tensors.layout import TensorLeaf


class HubModel:
    """A ``PreTrainedModel`` as a manager's ``hf``. Created by :meth:`milepost.HfModel.of`."""

    def __init__(self, model: nn.Module, assets: str = ""):
        self._model = pretrained_in(model)
        self._assets = assets

    def record(self) -> Mapping[str, Any]:
        """Return the record of each step: the class, which shows that its weights have the hub's names."""
        return {ARCHITECTURE: _class_name(self._model)}

    def check_record(self, extra: Mapping[str, Any], path: str) -> list[str]:
        """Return no notes: keys and shapes decide what fits."""
        return []

    def translate(self, manifest: Manifest) -> Translation | None:
        """Return None: names differ from the module's only in prefixes, which every load recognises."""
        return None

    def form_of(self, dtypes: Mapping[str, str]) -> HfForm:
        """Return the form of a save of tensors of these keys and dtypes, all ranks' together.

        Raises:
            ConversionError: they are not the model's, or the assets can't be copied.
        """
        names = kept_names(self._model)
        config = copy.deepcopy(self._model.config)
        config.dtype = str(self._model.dtype).removeprefix("torch.")
        config.architectures = [_class_name(self._model)]
        can_generate = self._model.can_generate() and self._model.generation_config is not None
        made = {GENERATION_CONFIG_NAME: _as_json(self._model.generation_config)} if can_generate else {}
        target = KeptTarget(
            names=names,
            prefix=_prefix(dtypes, names),
            dtypes=dict(dtypes),
            config=_as_json(config),
            made=made,
            assets=self._assets,
        )
        target.content()
        return HfForm(target)

    def load(
        self, path: str, leaves: Mapping[str, TensorLeaf], policy: Policy, *, num_threads: int, logs_progress: bool
    ) -> LoadReport:
        """Fill this rank's ``leaves`` from the weights at ``path``, by default from the assets. Not collective.

        Their names are the hub's or the module's, also with wrappers' prefixes.

        Raises:
            ConfigError: there is neither a path nor assets.
            ConversionError: they are an adapter, or quantized irreversibly; nothing was changed.
            StateMismatchError: keys or shapes do not fit; nothing was changed.
            CheckpointDamagedError: files are missing, truncated or malformed, or bytes changed.
        """
        path = path or self._assets
        if not path:
            raise ConfigError(
                "checkpoint.initial_load_in_hf needs checkpoint.initial_load_path, or assets of HfModel.of()"
            )
        started = time.monotonic()
        names = kept_names(self._model)
        prefix = _prefix(leaves, names)
        refuse_one_of_several(path)
        opened = open_weights(path)
        with opened.source:
            if opened.is_adapter:
                raise ConversionError(f"{opened.source.path} is a PEFT adapter, not a full model", path=path)
            weights = plain_weights(opened, "float32")  # `pretrained_in` refuses quantized models
            source = weights.source
            view, recipes = _as_stored(source, names, self._model)
            tied = {prefix + name: recipes[kept] for name, kept in names.copies.items()}
            ours = {prefix + name: recipe for name, recipe in recipes.items()} | tied
            there = Assembled(view, {key: ours[key] for key in leaves if key in ours and _is_there(ours[key], view)})
            never_there = {prefix + name for name in names.ignored if prefix + name not in there.tensors}
            missing = sorted(key for key in leaves if key not in there.tensors and key not in never_there)
            optional, missing = _by_class(self._model, "_keys_to_ignore_on_load_missing", missing)
            unused, unexpected = _by_class(
                self._model, "_keys_to_ignore_on_load_unexpected", _unexpected(view, recipes, names)
            )
            self._refuse(source.path, view, there, unexpected, policy)
            _check_tied(view, names, source.path)
            wanted = {key: leaf for key, leaf in leaves.items() if key in there.tensors}
            must_be_there = {key: leaves[key] for key in policy.refused_missing(missing)}
            cast = check_fit(there, {**wanted, **must_be_there}, source.path)
            nbytes = fill(there, wanted, num_threads, f"loading {source.path}" if logs_progress else None)
            source.check_digests()
        let_pass = policy.let_pass(missing, unexpected)
        notes = _notes(sorted(never_there), unused, optional)
        return weights_report(
            *(source.path, len(wanted), nbytes, started),
            unexpected=unexpected,
            missing=missing,
            cast=cast,
            let_pass=let_pass,
            notes=(*weights.notes, *notes, *map(str, let_pass)),
        )

    def _refuse(self, path: str, view: Readable, there: Readable, unexpected: list[str], policy: Policy) -> None:
        """Refuse weights that have none of the model's tensors, or unexpected ones."""
        if not there.tensors:
            raise StateMismatchError(
                f"nothing was loaded: {path} has none of the tensors of {_class_name(self._model)}", path=path
            )
        refused = sorted(policy.refused_unexpected(unexpected))
        check_unexpected(path, refused, policy, view.tensors)


def pretrained_in(model: nn.Module) -> Any:
    """Return the ``PreTrainedModel`` that ``model`` is or wraps (DDP, ``torch.compile``, a custom module).

    Raises:
        ConfigError: there is none or several, or it can't be stored.
    """
    from transformers import PreTrainedModel

    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}." if outer else "") for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not is_inner:
            found.append((name, module))
    if len(found) != 1:
        held = ", ".join(f"{name} ({type(module).__name__})" for name, module in found) or "none"
        raise ConfigError(
            f"HfModel.of() expects a PreTrainedModel of transformers, or a module around one; in "
            f"{type(model).__name__} it found {held}"
        )
    inner: Any = found[0][1]
    if getattr(inner, "hf_quantizer", None) is not None:
        raise ConfigError("HfModel.of() was given a quantized model: its weights can't be trained and stored")
    if any(".base_layer." in name for name, _ in inner.named_parameters()):
        raise ConfigError(
            "HfModel.of() was given a model with PEFT adapters in it: save the steps without `hf`, and write the "
            "adapter, or the model with it merged in, with `milepost export --adapter`"
        )
    return inner


def _class_name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")  # `fully_shard` changes its class


def _as_json(config: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return value


def _prefix(keys: Collection[str], names: KeptNames) -> str:
    """Return the prefix of the module's names in ``keys``: the module may be a part of the saved state."""
    known = {*names.ours, *names.copies}
    if any(key in known for key in keys):
        return ""
    first = next(iter(names.ours))
    found = [key.removesuffix(first) for key in keys if key.endswith(f".{first}")]
    return min(found, key=len, default="")


def _as_stored(source: Readable, names: KeptNames, model: nn.Module) -> tuple[Readable, dict[str, Recipe]]:
    """Return the source's names, by files or module, whichever match more, and how to read it.

    Names that the class's files had in earlier versions of transformers are replaced by today's.
    """
    by_files, by_module = (_without_prefix(source, {**known, **names.copies}) for known in (names.theirs, names.ours))
    in_files = sum(key in by_files.tensors for key in names.theirs) / max(len(names.theirs), 1)
    in_module = sum(key in by_module.tensors for key in names.ours) / max(len(names.ours), 1)
    if in_files >= in_module:
        return _of_today(by_files, names, model), names.into_ours()
    return by_module, {name: _itself(name, shape) for name, shape in names.ours.items()}


def _of_today(view: Readable, names: KeptNames, model: nn.Module) -> Readable:
    """Return ``view`` with the names of files of earlier versions replaced, where today's are absent."""
    unknown = [key for key in view.tensors if key not in names.theirs and not _may_be_left(key, names)]
    if not unknown or all(key in view.tensors for key in names.theirs):
        return view
    plain = {
        link.ours_key: link.theirs_key
        for link in names.links
        if link.op is Op.SAME and link.ours.sizes == names.ours[link.ours_key] == names.theirs[link.theirs_key]
    }
    new = {key: plain.get(name, name) for key, name in names_at_load(model, unknown).items()}
    moved = {name: key for key, name in new.items() if name not in view.tensors}
    return Renamed(view, {key: key for key in view.tensors if key not in set(moved.values())} | moved)


def _itself(name: str, shape: tuple[int, ...]) -> Recipe:
    box = Box.whole(shape)
    return Recipe(shape, (MappedBox(box, name, box, Op.SAME),))


def _without_prefix(source: Readable, wanted: Mapping[str, Any]) -> Renamed:
    moved = renames(source.tensors, wanted)
    return Renamed(source, {key: key for key in source.tensors if key not in set(moved.values())} | moved)


def _is_there(recipe: Recipe, view: Readable) -> bool:
    return all(piece.source_key in view.tensors for piece in recipe.pieces)


def _unexpected(view: Readable, recipes: Mapping[str, Recipe], names: KeptNames) -> list[str]:
    """Return stored tensors from which no tensor of the module is built."""
    used = {piece.source_key for recipe in recipes.values() for piece in recipe.pieces}
    return sorted(key for key in view.tensors if key not in used and not _may_be_left(key, names))


def _by_class(model: Any, name: str, keys: Collection[str]) -> tuple[list[str], list[str]]:
    """Split ``keys`` into those in the list of patterns ``name`` of the class, and the others, as in transformers."""
    patterns = getattr(model, name, None) or ()
    found = [key for key in keys if any(re.search(pattern, key) for pattern in patterns)]
    return found, [key for key in keys if key not in set(found)]


def _notes(computed: Sequence[str], unused: Sequence[str], optional: Sequence[str]) -> list[str]:
    notes = [f"{key} is in no file of this class: left as initialized" for key in computed]
    if unused:
        notes.append(f"not read, as the class does not use them: {', '.join(listed(unused))}")
    if optional:
        notes.append(f"not in the weights, as the class allows, left as initialized: {', '.join(listed(optional))}")
    return notes


def _may_be_left(key: str, names: KeptNames) -> bool:
    """Return whether a stored tensor is redundant: a tied one, or a buffer that models compute."""
    return key in names.copies or key in names.ignored or key.rpartition(".")[2] in DERIVED


def _check_tied(view: Readable, names: KeptNames, path: str) -> None:
    for name, kept in names.copies.items():
        if name in view.tensors and kept in view.tensors:
            found = difference(view, kept, name)
            if found is not None:
                raise StateMismatchError(
                    f"{path}: {found}, but the model ties the two; nothing was changed", path=path, mismatched=[found]
                )
