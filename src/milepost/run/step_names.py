"""Names in a run's folder, and listing them.

======================================  ==================================================================
``step-<N>``                            a step; N in decimal without leading zeros
``.milepost-attempt-<save id>``         a save that is not committed; never a checkpoint
``.milepost-replaced-<save id>-<name>`` the old folder of a step while its replacement takes its name
``.milepost-deleting-<id>``             a step or attempt being deleted; never a checkpoint
``step-<N>.aside-<id>``                 files in a step that were not Milepost's to delete or replace
``.pinned-step-<N>``                    an empty file: never prune that step
``.damaged-step-<N>.json``              a load found damaged bytes in that step
``.remote.json``, ``.node.json``        where steps are copied to; which steps every node holds (a folder per node)
``.lock``, ``.lock-<id>``               the run that writes here; see ``run/lock.py``
``SAVE``, ``STOP``                      created by a user to request a save or a stop; see ``training/signals.py``
``events.jsonl``                        one line per save, for people and dashboards; never read back
======================================  ==================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from milepost.storage.base import Entry, Storage, join, split

ATTEMPT_PREFIX = ".milepost-attempt-"
REPLACED_PREFIX = ".milepost-replaced-"
DELETING_PREFIX = ".milepost-deleting-"
OLD_ATTEMPT_PREFIX = ".attempt-"
OLD_PREFIXES = (OLD_ATTEMPT_PREFIX, ".replaced-", ".deleting-")
"""Names of Milepost 0.1. Other programs use them too, so they are read, but never removed."""
PINNED_PREFIX = ".pinned-"
DAMAGED_PREFIX = ".damaged-"
REMOTE_NAME = ".remote.json"

CHECKPOINT_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp|\.metadata(\.tmp)?|milepost\.((part\.)?json|shards|digests)")
"""Names of the files that indicate a step, complete or interrupted, of Milepost or another program."""

MAX_LISTINGS = 8
"""A folder whose content keeps changing is listed at most this many times."""

_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_REPLACED_NAME = re.compile(rf"(?:{re.escape(REPLACED_PREFIX)}|\.replaced-)[0-9a-f]+-(step-.+)")


def step_of(name: str) -> int | None:
    """The step number in a folder's name, or None: ``step-007`` and ``step-7_old`` are not steps."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step}"


def pin_mark(path: str) -> str:
    """The path of the pin of the step at ``path``."""
    folder, name = split(path)
    return join(folder, PINNED_PREFIX + name)


def damage_mark(path: str) -> str:
    """The path of the damage mark of the checkpoint at ``path``."""
    folder, name = split(path)
    return join(folder, f"{DAMAGED_PREFIX}{name}.json")


def find_run(storage: Storage, path: str) -> str | None:
    """The folder with a run's steps: ``path``, or ``checkpoint`` in it where the trainer puts them; else None."""
    for folder in (path, join(path, "checkpoint")):
        if steps_in({entry.name: entry for entry in storage.list(folder)}):
            return folder
    return None


def list_run(storage: Storage, folder: str) -> tuple[dict[str, Entry], dict[str, dict[str, Entry]]]:
    """List a run's folder, and where one request lists them too, the folders in it."""
    if storage.can_rename:
        return _list_steady(storage, folder), {}
    names: dict[str, Entry] = {}
    inside: dict[str, dict[str, Entry]] = {}
    for path, entry in storage.list_files(folder).items():
        first, _, rest = path.partition("/")
        names.setdefault(first, Entry(first, True, 0, 0.0) if rest else entry)
        if rest and "/" not in rest:
            inside.setdefault(first, {})[rest] = replace(entry, name=rest)
    return names, inside


def _list_steady(storage: Storage, folder: str) -> dict[str, Entry]:
    """A listing that misses no step: listing a folder is not atomic, so a rename at the same time may hide one."""
    names = {entry.name: entry for entry in storage.list(folder)}
    for _ in range(MAX_LISTINGS):
        if not any(name.startswith((ATTEMPT_PREFIX, REPLACED_PREFIX, *OLD_PREFIXES)) for name in names):
            break
        before, names = names, {entry.name: entry for entry in storage.list(folder)}
        if before.keys() == names.keys():
            break
    return names


def steps_in(names: Mapping[str, Entry]) -> dict[int, str]:
    """For each step, its present name."""
    steps = {}
    for name, entry in names.items():
        step = step_of(name)
        if step is not None and (entry.is_folder or entry.is_link):
            steps[step] = name
    for name in names:
        match = _REPLACED_NAME.fullmatch(name)
        step = step_of(match[1]) if match else None
        if step is not None:
            steps.setdefault(step, name)
    return steps
