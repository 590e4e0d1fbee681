"""The steps of a run with per-node folders that all nodes hold, so that each rank can read its bytes.

Every node commits its part alone, and its folder holds nothing about the others. A step is settled once all nodes have
committed; each node then records that in its own folder. This distinguishes a settled step that lost a part, which is
damaged, from a step that was never committed, which is incomplete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from milepost.run import catalog, marks
from milepost.run.branches import commit_order
from milepost.run.catalog import StepEntry
from milepost.run.node_part import NodePart, rank_list
from milepost.run.step_names import step_name
from milepost.storage.base import Storage, join

NOTE_NAME = ".node.json"


@dataclass(frozen=True, slots=True)
class NodeFolder:
    """The content of one node's folder."""

    part: NodePart
    """The identity of this node's parts in the present run."""
    entries: tuple[StepEntry, ...]
    settled: Mapping[int, str]
    """The save id of each settled step."""


def look_at_node(storage: Storage, folder: str, part: NodePart) -> NodeFolder:
    """List this node's folder. Raises StorageError if it can't be read."""
    return NodeFolder(part, tuple(catalog.scan(storage, folder)), settled_steps(storage, folder))


def settled_steps(storage: Storage, folder: str) -> dict[int, str]:
    """The settled steps recorded in the folder; empty if the record is missing or malformed."""
    name = join(folder, NOTE_NAME)
    if storage.stat(name) is None:
        return {}
    try:
        said = json.loads(storage.read(name, marks.MAX_MARK_NBYTES))["settled"]
        return {int(step): str(save_id) for step, save_id in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def note_settled(storage: Storage, folder: str, step: int, save_id: str) -> None:
    """Record durably that a step is settled. Records of deleted steps are dropped."""
    names = {entry.name for entry in storage.list(folder)}
    kept = {s: i for s, i in settled_steps(storage, folder).items() if step_name(s) in names}
    storage.replace(join(folder, NOTE_NAME), json.dumps({"settled": {**kept, step: save_id}}).encode())
    storage.sync_folder(folder)


def merged(folders: Sequence[NodeFolder], world_size: int, layout: Mapping[str, int]) -> list[StepEntry]:
    """The steps of all nodes' folders, each once: ``committed`` if each rank can read the state that it saved.

    ``world_size`` and ``layout`` are this run's: with others, ranks hold other parts of the state.
    """
    steps = sorted({entry.step for folder in folders for entry in folder.entries})
    return [_merged(step, folders, world_size, layout) for step in steps]


def _merged(step: int, folders: Sequence[NodeFolder], world_size: int, layout: Mapping[str, int]) -> StepEntry:
    found = {folder.part.node: entry for folder in folders for entry in folder.entries if entry.step == step}
    odd = next((entry for entry in found.values() if entry.state in ("newer", "unreadable")), None)
    if odd is not None:
        return odd
    newest = max(found.values(), key=lambda entry: (bool(entry.save_id), commit_order(entry)))
    faults = list(_faults(newest, found, folders, world_size, layout))
    if not faults:
        nbytes = sum(entry.nbytes for entry in found.values())
        pinned = any(entry.pinned for entry in found.values())
        return replace(newest, state="committed", reason="", nbytes=nbytes, pinned=pinned, part=None)
    was_settled = any(step in folder.settled for folder in folders)
    why = f"some ranks do not find their data in their node's folder: {'; '.join(faults)}"
    return replace(newest, state="damaged" if was_settled else "incomplete", reason=why, part=None)


def _faults(
    newest: StepEntry,
    found: Mapping[int, StepEntry],
    folders: Sequence[NodeFolder],
    world_size: int,
    layout: Mapping[str, int],
) -> Iterator[str]:
    """The reasons why some ranks of this run can't read the save of ``newest``."""
    for folder in folders:
        part, entry = folder.part, found.get(folder.part.node)
        where = f"node {part.node} ({rank_list(part.ranks)})"
        if entry is None:
            yield f"{where} has no part of it"
        elif entry.state == "damaged":
            yield f"{where}: {entry.reason}"
        elif entry.save_id != newest.save_id:
            yield f"{where} holds another save of this step"
        elif entry.state == "committed":
            continue  # it holds the whole state, which any rank can read
        elif entry.part is None:
            yield f"{where}: {entry.reason}"
        elif entry.world_size != world_size or (entry.part.ranks, entry.part.num_nodes) != (part.ranks, len(folders)):
            yield f"{where} has the part of {rank_list(entry.part.ranks)} of {entry.world_size}"
        elif entry.layout and layout and dict(entry.layout) != dict(layout):
            yield f"{where} has the part of a run with other degrees of parallelism"


def outdated(folder: NodeFolder, kept: Sequence[str], order: int) -> list[StepEntry]:
    """The parts that may be deleted once a step of ``order`` is settled: older ones of its run that are not ``kept``.

    ``kept`` are save ids.
    """
    run = next((e.lineage.run for e in folder.entries if e.lineage is not None and e.lineage.order == order), None)
    return [
        entry
        for entry in folder.entries
        if entry.state == "part"
        and entry.lineage is not None
        and entry.lineage.run == run
        and entry.lineage.order < order
        and entry.save_id not in kept
        and not entry.pinned
    ]
