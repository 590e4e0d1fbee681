"""``load``: load a checkpoint into a state dict, from any layout."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from os import PathLike, fspath
from typing import Any, get_args, overload

from milepost.collective.comm import Comm, default_comm, on_every_rank
from milepost.collective.interrupt import interrupts_held
from milepost.config import ReadMode
from milepost.errors import ConfigError
from milepost.format.manifest import Manifest
from milepost.loading.load_from import LoadReport, LoadRequest, load_from
from milepost.loading.mapped import MappedFiles
from milepost.loading.policy import Policy
from milepost.loading.target import Target
from milepost.loading.template import Template, Whole
from milepost.storage import open_storage
from milepost.tensors.state import ordinary_tensors
from milepost.tensors.tree import Read


@overload
def load(
    path: str | PathLike[str], *, mmap: bool = False, comm: Comm | None = None, read: ReadMode = "auto"
) -> dict[str, Any]: ...


@overload
def load(
    path: str | PathLike[str],
    into: MutableMapping[str, Any],
    *,
    strict: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    comm: Comm | None = None,
    read: ReadMode = "auto",
) -> LoadReport: ...


@interrupts_held()
@ordinary_tensors()
def load(
    path: str | PathLike[str],
    into: MutableMapping[str, Any] | None = None,
    *,
    strict: bool = True,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    mmap: bool = False,
    comm: Comm | None = None,
    read: ReadMode = "auto",
) -> LoadReport | dict[str, Any]:
    """Load the checkpoint at ``path`` into ``into``, in place; without it, return all of it. Collective over all ranks.

    ``into`` is a state dict like the one that was saved, on any degrees of parallelism: tensors are filled in place
    (each rank reads only its shards), other values are replaced, objects with ``load_state_dict()`` get their state,
    None and empty containers are replaced by the saved values. Without ``into`` the full state dict is returned on
    every rank, with the saved containers and values, and tensors on the CPU. Every byte loaded is checked against its
    digest. No code from the checkpoint is run.

    Args:
        strict: require all keys on both sides. ``False`` allows any to be missing or left out; the report lists them.
        allow_missing: globs of keys that the checkpoint may lack: they stay unchanged. ``"head"`` and ``"head.*"``
            both match all below ``head``.
        allow_unexpected: globs of keys of the checkpoint that ``into`` may lack (on all ranks): they are left out.
        mmap: without ``into``: tensors are views of the files, loaded into memory on access; changes to them are not
            written. The step, which must be in a local folder, is verified first. Tensors stored in several pieces are
            read as usual.
        read: which rank reads data that several ranks need: each for itself (``"own"``), or one of them, which
            distributes it (``"shared"``); ``"auto"`` measures which is faster, see ``checkpoint.read``.

    Raises:
        StateMismatchError: keys or shapes do not fit, or no key of ``into`` is in the checkpoint. One report of all
            faults, before anything is changed.
        ConfigError: ``into`` is not a state dict, ``path`` not a path, ``read`` unknown, or ``mmap`` is given with
            ``into`` or for a checkpoint that is not in a local folder.
        DigestMismatchError, FormatError: stored bytes are damaged. Some tensors may have been filled already.
        CheckpointNotFoundError: there is no checkpoint at ``path``.
        PartlyLoadedError: a ``load_state_dict()`` of the caller's raised; the error lists what is loaded by then.
        MilepostError: another failure.

        All are raised on every rank if they occur on one.
    """
    _check_arguments(path, into, read)
    if mmap and into is not None:
        raise ConfigError(
            "milepost.load: mmap=True returns the whole state dict, and can't be combined with a state dict to fill"
        )
    storage, folder = open_storage(fspath(path))
    comm = comm if comm is not None else default_comm()
    policy = Policy.of(strict, allow_missing, allow_unexpected)
    template: Template | Whole | None = None

    def make_target(manifest: Manifest, read: Read) -> Target:
        nonlocal template
        mapped = MappedFiles(storage, folder) if mmap else None
        template = Whole(manifest, read, mapped) if into is None else Template(into, manifest, read)
        return template.target

    def check() -> None:
        assert template is not None
        template.check()

    request = LoadRequest(
        storage=storage, folder=folder, make_target=make_target, check=check, policy=policy, read=read
    )
    report = load_from(request, comm)
    assert template is not None
    on_every_rank(comm, template.restore)
    return template.state_dict if isinstance(template, Whole) else report


def _check_arguments(path: object, into: object, read: object) -> None:
    """Explain common mistakes in the arguments, which are the same on every rank."""
    if read not in get_args(ReadMode):
        raise ConfigError(f"milepost.load: expected read to be one of {', '.join(get_args(ReadMode))}, found {read!r}")
    if not isinstance(path, str | PathLike):
        swapped = "; the path comes first: load(path, into)" if isinstance(into, str | PathLike) else ""
        raise ConfigError(f"milepost.load: expected the path of a checkpoint, found a {type(path).__name__}{swapped}")
    if into is None or isinstance(into, MutableMapping):
        return
    kind = type(into).__name__
    instead = f"a dict, and load(path) returns the whole state dict: expected a dict to fill, found a {kind}"
    if hasattr(into, "load_state_dict"):
        instead = (
            f'the state dict that was saved with the object in it, such as {{"model": model}}: found the {kind} itself'
        )
    raise ConfigError(f"milepost.load(path, into): `into` is {instead}")
