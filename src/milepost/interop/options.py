"""Options and report of a conversion. Light to import, for the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from milepost.errors import ConfigError, near
from milepost.interop.names.families import ALSO_CALLED, CONFIG_FAMILIES, config_family_named
from milepost.interop.names.model_sizes import MODEL_NAMES, ModelArgs, model_args
from milepost.interop.names.rules import OWN
from milepost.storage import is_folder

TargetKind = Literal["dcp", "hf", "pt"]
DTYPES = ("float32", "bfloat16", "float16")
NAMES = (OWN, "torchtitan-0.2", "torchtitan-0.3")
"""The naming schemes of a written DCP checkpoint."""
HUB = "hf"
"""Instead of a model's name: any transformers module. Its tensors keep their names."""


MODELS = (*MODEL_NAMES, *CONFIG_FAMILIES, *ALSO_CALLED, HUB)
"""All choices for a model."""

DEFAULT_BUDGET_NBYTES = 256 << 20
DEFAULT_SHARD_NBYTES = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Options of a conversion.

    Raises:
        ConfigError: options contradict each other.
    """

    to: TargetKind
    model: str | None = None
    """``llama3`` or ``qwen3``; a family with sizes from a ``config.json`` (``mistral``, ...); ``hf`` for any model of
    transformers, by its own names. None: the model recorded in the checkpoint."""
    flavor: str | None = None
    sizes: ModelArgs | None = None
    """Sizes of a ``model`` that matches no known flavor, instead of ``flavor``."""
    dtype: str | None = None
    """Cast every tensor to this dtype; None keeps each tensor's."""
    names: str = OWN
    """Names in a DCP target: ours, or those of a release of torchtitan."""
    hf_assets: str | os.PathLike[str] = ""
    """A Hugging Face folder (weights not needed) that provides config, tokenizer files and file index; empty: none.

    For a family with sizes from a config, it may provide the config for any target."""
    max_shard_nbytes: int | None = None
    """Size of a Hugging Face target's files; None: by the index of ``hf_assets``, else 5 GB."""
    verify: bool = False
    """Read everything back, convert it back and compare, before it becomes visible."""
    training_state: bool = False
    """Also convert the optimizer's state, the schedule and the counters, to a DCP target."""
    budget_nbytes: int = DEFAULT_BUDGET_NBYTES
    """Maximum number of bytes in buffers."""

    def __post_init__(self) -> None:
        problems = []
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        if self.names not in NAMES:
            problems.append(f"--names {self.names}: choose one of {', '.join(NAMES)}")
        if self.names != OWN and self.to != "dcp":
            problems.append(f"--names {self.names} is for --to dcp only")
        if self.training_state and (self.to != "dcp" or self.dtype is not None or not self._is_trained):
            problems.append(
                f"--training-state is for --to dcp, without --dtype, with --model one of {', '.join(MODEL_NAMES)}"
            )
        if self.hf_assets and not is_folder(self.hf_assets):
            problems.append(f"--hf-assets {self.hf_assets} is not a folder")
        problems += self._model_problems()
        if problems:
            raise ConfigError(problems)

    @property
    def _is_trained(self) -> bool:
        """True if the model may be one that Milepost trains."""
        return self.model is None or self.model in MODEL_NAMES

    def _model_problems(self) -> list[str]:
        problems = []
        family = config_family_named(self.model)
        if self.to != "hf" and ((self.hf_assets and family is None) or self.max_shard_nbytes is not None):
            problems.append("--hf-assets and --max-shard-size are for --to hf only")
        if self.model == HUB or family is not None:
            if self.flavor is not None or self.sizes is not None:
                said = (
                    "tensors keep their names, the rest is in the config" if family is None else "it is in the config"
                )
                problems.append(f"--model {self.model} takes no --flavor: {said}")
            if self.names in NAMES and self.names != OWN and not (family is not None and family.has_scheme(self.names)):
                trained = [*MODEL_NAMES, *(f.name for f in CONFIG_FAMILIES.values() if f.has_scheme(self.names))]
                problems.append(f"--names {self.names} is for {', '.join(trained[:-1])} and {trained[-1]} only")
        elif self.model is not None and self.model not in MODEL_NAMES:
            hint = near(self.model, MODELS, cutoff=0.4)
            did_you_mean = f"did you mean {hint!r}? " if hint is not None else ""
            problems.append(
                f"--model {self.model}: there is no such family; {did_you_mean}choices: {', '.join(MODELS)}"
            )
        elif (self.model is None) != (self.flavor is None and self.sizes is None):
            problems.append("--model and --flavor need each other")
        elif self.model is not None and self.flavor is not None and self.sizes is None:
            try:
                model_args(self.model, self.flavor)
            except ConfigError as error:
                problems += error.problems
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """The result of a conversion. ``checked_nbytes`` of the source were compared with recorded digests."""

    path: str
    model: str
    flavor: str
    source_kind: str
    source_names: str
    num_tensors: int
    written_nbytes: int
    checked_nbytes: int
    verified: bool
    seconds: float
    notes: tuple[str, ...]
