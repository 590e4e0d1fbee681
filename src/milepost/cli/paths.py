"""Resolve paths of the command line: a run's folder, one of its steps, any checkpoint."""

from __future__ import annotations

from milepost.errors import CheckpointNotFoundError, ConfigError, listed
from milepost.format.manifest import Manifest
from milepost.run import catalog, checkpoint_record
from milepost.run.branches import History
from milepost.run.catalog import CheckpointInfo, StepEntry
from milepost.run.step_names import find_run, step_of
from milepost.storage import join_path, open_storage
from milepost.storage.base import Entry, Storage, join, split

MAX_LOOKED_AT = 16
"""Number of folders in which a run is looked for, to name it in an error."""


def open_run(path: str) -> tuple[Storage, str]:
    """Open the storage of the run at ``path``; returns it and the run's folder in it.

    Raises:
        CheckpointNotFoundError: there are no steps.
    """
    storage, name = open_storage(path)
    found = storage.stat(name)
    folder = find_run(storage, name) if found is None or found.is_folder else None
    if folder is None:
        raise _no_run(storage, name, path, found)
    return storage, folder


def _no_run(storage: Storage, name: str, path: str, found: Entry | None) -> CheckpointNotFoundError:
    # Imported here: for a run, the usual case, these would take a quarter of a command's start-up time.
    from milepost.run.hf_folder import is_adapter, is_hf_folder
    from milepost.verification.weights import WEIGHTS_SUFFIXES

    what = None
    if found is None and not _has_files(storage, name):
        return CheckpointNotFoundError(f"{path} does not exist", path=path)
    if found is not None and not found.is_folder:
        if not name.endswith(WEIGHTS_SUFFIXES):
            return CheckpointNotFoundError(f"{path} is a file, not the folder of a run", path=path)
        what = "a file of weights"
    elif is_hf_folder(names := [entry.name for entry in storage.list(name) if not entry.is_folder]):
        what = "a PEFT adapter" if is_adapter(names) else "a Hugging Face folder"
    elif (info := catalog.examine(storage, name)) is not None and info.state != "incomplete":
        run = join_path(storage.root, split(name)[0]) if split(name)[0] else storage.root
        hint = f": give the folder of its run, {run}" if step_of(name) is not None else ""
        return CheckpointNotFoundError(f"{path} is a checkpoint, not a run{hint}", path=path)
    if what is not None:
        return CheckpointNotFoundError(f"{path} is {what}, not a run: try `milepost inspect {path}`", path=path)
    below = [join_path(path.rstrip("/"), run) for run in _runs_below(storage, name)]
    hint = f"; the runs in it are {', '.join(listed(below))}" if below else ""
    plain = path.rstrip("/") or path
    return CheckpointNotFoundError(
        f"{plain} holds no step-<N> folder, and neither does {plain}/checkpoint{hint}", path=path
    )


def _runs_below(storage: Storage, folder: str) -> list[str]:
    """Return the folders in ``folder`` that are runs, of the first few."""
    names = [entry.name for entry in storage.list(folder) if entry.is_folder and not entry.name.startswith(".")]
    return [name for name in names[:MAX_LOOKED_AT] if find_run(storage, join(folder, name)) is not None]


def _has_files(storage: Storage, folder: str) -> bool:
    """Return True if anything is in a folder; an object store knows folders only by what is in them."""
    return bool(storage.list(folder))


def run_at(storage: Storage, name: str) -> str | None:
    """Return the folder of the run at ``name``; None if it is a checkpoint, a file, or not a run."""
    found = storage.stat(name)
    if found is not None and not found.is_folder:
        return None
    info = catalog.examine(storage, name)
    return find_run(storage, name) if info is None or info.state == "incomplete" else None


def locate_step(path: str) -> tuple[Storage, str, int]:
    """Split ``path`` into storage, run folder and step number. The step need not exist.

    Raises:
        ConfigError: the path does not end with ``step-<N>``.
    """
    storage, name = open_storage(path)
    step = step_of(name)
    if step is None:
        raise ConfigError(f"{path} is not a step of a run: give a path that ends with step-<N>")
    # `open_storage` is rooted at the parent: the run's folder is the root, ''.
    return storage, split(name)[0], step


def find_step(storage: Storage, folder: str, step: int, path: str) -> StepEntry:
    """Return the entry of ``step``. Raises CheckpointNotFoundError, with the existing steps."""
    entries = catalog.scan(storage, folder)
    for entry in entries:
        if entry.step == step:
            return entry
    steps = [entry.step for entry in entries]
    listed = f"; steps that do: {', '.join(map(str, steps))}" if steps else ""
    raise CheckpointNotFoundError(f"{path} does not exist{listed}", path=path, available=steps)


def is_file(storage: Storage, name: str) -> bool:
    """Return True if ``name`` is a file, not a folder."""
    found = storage.stat(name)
    return found is not None and not found.is_folder


def not_a_checkpoint(storage: Storage, name: str, path: str, info: CheckpointInfo | None) -> CheckpointNotFoundError:
    """Return the error for a path without a committed checkpoint; for a run it names the newest step."""
    if is_file(storage, name):
        return CheckpointNotFoundError(f"{path} is a file, not the folder of a checkpoint", path=path)
    folder = find_run(storage, name)
    if folder is not None:
        entries = catalog.scan(storage, folder)
        newest = History.of(entries).newest or entries[-1]
        message = f"{path} is a run, not a checkpoint: give one of its steps, such as {storage.root}/{newest.path}"
    else:
        from milepost.run.hf_folder import model_in_cache  # see `_no_run`

        reason = info.reason if info is not None else "there is no such folder"
        message = model_in_cache(storage, name) or f"{path} is not a checkpoint: {reason}"
    return CheckpointNotFoundError(message, path=path)


def manifest_at(path: str) -> Manifest:
    """Read the manifest of the checkpoint at ``path``.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        CheckpointDamagedError: its metadata is damaged, or files are missing.
    """
    storage, name = open_storage(path)
    info = None if is_file(storage, name) else catalog.examine(storage, name)
    if info is None or info.state == "incomplete":
        raise not_a_checkpoint(storage, name, path, info)
    return checkpoint_record.read_manifest(storage, name)
