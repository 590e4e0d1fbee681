"""A model of transformers as Hugging Face files, described by itself instead of a table. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from milepost.errors import ConversionError, listed
from milepost.interop.hf.config import with_dtype
from milepost.interop.hf.extras import HfExtras, lent_files, main_dtype
from milepost.interop.hf.save import HfContent, by_our_key
from milepost.interop.names.rules import Link, Recipe, recipes_of
from milepost.interop.options import DEFAULT_SHARD_NBYTES
from milepost.interop.weights.boxes import TensorInfo

ARCHITECTURE = "architecture"
"""Name of the record in a manifest's ``extra``: the transformers class of the tensors' names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptNames:
    """The tensors of a transformers module, and their form in its files."""

    ours: Mapping[str, tuple[int, ...]]
    """Shapes by the module's names; tied tensors have one."""
    theirs: Mapping[str, tuple[int, ...]]
    """Shapes by the names in the files."""
    links: tuple[Link, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    """Name of a tied tensor that is not stored -> the stored name."""
    ignored: frozenset[str] = frozenset()
    """Names in the module's state that are not in its files."""

    def leaves_out(self, name: str) -> bool:
        """Return whether the files lack a tensor of the module: a tied or computed one."""
        return name in self.copies or name in self.ignored

    def mixed(self, dtypes: Mapping[str, str]) -> list[str]:
        """Report tensors in the files whose parts, by the module's names, are of several ``dtypes``."""
        found: dict[str, set[str]] = {}
        for link in self.links:
            found.setdefault(link.theirs_key, set()).add(dtypes[link.ours_key])
        mixed = {key: sorted(several) for key, several in found.items() if len(several) > 1}
        return [f"{key}: parts of {' and '.join(several)}" for key, several in mixed.items()]

    def into_ours(self) -> dict[str, Recipe]:
        """Return each tensor of the module, assembled from those in the files."""
        return recipes_of(self.ours, ((link.ours_key, link.into_ours()) for link in self.links))

    def into_theirs(self) -> dict[str, Recipe]:
        """Return each tensor in the files, assembled from those of the module."""
        return recipes_of(self.theirs, ((link.theirs_key, link.into_theirs()) for link in self.links))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTarget:
    """See ``save.AnyHfTarget``. ``config`` and ``made`` are files that the model itself writes beside its weights."""

    names: KeptNames
    prefix: str
    """Prefix of our keys before the module's names."""
    dtypes: Mapping[str, str]
    """Our key -> stored dtype."""
    config: Mapping[str, Any]
    made: Mapping[str, Mapping[str, Any]]
    assets: str = ""
    """A Hugging Face folder that provides tokenizer files; empty: none."""
    max_shard_nbytes: int = DEFAULT_SHARD_NBYTES

    def content(self) -> HfContent:
        """See ``save.AnyHfTarget``."""
        names, prefix = self.names, self.prefix
        links = tuple(replace(link, ours_key=prefix + link.ours_key) for link in names.links)
        self._check_keys()
        mixed = names.mixed({name: self.dtypes[prefix + name] for name in names.ours})
        if mixed:
            raise ConversionError(
                "tensors of several dtypes are one tensor in the files: give them one dtype, or set "
                "checkpoint.export_dtype\n  " + "\n  ".join(listed(mixed)),
                problems=mixed,
            )

        nowhere = dict.fromkeys((prefix + name for name in (*names.copies, *names.ignored)), ())
        recipes = {
            key: replace(
                recipe, pieces=tuple(replace(piece, source_key=prefix + piece.source_key) for piece in recipe.pieces)
            )
            for key, recipe in names.into_theirs().items()
        }
        tensors = {
            key: TensorInfo(self.dtypes[recipe.pieces[0].source_key], recipe.shape) for key, recipe in recipes.items()
        }
        extras = HfExtras(
            config=with_dtype(self.config, main_dtype(tensors)),
            folder=self.assets,
            assets=lent_files(self.assets) if self.assets else (),
            made=self.made,
            max_shard_nbytes=self.max_shard_nbytes,
        )
        return HfContent(
            tensors=tensors,
            links={**nowhere, **by_our_key(links)},
            recipes=recipes,
            extras=extras,
            max_shard_nbytes=self.max_shard_nbytes,
        )

    def _check_keys(self) -> None:
        names = self.names
        known = {self.prefix + name for name in (*names.ours, *names.copies, *names.ignored)}
        missing = [key for name in names.ours if (key := self.prefix + name) not in self.dtypes]
        unknown = [key for key in self.dtypes if key not in known]
        if missing or unknown:
            lines = [*(f"missing: {key}" for key in missing), *(f"not the model's: {key}" for key in unknown)]
            raise ConversionError(
                f"the saved state differs from that of the {self.config.get('architectures', ['model'])[0]} that "
                "HfModel.of() was given: Hugging Face files would be incomplete (of a model in pipeline stages, "
                "leave `hf` out and write them from a step, with `milepost export --model hf`)\n  "
                + "\n  ".join(listed(lines)),
                problems=lines,
            )
