"""Options and report of a merge. Light to import, for the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from milepost.errors import ConfigError
from milepost.interop.options import DEFAULT_BUDGET_NBYTES, DTYPES

METHODS = ("mean", "linear", "ema", "slerp", "task-arithmetic", "ties")
WITH_BASE = ("task-arithmetic", "ties")
"""Methods that merge differences from a base model."""
DEFAULT_DECAY = 0.9
DEFAULT_DENSITY = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """Options of a merge. An option that belongs to other methods must be None (or empty)."""

    method: str = "mean"
    """One of ``METHODS``."""
    weights: tuple[float, ...] = ()
    """One for each source; empty: all 1. ``mean`` divides by their sum, the others use them unchanged."""
    decay: float | None = None
    """``ema``: share of the average kept at each source; None: 0.9."""
    base: str = ""
    """``task-arithmetic``, ``ties``: the model from which the sources derive."""
    density: float | None = None
    """``ties``: share of each difference to keep, the largest values; None: 0.2."""
    scale: float | None = None
    """``task-arithmetic``, ``ties``: factor of the merged difference; None: 1."""
    dtype: str | None = None
    """Cast every tensor to this; None keeps those of the first source, or of the base."""
    max_shard_nbytes: int | None = None
    """Size of a Hugging Face target's files; None: like the first source's."""
    budget_nbytes: int = DEFAULT_BUDGET_NBYTES
    """Maximum number of bytes in buffers."""

    def check(self, num_sources: int) -> None:
        """Check options against each other and the number of sources. Raises ConfigError with all problems."""
        problems = [*self._problems_of_method(num_sources), *self._problems_of_weights(num_sources)]
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        if problems:
            raise ConfigError(problems)

    def _problems_of_method(self, num_sources: int) -> Iterator[str]:
        method = self.method
        if method not in METHODS:
            yield f"--method {method}: choose one of {', '.join(METHODS)}"
            return
        least = 1 if method in WITH_BASE else 2
        if num_sources < least or (method == "slerp" and num_sources != 2):
            wanted = "exactly 2 sources" if method == "slerp" else "2 or more sources" if least == 2 else "a source"
            yield f"--method {method} merges {wanted}, found {num_sources}"
        if method in WITH_BASE and not self.base:
            yield f"--method {method} needs --base: the model from which the sources derive"
        owners = {
            "--base": (self.base or None, WITH_BASE),
            "--scale": (self.scale, WITH_BASE),
            "--density": (self.density, ("ties",)),
            "--decay": (self.decay, ("ema",)),
        }
        for option, (value, methods) in owners.items():
            if value is not None and method not in methods:
                yield f"{option} is for --method {' and '.join(methods)} only"
        if self.decay is not None and not 0 <= self.decay < 1:
            yield f"--decay must be at least 0 and below 1, not {self.decay:g}"
        if self.density is not None and not 0 < self.density <= 1:
            yield f"--density must be above 0 and at most 1, not {self.density:g}"
        if self.scale is not None and not math.isfinite(self.scale):
            yield f"--scale must be a finite number, not {self.scale:g}"

    def _problems_of_weights(self, num_sources: int) -> Iterator[str]:
        weights = self.weights
        if not weights:
            if self.method == "linear":
                yield "--method linear needs --weights: one number for each source"
            return
        if len(weights) != num_sources:
            yield f"--weights must be one for each source: expected {num_sources}, found {len(weights)}"
        if not all(map(math.isfinite, weights)):
            yield f"--weights must be finite numbers, not {', '.join(f'{weight:g}' for weight in weights)}"
        elif self.method == "ema":
            yield "--weights are not for --method ema, whose weights follow from --decay"
        elif self.method == "mean" and sum(weights) == 0:
            yield "--weights of --method mean are divided by their sum, which must not be 0"
        elif self.method == "slerp" and (min(weights) < 0 or sum(weights) == 0):
            yield "--weights of --method slerp must be 0 or more, and not both 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """The result of a merge. ``checked_nbytes`` of the sources were compared with recorded digests."""

    path: str
    kind: str
    """``dcp``, ``hf`` or ``pt``."""
    method: str
    sources: tuple[str, ...]
    """The base first, if there is one."""
    weights: tuple[float, ...]
    """Factor of each source's values, or of their difference from the base; empty for ``slerp``."""
    num_tensors: int
    written_nbytes: int
    checked_nbytes: int
    verified: bool
    seconds: float
    notes: tuple[str, ...]
