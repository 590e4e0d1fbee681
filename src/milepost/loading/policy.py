"""Globs of the keys in which a checkpoint and its target may differ, and the keys that each of them allowed."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from milepost.errors import ConfigError, listed


@dataclass(frozen=True, slots=True)
class LetPass:
    """The keys allowed by one pattern of a policy."""

    option: str
    """``allow_missing`` or ``allow_unexpected``."""
    pattern: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        what = "left as they were" if self.option == "allow_missing" else "left out"
        if len(self.keys) == 1:
            what = what.replace("they were", "it was")
        shown = ", ".join(listed(self.keys, 5))
        return f"{self.option} {self.pattern}: {len(self.keys)} {keys_word(self.keys)} {what}: {shown}"


@dataclass(frozen=True, slots=True)
class Policy:
    """Globs of keys that may be on only one side of a load.

    ``*`` matches dots too, and a pattern that names a complete element of a key matches all keys below it.
    """

    allow_missing: tuple[str, ...] = ()
    """Keys that the checkpoint may lack: they stay unchanged."""
    allow_unexpected: tuple[str, ...] = ()
    """Keys of the checkpoint that the target may lack: they are left out."""
    spelling: str = "give {option}=[{patterns}]"
    """Spelling of an option, for messages."""
    exclude_option: str = ""
    """The option by which keys keep this run's values; empty if there is none."""

    @classmethod
    def of(cls, strict: bool, allow_missing: Iterable[str], allow_unexpected: Iterable[str]) -> Policy:
        """Return the policy of a call of ``load``. Raises ConfigError for anything but lists of patterns."""
        missing = checked_patterns("allow_missing", allow_missing)
        unexpected = checked_patterns("allow_unexpected", allow_unexpected)
        if not isinstance(strict, bool):
            raise ConfigError(f"strict={strict!r:.60}: expected True or False")
        return cls(missing, unexpected) if strict else cls(("*",), ("*",))

    def refused_missing(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Return those of ``keys`` that must not be missing."""
        return tuple(key for key in keys if first_match(self.allow_missing, key) is None)

    def refused_unexpected(self, keys: Iterable[str]) -> set[str]:
        """Return those of ``keys`` that must not be left out."""
        return {key for key in keys if first_match(self.allow_unexpected, key) is None}

    def let_pass(self, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[LetPass, ...]:
        """Return the missing or unexpected keys that each pattern allows."""
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
        """Return the option that would allow ``keys``, for a message; it does not cover ``others``."""
        patterns = list(dict.fromkeys(_pattern_for(key, keys, others) for key in keys))
        shown = [f'"{pattern}"' for pattern in patterns[:_MAX_ADVISED]]
        if len(patterns) > _MAX_ADVISED:
            shown.append("...")
        return f"  To {purpose}, {self.spelling.format(option=option, patterns=', '.join(shown))}"


_MAX_ADVISED = 6


def _pattern_for(key: str, keys: Sequence[str], others: Collection[str]) -> str:
    """Return a glob for all keys with the first element of ``key`` if it matches no others, else the key itself."""
    head = key.partition(".")[0]
    start = f"{head}."
    alike = sum(other.startswith(start) for other in keys)
    if alike < 2 or any(other.startswith(start) for other in others):
        return key
    return f"{start}*"


def checked_patterns(option: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Return ``patterns`` as a tuple. Raises ConfigError for a single string, and for elements that are not strings."""
    if isinstance(patterns, str):
        raise ConfigError(f'{option}="{patterns}": expected a list of patterns; write {option}=["{patterns}"]')
    if not isinstance(patterns, Iterable):
        raise ConfigError(f"{option}: expected a list of patterns, found a {type(patterns).__name__}")
    found = tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"{option}: expected patterns of keys, found {pattern!r:.60}")
    return found


def first_match(patterns: Iterable[str], key: str) -> str | None:
    """Return the first glob that matches a key; one that names an element matches all keys below it."""
    for pattern in patterns:
        if fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(key, f"{pattern}.*"):
            return pattern
    return None


def keys_word(keys: Sequence[str]) -> str:
    return "key" if len(keys) == 1 else "keys"
