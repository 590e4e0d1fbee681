"""Every error that Milepost raises on purpose.

::

    MilepostError                      exit status 1
    ├── ConfigError                    2  an option, a flag or an argument is wrong; nothing was touched
    ├── CheckpointNotFoundError        3  no such step, or no checkpoint there
    ├── StateMismatchError             4  checkpoint and program differ in keys, shapes or dtypes
    ├── CheckpointDamagedError         5  what is stored is not what was written
    │   ├── DigestMismatchError           a CRC-32 differs: bytes changed
    │   └── FormatError                   a file is malformed, truncated or hostile
    │       └── NewerFormatError             nothing is wrong with it: a newer Milepost wrote it
    ├── SaveError                      6  a save failed on some rank; the previous checkpoints are untouched
    │   └── PlanError                     the ranks' shards leave a gap or overlap
    ├── StorageError                   7  the operating system or the network refused an operation
    ├── ConversionError                8  source, sizes and target of a conversion do not fit
    └── RunLockedError                 10 another run writes to the same folder

Attributes hold what a program may want (``path``, ``key``, ``rank``, ...); the message holds what a person
needs: what, where, and what to do next.
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
    "PlanError",
    "RunLockedError",
    "SaveError",
    "StateMismatchError",
    "StorageError",
]


MAX_MESSAGE_LENGTH = 8000
"""Characters of a message. What a file names can be of any length; what a person reads can't."""


def shortened(text: str, limit: int) -> str:
    """``text`` with at most about ``limit`` characters: the middle of a longer one is left out, and counted."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"


MAX_LISTED = 20
"""A message lists this many of one kind, then says how many more there are."""
_MAX_CANDIDATES = 5000
_MAX_NAME_LENGTH = 300
"""Near names are sought among this many, of at most this length: the time grows with the square of both."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it must be.

    ``byte_range`` is half-open, in ``file``; None when the file as a whole is meant. ``file`` is empty, and ``key``
    None, where none is touched, or where ``message`` names them.
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
    """The first ``limit`` of ``things`` as text and, if that is not all, one entry more that says so, with ``hint``.

    ``total`` is how many there are, where ``things`` are only the first of them.
    """
    first = [str(thing) for thing in things[:limit]]
    rest = (len(things) if total is None else total) - limit
    return [*first, f"... and {rest} more{hint}"] if rest > 0 else first


def near(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``names`` that ``name`` may be a misspelling of; None if there is none."""
    return next(iter(all_near(name, names, 1, cutoff)), None)


def all_near(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Those of ``names`` that ``name`` may be a misspelling of, the nearest first."""
    import difflib  # 10 ms that only mistakes pay for

    candidates = [known for known in islice(names, _MAX_CANDIDATES) if len(known) <= _MAX_NAME_LENGTH]
    return difflib.get_close_matches(name[:_MAX_NAME_LENGTH], candidates, n=most, cutoff=cutoff)


class MilepostError(Exception):
    """Base of all errors of this package. ``exit_status`` is what the command line exits with."""

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
    """The configuration is wrong. All problems are collected: ``problems`` holds one line for each."""

    exit_status = 2

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = f"{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(message)


class CheckpointNotFoundError(MilepostError):
    """No such checkpoint. ``available`` lists the steps that do exist, oldest first."""

    exit_status = 3

    def __init__(self, message: str, *, path: str | None = None, available: Sequence[int] = ()):
        super().__init__(message, path=path)
        self.available = tuple(available)


class StateMismatchError(MilepostError):
    """The checkpoint does not fit the state to load into. Raised before a byte of data is read."""

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


class CheckpointDamagedError(MilepostError):
    """Stored bytes are not those that were written. The step must not be used; others may be undamaged."""

    exit_status = 5


class DigestMismatchError(CheckpointDamagedError):
    """A CRC-32 over stored bytes differs from the recorded one.

    ``byte_range`` is the half-open range ``[start, stop)`` of file ``path`` in which the damage lies.
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
    """A file is of a format that a newer Milepost introduced. It may be whole: upgrade to read it."""


class SaveError(MilepostError):
    """A save failed, on every rank, because of ``rank``. Nothing that was committed before is touched."""

    exit_status = 6


class PlanError(SaveError):
    """The ranks' shards leave a gap in a tensor, or overlap. ``key`` names it."""


class StorageError(MilepostError):
    """A storage operation failed. ``operation`` is its name, ``errno`` the system's number for the cause."""

    exit_status = 7

    def __init__(self, message: str, *, operation: str, path: str, errno: int | None = None, rank: int | None = None):
        super().__init__(message, path=path, rank=rank)
        self.operation = operation
        self.errno = errno


class ConversionError(MilepostError):
    """A conversion can't be made: unmatched keys, wrong sizes, an unsuitable target. Nothing was written."""

    exit_status = 8

    def __init__(self, message: str, *, path: str | None = None, problems: Sequence[str] = ()):
        super().__init__(message, path=path)
        self.problems = tuple(problems)


class RunLockedError(MilepostError):
    """Another run that still lives writes to the same folder. Nothing was touched."""

    exit_status = 10
