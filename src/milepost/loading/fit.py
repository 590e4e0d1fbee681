"""Compare a checkpoint with the state it is loaded into, key by key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from milepost.errors import MAX_LISTED, StateMismatchError, listed, near
from milepost.format.manifest import Manifest
from milepost.loading.policy import Policy, keys_word
from milepost.tensors.layout import dtype_name
from milepost.tensors.state import FlatState


@dataclass(frozen=True, slots=True)
class Fit:
    """The comparison of a checkpoint with a state dict. All keys are sorted."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    """One line each: ``key: shape [8, 4] in the checkpoint, [8, 5] here``."""
    cast: tuple[str, ...]
    num_common: int
    """Number of stored keys that exist here; 1 if nothing is stored."""

    def check(self, path: str, policy: Policy, nowhere: Sequence[str], stored: Collection[str]) -> None:
        """Raise one StateMismatchError with all differences that prevent the load.

        ``nowhere`` are keys of the checkpoint that no rank has and the policy does not allow, of all ``stored`` ones.
        """
        if nowhere or self.is_unfit(policy):
            raise self._error(path, policy, nowhere, stored)

    def _error(self, path: str, policy: Policy, nowhere: Sequence[str], stored: Collection[str]) -> StateMismatchError:
        missing = policy.refused_missing(self.missing)
        lines = [
            *_missing_lines(missing, self.unexpected),
            *_listed(f"{_do(self.mismatched)} not fit", self.mismatched),
            *_listed(f"of the checkpoint {_has(nowhere)} no place in this run", nowhere),
        ]
        if missing:
            lines.append(policy.advice("allow_missing", "leave them as they are", missing, ()))
        unfit = [line.partition(": ")[0] for line in self.mismatched]
        if policy.exclude_option and unfit and all(key in stored for key in unfit):
            lines.append(
                policy.advice(policy.exclude_option, "keep this run's values of those that do not fit", unfit, stored)
            )
        if nowhere:
            others = set(stored).difference(nowhere)
            purpose = "leave out those of the checkpoint" if missing else "leave them out"
            lines.append(policy.advice("allow_unexpected", purpose, nowhere, others))
        return StateMismatchError(
            f"{path} does not match its target; nothing was changed:\n" + "\n".join(lines),
            path=path,
            missing=missing,
            unexpected=self.unexpected if missing or self.mismatched else nowhere,
            mismatched=self.mismatched,
        )

    def is_unfit(self, policy: Policy) -> bool:
        """Return whether keys are missing here, or do not fit, so that the load is refused."""
        return bool(self.mismatched or policy.refused_missing(self.missing))


def check_unexpected(path: str, keys: Sequence[str], policy: Policy, stored: Collection[str]) -> None:
    """Raise StateMismatchError if there are ``keys``: those of weights that this run does not have, of ``stored``."""
    Fit((), (), (), (), num_common=1).check(path, policy, keys, stored)


def compare(manifest: Manifest, flat: FlatState, *, left: Collection[str] = (), mismatched: Sequence[str] = ()) -> Fit:
    """Compare keys, shapes and dtypes of a checkpoint with those of a state dict; keys in ``left`` are not expected."""
    stored = manifest.tensors.keys() | manifest.objects.keys()
    wanted = flat.tensors.keys() | flat.objects.keys()
    unfit, cast = [*mismatched], []
    for key, leaf in flat.tensors.items():
        entry = manifest.tensors.get(key)
        if entry is None:
            if key in manifest.objects:
                unfit.append(f"{key}: not a tensor in the checkpoint, a tensor here")
            continue
        here = dtype_name(leaf.dtype)
        if entry.shape != leaf.shape:
            unfit.append(f"{key}: shape {list(entry.shape)} in the checkpoint, {list(leaf.shape)} here")
        elif entry.dtype != here and _numeric_kind(entry.dtype) != _numeric_kind(here):
            unfit.append(f"{key}: dtype {entry.dtype} in the checkpoint, {here} here")
        elif entry.dtype != here:
            cast.append(f"{key}: {entry.dtype} -> {here}")
    for key in flat.objects:
        if key in manifest.tensors:
            unfit.append(f"{key}: a tensor in the checkpoint, not a tensor here")
    return Fit(
        missing=tuple(sorted(wanted - stored)),
        unexpected=tuple(sorted(stored - wanted - set(left))),
        mismatched=tuple(sorted(unfit)),
        cast=tuple(sorted(cast)),
        num_common=len((wanted | set(left)) & stored) + (not stored),
    )


def _numeric_kind(dtype: str) -> str:
    """The kind of a dtype. Casts within a kind are allowed; between kinds values would lose their meaning."""
    if dtype == "float4_e2m1fn_x2":  # two numbers per element
        return dtype
    for kind in ("float", "complex", "int", "uint"):
        if dtype.removeprefix("b").startswith(kind):
            return kind
    return dtype


def _missing_lines(missing: Sequence[str], unexpected: Collection[str]) -> Iterator[str]:
    hints = {key: near(key, unexpected, cutoff=0.8) for key in missing[:MAX_LISTED]}
    lines = [key + (f" (did you mean '{hint}', which it has?)" if (hint := hints.get(key)) else "") for key in missing]
    yield from _listed(f"{'is' if len(lines) == 1 else 'are'} not in the checkpoint", lines)


def _has(keys: Sequence[str]) -> str:
    return "has" if len(keys) == 1 else "have"


def _do(keys: Sequence[str]) -> str:
    return "does" if len(keys) == 1 else "do"


def _listed(what: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f"  {len(lines)} {keys_word(lines)} {what}:"
        yield from (f"    {line}" for line in listed(lines))
