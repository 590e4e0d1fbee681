"""Find the family that a set of stored keys resembles most, to report on models that no table fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from milepost.errors import listed
from milepost.interop.names.families import CONFIG_FAMILIES, FAMILIES
from milepost.interop.names.rules import Family, Scheme

PREFIXES = ("", "model.", "state_dict.", "module.")
"""Prefixes of a state dict in a checkpoint or a ``.pt`` file."""


@dataclass(frozen=True, slots=True)
class Resemblance:
    """The resemblance of keys to the names of a family, ignoring numbers of layers and experts."""

    families: tuple[str, ...]
    """Several if they have the same names."""
    scheme: str
    num_keys: int
    num_known: int
    unknown: tuple[str, ...]
    """Keys, with ``N`` for each number, that the scheme lacks."""
    absent: tuple[str, ...]
    """Names of the scheme, with ``N`` for each number, that no key has."""

    def lines(self) -> list[str]:
        """Return the report."""
        names = " or ".join(f"'{name}'" for name in self.families)
        found = [
            f"nearest family: {names} (scheme '{self.scheme}'); {self.num_known} of {self.num_keys} keys match it, "
            f"{self.num_keys - self.num_known} do not"
        ]
        found += [f"  does not match: {line}" for line in listed(list(self.unknown))]
        found += [f"  missing: {line}" for line in listed(list(self.absent))]
        return found


def nearest(keys: Collection[str]) -> Resemblance | None:
    """Return the family and scheme with which ``keys`` share most names; None if they share none."""
    best: tuple[float, Resemblance] | None = None
    for prefix in PREFIXES:
        inner = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        counts = Counter(_without_numbers(key) for key in inner)
        for family, scheme, names in _known():
            common = counts.keys() & names
            share = len(common) / len(counts.keys() | names) if common else 0.0
            if not common or (best is not None and share < best[0]):
                continue
            if best is not None and share == best[0]:
                if family.name not in best[1].families and scheme.name == best[1].scheme:
                    same = Resemblance((*best[1].families, family.name), *_fields(best[1]))
                    best = (share, same)
                continue
            unknown = tuple(sorted(counts.keys() - names)) + tuple(key for key in keys if not key.startswith(prefix))
            known = sum(counts[name] for name in common)
            absent = tuple(sorted(names - counts.keys()))
            best = (share, Resemblance((family.name,), scheme.name, len(keys), known, unknown, absent))
    return best[1] if best is not None else None


def _fields(of: Resemblance) -> tuple[str, int, int, tuple[str, ...], tuple[str, ...]]:
    return of.scheme, of.num_keys, of.num_known, of.unknown, of.absent


def _known() -> Iterator[tuple[Family, Scheme, frozenset[str]]]:
    for family in FAMILIES:
        for scheme in family.schemes:
            yield family, scheme, frozenset(_pattern(row.theirs) for row in scheme.rows)


def _pattern(theirs: str) -> str:
    return theirs.format(layer="N", expert="N")


def _without_numbers(key: str) -> str:
    return ".".join("N" if part.isdecimal() else part for part in key.split("."))


def advice(keys: Iterable[str], asked: str | None = None, *, to_do: str = "") -> list[str]:
    """Name the family that keys resemble, and what to do with a model not recognised as ``asked``.

    ``to_do`` replaces the options of ``milepost convert``, for a caller other than that command.
    """
    found = nearest(list(keys))
    lines = found.lines() if found is not None else ["nearest family: none; no key belongs to a supported model"]
    if to_do:
        return [*lines, f"do: {to_do}"]
    ask = [how_to_ask(name) for name in found.families if name != asked] if found is not None else []
    do = f"{' or '.join(ask)} if that is what it is; " if ask else "check what it is; "
    return [*lines, f"do: {do}--model hf to keep the names as they are"]


def how_to_ask(family: str) -> str:
    """Return the options that select a family."""
    if family in CONFIG_FAMILIES:
        return f"--model {family} --hf-assets DIR (with its config.json)"
    return f"--model {family.removesuffix('_moe')} --flavor SIZE"
