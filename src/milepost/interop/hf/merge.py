"""Merge all ranks' files into Hugging Face files, in an object store, where ranks can't share a file.

Each rank's tensors are in its own file, with digests. One rank streams them into the final files, in memory that does
not grow with the model, and removes the ranks' files. Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from milepost.format.safetensors import SafetensorsLayout
from milepost.format.shares import FileDigests, ShareCount, joined
from milepost.interop.hf.save import AnyHfTarget, plan_image
from milepost.interop.names.assembled import Assembled
from milepost.interop.options import DEFAULT_BUDGET_NBYTES
from milepost.interop.weights.open import manifest_source
from milepost.interop.weights.stream import PlacedTensor, SlabReader, write_image
from milepost.run.assemble import SaveInfo, assemble
from milepost.run.place import Place
from milepost.run.signoff import SignOff
from milepost.storage.base import Storage


def merge_ranks(
    storage: Storage, place: Place, target: AnyHfTarget, signed: Sequence[SignOff], info: SaveInfo
) -> dict[str, FileDigests]:
    """Merge the files ``signed`` by the ranks into the final ones at ``place``; returns names and digests.

    Raises:
        DigestMismatchError: a rank's file changed after its sign-off.
        StorageError: the storage refused.
    """
    image = plan_image(target)
    manifest, _ = assemble(signed, info, now=time.time())
    with manifest_source(storage, place.folder, manifest, None) as source:
        reader = SlabReader(Assembled(source, image.content.recipes), DEFAULT_BUDGET_NBYTES)
        written = {
            place.name(name): _write_weights(storage, place.path(name), image.files[name], reader)
            for name in image.files
        }
        source.check_digests()
    keys = {place.name(name): tuple(layout.tensors) for name, layout in image.files.items()}
    for name, data in image.content.extras.files(keys, reader.content.tensors, has_index=True):
        storage.write(place.path(name), data)
        count = ShareCount(len(data))
        count.add(0, memoryview(data))
        written[place.name(name)] = joined(len(data), [count.share()])
    storage.remove_files(place.folder, list(manifest.files))
    return written


def _write_weights(storage: Storage, path: str, layout: SafetensorsLayout, reader: SlabReader) -> FileDigests:
    placed = [PlacedTensor(key, stored.offset) for key, stored in layout.tensors.items()]
    count = ShareCount(layout.nbytes)
    with storage.open_write(path, layout.nbytes) as handle:
        count.add(0, memoryview(layout.prefix))
        handle.write(0, [layout.prefix])  # first: bytes go out in ascending order
        write_image(handle, placed, reader, digests=False, on_write=count.add)
        handle.sync()
    return joined(layout.nbytes, [count.share()])
