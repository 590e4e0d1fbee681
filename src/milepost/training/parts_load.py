"""The requested parts of a training state, and the target that a checkpoint is read into."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from milepost.config import PARTS, CheckpointConfig, part_of
from milepost.errors import StateMismatchError, near
from milepost.format.manifest import Manifest
from milepost.interop.weights.base_samples import ONLY_TRAINABLE
from milepost.loading.policy import first_match
from milepost.loading.target import Stored, Target
from milepost.tensors.tree import Read
from milepost.training.frozen import KEY as BASE
from milepost.training.frozen import check_base
from milepost.training.training_state import StateLoad, TrainingState

_OPTIMIZER_KEYS = ("optimizer.state.", "optimizer.param_groups.")


class PartsLoad:
    """The requested parts of a training state, and their load once the checkpoint's manifest is known."""

    def __init__(
        self,
        state: TrainingState,
        wanted: tuple[str, ...],
        world_size: int,
        layout: Mapping[str, int],
        config: CheckpointConfig,
        *,
        resumes: bool = False,
    ):
        self._state = state
        self._resumes = resumes
        self.wanted = wanted
        self._excluded_parts = [name for name in config.exclude_from_loading if name in PARTS]
        self._excluded_keys = [name for name in config.exclude_from_loading if name not in PARTS]
        self._allow_unexpected = config.allow_unexpected
        self._left_models: frozenset[str] = frozenset()
        self._frozen: frozenset[str] = frozenset()  # the checkpoint omits these on purpose
        self._world_size = world_size
        self._layout = layout
        self._load: StateLoad | None = None

    @property
    def wants_model(self) -> bool:
        return "model" in self.wanted

    def prepare(self, manifest: Manifest, read: Read, path: str) -> Target:
        """Return the target to read into; the live objects are not changed.

        Raises:
            StateMismatchError: this run's weights differ from those that the checkpoint leaves out.
        """
        same_layout = manifest.world_size == self._world_size and dict(manifest.layout) == self._layout
        if manifest.extra.get(ONLY_TRAINABLE):
            self._frozen = self._state.frozen_keys() - manifest.tensors.keys()
            record = read(BASE) if self._resumes and "model" in self.wanted else None
            if record is not None:
                frozen = {key for key in self._frozen if first_match(self._excluded_keys, key) is None}
                check_base(self._state, frozen, record, path)
        stored = Stored(manifest, read, self.is_excluded if self._excluded_keys or self._frozen else None)
        if same_layout:
            stored.tree.narrow(stored.manifest, self._state.rank)
        self._check_exclusions(stored.keys)
        self._left_models = frozenset(
            key for key in manifest.tensors if part_of(key) == "model" and first_match(self._allow_unexpected, key)
        )
        self._load = self._state.loading(self.wanted, stored, same_layout=same_layout, excluded=self._excluded_parts)
        return self._load.prepare()

    def is_excluded(self, key: str) -> bool:
        """Return whether the user excluded a key from loading."""
        return key in self._frozen or first_match(self._excluded_keys, key) is not None

    def left_out(self) -> list[str]:
        """Return a note on the parameters that the checkpoint leaves out on purpose, if any."""
        if not self._frozen:
            return []
        return [
            f"{len(self._frozen)} parameters are frozen and not in the step: they keep their initial or "
            "previously loaded values"
        ]

    def _check_exclusions(self, stored: Collection[str]) -> None:
        """Refuse a pattern without a match: the values it was meant to keep would be overwritten."""
        known = {*stored, *self._state.model_keys()}
        for pattern in self._excluded_keys:
            if not any(first_match([pattern], key) for key in known):
                hint = near(pattern, known)
                raise StateMismatchError(
                    f"checkpoint.exclude_from_loading: no key of the checkpoint or the model matches '{pattern}'"
                    + (f"; did you mean '{hint}'?" if hint else "")
                )

    @property
    def is_filling(self) -> bool:
        """True once anything live may have been changed."""
        return self._load is not None and self._load.target.is_filling

    def check(self) -> None:
        """Refuse a mismatch, once everything except the live tensors is read."""
        if self._load is not None:
            self._load.check()

    def is_complete(self, key: str) -> bool:
        """Return whether a stored key must be loaded: weights and optimizer state are never left out silently."""
        if self.is_excluded(key):
            return False
        if key.startswith(_OPTIMIZER_KEYS):  # belongs to a parameter that is itself left out
            name = key.split(".", 2)[2]
            if any(name.startswith(f"{left}.") for left in self._left_models):
                return False
        return part_of(key) in self.wanted and part_of(key) in ("model", "optimizer")

    def restore(self) -> list[str]:
        """Restore the live objects from the data read. Returns remarks for the log."""
        assert self._load is not None, "restored after it was read"
        return self._load.restore()
