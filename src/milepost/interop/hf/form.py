"""Hugging Face files as the form of a save, for ``run_job``, built on ``save``. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from milepost.format.shares import Share
from milepost.interop.hf.merge import merge_ranks
from milepost.interop.hf.save import AnyHfTarget, commit_record, join_shares, plan_image, write_extras, write_part
from milepost.run import commit
from milepost.run.assemble import SaveInfo
from milepost.run.deletion import Deletion
from milepost.run.place import Place
from milepost.run.signoff import SignOff, WrittenFile
from milepost.saving.writer import BlockSource, FileImage, write_file
from milepost.storage.base import Storage
from milepost.tensors.plan import WritePlan


@dataclass(frozen=True, slots=True)
class HfForm:
    """A save as a Hugging Face folder, ready for ``from_pretrained``; see ``saving.job.Form``.

    If several ranks can write one file, each writes its ranges of the final files. Otherwise (in an object store) each
    writes a separate file, and the publishing rank merges them into the final files.
    """

    target: AnyHfTarget

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
    ) -> tuple[tuple[WrittenFile, ...], tuple[Mapping[str, Share], ...]]:
        if not storage.can_share:
            if not plan.items:
                return (), ()
            tensors = replace(plan, objects=())
            file = write_file(storage, place, tensors, source, {}, num_threads=num_threads, on_progress=on_progress)
            return (file,), ()
        image = plan_image(self.target)
        part = write_part(
            *(storage, place.folder, image, plan.items, source),
            with_headers=is_first,
            num_threads=num_threads,
            on_progress=on_progress,
        )
        return (), (*((write_extras(storage, place.folder, image),) if is_first else ()), part)

    def publish(
        self,
        storage: Storage,
        attempt: str,
        target: str,
        signed: Sequence[SignOff],
        info: SaveInfo,
        together: Deletion | None,
    ) -> None:
        save_id = signed[0].save_id
        record = commit_record(info, save_id=save_id, world_size=len(signed), now=time.time())
        if storage.can_share:
            shares = [share for sign_off in signed for share in sign_off.shares]
            written = join_shares(plan_image(self.target), shares)
        else:
            written = merge_ranks(storage, Place.of(storage, attempt, target, save_id), self.target, signed, info)
        commit.publish_files(storage, attempt, target, written, record, together=together)
