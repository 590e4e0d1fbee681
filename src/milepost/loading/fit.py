"""How a checkpoint and what it is loaded into go together, key by key, and which differences are let pass."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from milepost.errors import MAX_LISTED, ConfigError, StateMismatchError, listed, near
from milepost.format.manifest import Manifest
from milepost.tensors.layout import dtype_name
from milepost.tensors.state import FlatState


@dataclass(frozen=True, slots=True)
class Fit:
    """How a checkpoint and a state dict go together. All keys are sorted."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    """One line each: ``key: shape [8, 4] in the checkpoint, [8, 5] here``."""
    cast: tuple[str, ...]
    num_common: int
    """Stored keys that have a place here; 1 if there is nothing stored to have one."""

    def check(self, path: str, policy: Policy) -> None:
        """Raise one StateMismatchError for all that keeps the checkpoint from being loaded."""
        missing = policy.refused_missing(self.missing)
        if not missing and not self.mismatched:
            return
        lines = [*_missing_lines(missing, self.unexpected), *_listed("do not fit", self.mismatched)]
        if missing:
            lines.append(policy.advice("allow_missing", "leave them as they are", missing, ()))
        raise StateMismatchError(
            f"{path} does not fit what it is loaded into; nothing was changed:\n" + "\n".join(lines),
            path=path,
            missing=missing,
            unexpected=self.unexpected,
            mismatched=self.mismatched,
        )


def unexpected_error(path: str, keys: Sequence[str], policy: Policy, others: Collection[str]) -> StateMismatchError:
    """The error for ``keys`` of a checkpoint that no rank has a place for. ``others`` are its other keys."""
    lines = [
        *_listed(f"of the checkpoint {_has(keys)} no place in this run", keys),
        policy.advice("allow_unexpected", "leave them out", keys, others),
    ]
    return StateMismatchError(
        f"{path} does not fit what it is loaded into; nothing was changed:\n" + "\n".join(lines),
        path=path,
        unexpected=keys,
    )


@dataclass(frozen=True, slots=True)
class LetPass:
    """The keys that one pattern of a policy let pass."""

    option: str
    """``allow_missing`` or ``allow_unexpected``."""
    pattern: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        what = "left as they were" if self.option == "allow_missing" else "left out"
        if len(self.keys) == 1:
            what = what.replace("they were", "it was")
        shown = ", ".join(listed(self.keys, 5))
        return f"{self.option} {self.pattern}: {len(self.keys)} {_keys(self.keys)} {what}: {shown}"


@dataclass(frozen=True, slots=True)
class Policy:
    """Globs of keys that a checkpoint and what it is loaded into need not have in common.

    ``*`` matches dots too, and a pattern that names a whole element of keys matches all below it.
    """

    allow_missing: tuple[str, ...] = ()
    """Keys that the checkpoint may lack: they stay as they are."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of the checkpoint that may have no place: they are left out."""
    spelling: str = "give {option}=[{patterns}]"
    """How a user sets an option, for messages."""

    @classmethod
    def of(cls, strict: bool, allow_missing: Iterable[str], allow_unexpected: Iterable[str]) -> Policy:
        """The policy of a caller of ``load``. Raises ConfigError for what is no list of patterns."""
        missing = checked_patterns("allow_missing", allow_missing)
        unexpected = checked_patterns("allow_unexpected", allow_unexpected)
        return cls(missing, unexpected) if strict else cls(("*",), ("*",))

    def refused_missing(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Those of ``keys`` that must not be missing."""
        return tuple(key for key in keys if first_match(self.allow_missing, key) is None)

    def refused_unexpected(self, keys: Iterable[str]) -> set[str]:
        """Those of ``keys`` that must have a place."""
        return {key for key in keys if first_match(self.allow_unexpected, key) is None}

    def let_pass(self, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[LetPass, ...]:
        """For each pattern the keys that it lets pass, of those that are missing or unexpected."""
        found: dict[tuple[str, str], list[str]] = {}
        for option, patterns, keys in (
            ("allow_missing", self.allow_missing, missing),
            ("allow_unexpected", self.allow_unexpected, unexpected),
        ):
            for key in keys:
                pattern = first_match(patterns, key)
                if pattern is not None:
                    found.setdefault((option, pattern), []).append(key)
        return tuple(LetPass(option, pattern, tuple(keys)) for (option, pattern), keys in found.items())

    def advice(self, option: str, purpose: str, keys: Sequence[str], others: Collection[str]) -> str:
        """The option that would let ``keys`` pass, for a message; it must not cover ``others``."""
        patterns = list(dict.fromkeys(_pattern_for(key, keys, others) for key in keys))
        shown = [f'"{pattern}"' for pattern in patterns[:_MAX_ADVISED]]
        if len(patterns) > _MAX_ADVISED:
            shown.append("...")
        return f"  To {purpose}, {self.spelling.format(option=option, patterns=', '.join(shown))}"


_MAX_ADVISED = 6


def _pattern_for(key: str, keys: Sequence[str], others: Collection[str]) -> str:
    """A glob for all keys with the first element of ``key``, if it lets nothing else pass; else the key itself."""
    head = key.partition(".")[0]
    start = f"{head}."
    alike = sum(other.startswith(start) for other in keys)
    if alike < 2 or any(other.startswith(start) for other in others):
        return key
    return f"{start}*"


def checked_patterns(option: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """``patterns`` as a tuple. Raises ConfigError for a single text, which would be taken apart, and for no text."""
    if isinstance(patterns, str):
        raise ConfigError(f'{option}="{patterns}": expected a list of patterns; write {option}=["{patterns}"]')
    found = tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"{option}: expected patterns of keys, found {pattern!r:.60}")
    return found


def first_match(patterns: Iterable[str], key: str) -> str | None:
    """The first of the globs that matches a key; one that names an element of it matches all below."""
    for pattern in patterns:
        if fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(key, f"{pattern}.*"):
            return pattern
    return None


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
    """Dtypes of one kind are cast on the way; between kinds meaning would be lost."""
    if dtype == "float4_e2m1fn_x2":  # two numbers to an element
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


def _keys(keys: Sequence[str]) -> str:
    return "key" if len(keys) == 1 else "keys"


def _listed(what: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f"  {len(lines)} {_keys(lines)} {what}:"
        yield from (f"    {line}" for line in listed(lines))
