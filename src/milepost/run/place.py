"""The place of an attempt's files until it is committed, and the names that they keep."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.format.tags import tag_of, tagged
from milepost.storage.base import Storage, join


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, and the save id that the names in it carry; none where the folder is this attempt's alone.

    Where folders can be renamed, files go to a folder of the attempt, which becomes the checkpoint. Where they can't,
    files are at once where they will stay, and no reader knows of them before the manifest does.
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
