"""Map keys with wrappers' prefixes, as other programs save them, to those of the unwrapped model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from milepost.config import part_of
from milepost.format.box import Box
from milepost.format.manifest import Manifest
from milepost.tensors.read_plan import Origin

_WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "base_layer")
_ADAPTED = "base_model.model."
"""PEFT's prefix of the keys of a model with adapters."""
_PREFIXES = ("module.", "model.", "state_dict.", "model_state_dict.")
"""Names under which a checkpoint or a ``.pt`` file may hold a whole model."""


def renames(stored: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Map each key of a model that is stored under another name, with wrappers or a prefix, to that name.

    Prefixes, of the stored keys or of the wanted ones, are tried only if no wanted key is stored under its own name,
    since all keys of a model have the same prefix. Adapters are wrappers too: a module that they wrap may be stored
    under its name without them.
    """
    direct = {key for key in wanted if key in stored}
    model = [key for key in stored if part_of(key) == "model" and key not in direct]
    bare = {without_wrappers(key): key for key in model}
    if len(bare) < len(model):  # two keys would become one
        return {}
    ours = {without_wrappers(key): key for key in wanted if key not in direct}
    for prefix, own in [("", "")] if direct else product(_prefixes_of(bare), _prefixes_of(ours)):
        here = {name[len(own) :]: key for name, key in ours.items() if name.startswith(own)}
        found = {key: bare[prefix + name] for name, key in here.items() if prefix + name in bare}
        if found:
            used = set(found.values())
            rest = {own + name[len(prefix) :]: key for name, key in bare.items() if name.startswith(prefix)}
            is_moved = prefix or own
            return found | {n: key for n, key in rest.items() if key not in used and n not in found and is_moved}
    return {}


def _prefixes_of(keys: Collection[str]) -> list[str]:
    single = [prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in keys)]
    return ["", *single, *(f"{outer}{inner}" for outer in single for inner in _PREFIXES)]


def without_wrappers(key: str) -> str:
    """Remove wrappers' prefixes and infixes from a key."""
    return ".".join(part for part in key.removeprefix(_ADAPTED).split(".") if part not in _WRAPPERS)


@dataclass(frozen=True, slots=True)
class Translation:
    """A checkpoint's manifest under the target's names."""

    manifest: Manifest
    """Under the target's names. A tensor that is cut from another has boxes of it as shards, without digests."""
    origins: Mapping[str, Sequence[Origin]] = field(default_factory=dict)
    """The origins of each tensor that is not stored under its own name."""
    tied: tuple[str, str] | None = None
    """Groups of stored tensors that must be equal: the manifest has only the first of each."""
    notes: tuple[str, ...] = ()


def renamed(manifest: Manifest, names: Mapping[str, str]) -> Translation:
    """Rename a checkpoint's keys; ``names`` maps new ones to stored ones."""
    if not names:
        return Translation(manifest)
    back = {stored: new for new, stored in names.items()}
    moved = {back.get(key, key): entry for key, entry in manifest.tensors.items()}
    objects = {back.get(key, key): entry for key, entry in manifest.objects.items()}
    paths = {key: path for key, path in manifest.paths.items() if key not in back}
    paths |= {key: (key,) for key in names}
    return Translation(
        replace(manifest, tensors=moved, objects=objects, paths=paths, extra={}),
        {key: (whole(stored, moved[key].shape),) for key, stored in names.items() if key in moved},
    )


def whole(stored: str, shape: Sequence[int]) -> Origin:
    """The origin of a tensor that is stored under another key."""
    box = Box.whole(shape)
    return Origin(box, stored, box)


def longest_prefix(text: str, names: Collection[str]) -> str | None:
    """The longest of ``names`` that is a prefix of ``text`` and ends at one of its dots."""
    while "." in text:
        text = text.rpartition(".")[0]
        if text in names:
            return text
    return None
