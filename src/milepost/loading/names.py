"""Keys of a checkpoint as an unwrapped model would have them: other programs save those of its wrappers too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from milepost.config import part_of
from milepost.format.box import Box
from milepost.format.manifest import Manifest
from milepost.tensors.plan import Origin

_WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "base_layer")
_ADAPTED = "base_model.model."
"""Before the keys of a model that PEFT has put adapters over."""
_PREFIXES = ("module.", "model.", "state_dict.", "model_state_dict.")
"""Under what a whole model may stand in a checkpoint or a ``.pt`` file."""


def renames(stored: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """For each key of a model that is stored under another name, that name: one with wrappers or a prefix in it.

    Prefixes are looked for only where no wanted key is stored under its own name: a model that has lost its prefix has
    lost all of it. Adapters wrap too: what they are put over is stored under its name without them.
    """
    direct = {key for key in wanted if key in stored}
    model = [key for key in stored if part_of(key) == "model" and key not in direct]
    bare = {without_wrappers(key): key for key in model}
    if len(bare) < len(model):  # two would become one
        return {}
    ours = {without_wrappers(key): key for key in wanted if key not in direct}
    for prefix in ("",) if direct else ("", *_prefixes_of(bare)):
        found = {key: bare[prefix + name] for name, key in ours.items() if prefix + name in bare}
        if found:
            used = set(found.values())
            rest = {name[len(prefix) :]: key for name, key in bare.items() if name.startswith(prefix)}
            return found | {name: key for name, key in rest.items() if key not in used and name not in found and prefix}
    return {}


def _prefixes_of(keys: Collection[str]) -> list[str]:
    single = [prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in keys)]
    return [*single, *(f"{outer}{inner}" for outer in single for inner in _PREFIXES)]


def without_wrappers(key: str) -> str:
    """A key without what wrappers have put before and into it."""
    return ".".join(part for part in key.removeprefix(_ADAPTED).split(".") if part not in _WRAPPERS)


@dataclass(frozen=True, slots=True)
class Translation:
    """A checkpoint as if it were stored under the names of what it is loaded into."""

    manifest: Manifest
    """Under the names here. Shards of a tensor that is cut out of another are boxes of it, without digests."""
    origins: Mapping[str, Sequence[Origin]] = field(default_factory=dict)
    """The origins of each tensor that is not stored under its own name."""
    tied: tuple[str, str] | None = None
    """Stored tensors of which the manifest has the first only: they must be equal."""
    notes: tuple[str, ...] = ()


def renamed(manifest: Manifest, names: Mapping[str, str]) -> Translation:
    """The checkpoint with other keys; ``names`` maps new ones to those that are stored."""
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
    """The longest of ``names`` that ``text`` begins with, up to one of its dots."""
    while "." in text:
        text = text.rpartition(".")[0]
        if text in names:
            return text
    return None
