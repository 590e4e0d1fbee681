"""The location and the names of an attempt's files."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.format.tags import tag_of, tagged
from milepost.storage.base import Storage, join

VISIBILITY_S = 60.0
"""Seconds by which another machine's files and their sizes may appear late, since NFS caches both."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, and the save id that its file names carry; empty if the folder belongs to this attempt alone.

    If the storage can rename folders, files go to the attempt's own folder, which becomes the checkpoint. Otherwise
    they are written to their final place, where no reader looks for them before they are in the manifest.
    """

    folder: str
    tag: str = ""

    @classmethod
    def of(cls, storage: Storage, attempt: str, target: str, save_id: str) -> Place:
        """The place of an attempt to save at ``target``."""
        return cls(f"{attempt}/data") if storage.can_rename else cls(target, save_id)

    def name(self, name: str) -> str:
        """The actual name of the file ``name``, here and in the manifest."""
        return tagged(name, self.tag)

    def holds(self, name: str) -> bool:
        """Return whether a name in the folder is that of a file of this attempt."""
        return not self.tag or tag_of(name) == self.tag

    def path(self, name: str) -> str:
        """The storage name of the file ``name``."""
        return join(self.folder, self.name(name))
