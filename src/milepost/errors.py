"""All errors that Milepost raises on purpose.

::

    MilepostError                      exit status 1
    ├── ConfigError                    2  an option, a flag or an argument is wrong; nothing was changed
    ├── CheckpointNotFoundError        3  no such step, or no checkpoint there
    ├── StateMismatchError             4  checkpoint and program differ in keys, shapes or dtypes
    ├── PartlyLoadedError              1  a load_state_dict() of the caller's raised: the state is a mix of old and new
    ├── CheckpointDamagedError         5  stored data differs from what was written
    │   ├── DigestMismatchError           a CRC-32 differs: bytes changed
    │   └── FormatError                   a file is malformed, truncated or hostile
    │       └── NewerFormatError             nothing is wrong with it: a newer Milepost wrote it
    ├── SaveError                      6  a save failed on some rank; the previous checkpoints are untouched
    │   └── PlanError                     the ranks' shards leave a gap or overlap
    ├── StorageError                   7  the operating system or the network refused an operation
    ├── ConversionError                8  source, sizes and target of a conversion do not fit
    └── RunLockedError                 10 another run writes to the same folder

Attributes are for programs (``path``, ``key``, ``rank``, ...); the message tells people what happened, where, and what
to do next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

__all__ = [
    "CheckpointDamagedError",
    "CheckpointNotFoundError",
    "ConfigError",
    "ConversionError",
    "DigestMismatchError",
    "FormatError",
    "MilepostError",
    "NewerFormatError",
    "PartlyLoadedError",
    "PlanError",
    "RunLockedError",
    "SaveError",
    "StateMismatchError",
    "StorageError",
]


MAX_MESSAGE_LENGTH = 8000
"""Maximum length of a message in characters; names in a file can have any length."""


def shortened(text: str, limit: int) -> str:
    """Shorten ``text`` to about ``limit`` characters: the middle is replaced by the number of characters left out."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"


MAX_LISTED = 20
"""Maximum number of items of one kind in a message; the rest is counted."""
_MAX_CANDIDATES = 5000
_MAX_NAME_LENGTH = 300
"""Limits on number and length of names searched for a near one: the time grows with the square of both."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem found by a check.

    ``byte_range`` is half-open, in ``file``; None if the problem concerns the entire file. ``file`` is empty and
    ``key`` is None if none is concerned, or if ``message`` names them.
    """

    message: str
    file: str = ""
    key: str | None = None
    byte_range: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = "" if self.byte_range is None else f" bytes {self.byte_range[0]}-{self.byte_range[1]}"
        where = f"{self.file}{where}{f' ({self.key})' if self.key else ''}"
        return f"{where}: {self.message}" if self.file else self.message


def listed(things: Sequence[object], limit: int = MAX_LISTED, *, total: int | None = None, hint: str = "") -> list[str]:
    """List the first ``limit`` of ``things`` as text and, if there are more, an entry with their number and ``hint``.

    ``total`` is their number, if ``things`` are only the first of them.
    """
    first = [str(thing) for thing in things[:limit]]
    rest = (len(things) if total is None else total) - limit
    return [*first, f"... and {rest} more{hint}"] if rest > 0 else first


def near(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the one of ``names`` of which ``name`` may be a misspelling; None if there is none."""
    return next(iter(all_near(name, names, 1, cutoff)), None)


def all_near(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return those of ``names`` of which ``name`` may be a misspelling, nearest first."""
    import difflib  # imported here: 10 ms that only a mistake costs

    candidates = [known for known in islice(names, _MAX_CANDIDATES) if len(known) <= _MAX_NAME_LENGTH]
    return difflib.get_close_matches(name[:_MAX_NAME_LENGTH], candidates, n=most, cutoff=cutoff)


class MilepostError(Exception):
    """Base of all errors of this package. ``exit_status`` is the command line's exit status."""

    exit_status = 1

    def __init__(self, message: str, *, path: str | None = None, key: str | None = None, rank: int | None = None):
        message = shortened(message, MAX_MESSAGE_LENGTH)
        super().__init__(message)
        self.message = message
        self.path = path
        self.key = key
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between ranks; their constructors take keywords, which the default protocol can't replay.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(kind: type[MilepostError], args: tuple[Any, ...], attributes: dict[str, Any]) -> MilepostError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class ConfigError(MilepostError):
    """The configuration is invalid. ``problems`` holds all problems, one line each."""

    exit_status = 2

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = f"{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(message)


class CheckpointNotFoundError(MilepostError):
    """No such checkpoint. ``available`` lists the existing steps, oldest first."""

    exit_status = 3

    def __init__(self, message: str, *, path: str | None = None, available: Sequence[int] = ()):
        super().__init__(message, path=path)
        self.available = tuple(available)


class StateMismatchError(MilepostError):
    """The checkpoint does not match the state to load into. Raised before any data is read."""

    exit_status = 4

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ):
        super().__init__(message, path=path)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)


class PartlyLoadedError(MilepostError):
    """An object's own ``load_state_dict()`` raised, named ``failed``. Objects named ``loaded`` have the new state,
    those ``not_loaded`` the old one."""

    def __init__(self, message: str, *, loaded: Sequence[str], failed: str, not_loaded: Sequence[str]):
        super().__init__(message)
        self.loaded = tuple(loaded)
        self.failed = failed
        self.not_loaded = tuple(not_loaded)


class CheckpointDamagedError(MilepostError):
    """Stored bytes differ from what was written. The step must not be used; others may be undamaged."""

    exit_status = 5


class DigestMismatchError(CheckpointDamagedError):
    """A CRC-32 over stored bytes differs from the recorded one.

    ``byte_range`` is the half-open range ``[start, stop)`` of file ``path`` that holds the damage.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str,
        key: str | None = None,
        byte_range: tuple[int, int],
        expected: int,
        found: int,
    ):
        super().__init__(message, path=path, key=key)
        self.byte_range = byte_range
        self.expected = expected
        self.found = found


class FormatError(CheckpointDamagedError):
    """A file is truncated, malformed or malicious."""


class NewerFormatError(FormatError):
    """A file has a format introduced by a newer Milepost. It may be undamaged: upgrade to read it."""


class SaveError(MilepostError):
    """A save failed on every rank, because of ``rank``. Steps committed before are unchanged."""

    exit_status = 6


class PlanError(SaveError):
    """The ranks' shards of tensor ``key`` leave a gap or overlap."""


class StorageError(MilepostError):
    """A storage operation failed. ``operation`` is its name, ``errno`` the system's error number."""

    exit_status = 7

    def __init__(self, message: str, *, operation: str, path: str, errno: int | None = None, rank: int | None = None):
        super().__init__(message, path=path, rank=rank)
        self.operation = operation
        self.errno = errno


class ConversionError(MilepostError):
    """A conversion is impossible: unmatched keys, wrong sizes, an unsuitable target. Nothing was written."""

    exit_status = 8

    def __init__(self, message: str, *, path: str | None = None, problems: Sequence[str] = ()):
        super().__init__(message, path=path)
        self.problems = tuple(problems)


class RunLockedError(MilepostError):
    """Another live run writes to the same folder. Nothing was changed."""

    exit_status = 10
