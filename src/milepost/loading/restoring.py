"""Call the ``load_state_dict()`` of objects one after another, and report which are loaded if one raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from milepost.errors import PartlyLoadedError, listed

Restoring = tuple[str, Callable[[], None]]
"""The name of an object, for messages, and the call that gives it its state."""


def restore_each(objects: Sequence[Restoring], *, advice: str) -> None:
    """Call all of them in order.

    Raises:
        PartlyLoadedError: one raised. Those before it are loaded, those after it are not.
    """
    for number, (name, restore) in enumerate(objects):
        try:
            restore()
        except Exception as error:
            loaded, left = ([one for one, _ in part] for part in (objects[:number], objects[number + 1 :]))
            raise PartlyLoadedError(
                f"{name}: load_state_dict() raised {type(error).__name__}: {error}\n"
                f"The state is now a mix of old and new. Loaded: {_names(loaded)}. Partly or not loaded: {name}. "
                f"Not loaded: {_names(left)}; tensors that are filled in place are loaded everywhere. {advice}",
                loaded=loaded,
                failed=name,
                not_loaded=left,
            ) from error


def _names(names: Sequence[str]) -> str:
    return ", ".join(listed(list(dict.fromkeys(names)))) or "nothing"
