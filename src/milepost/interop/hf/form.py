"""Hugging Face files as the form of a save: what ``run_job`` asks for, put together from ``save``. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from milepost.interop.hf.save import HfTarget, commit_record, plan_image, write_frame, write_part
from milepost.run import commit
from milepost.run.assemble import SaveInfo
from milepost.run.place import Place
from milepost.saving.writer import BlockSource, FileImage
from milepost.storage.base import Storage
from milepost.tensors.plan import WritePlan


@dataclass(frozen=True, slots=True)
class HfForm:
    """A save as a Hugging Face folder, ready for ``from_pretrained``; see ``saving.job.Form``."""

    target: HfTarget

    def write(
        self,
        storage: Storage,
        place: Place,
        plan: WritePlan,
        source: BlockSource | FileImage,
        *,
        is_first: bool,
        num_threads: int,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        image = plan_image(self.target)
        if is_first:
            write_frame(storage, place.folder, image)
        write_part(storage, place.folder, image, plan.items, source, num_threads=num_threads, on_progress=on_progress)

    def publish(
        self, storage: Storage, attempt: str, target: str, info: SaveInfo, *, save_id: str, world_size: int
    ) -> None:
        record = commit_record(info, save_id=save_id, world_size=world_size, now=time.time())
        commit.publish_files(storage, attempt, target, plan_image(self.target).sizes, record)
