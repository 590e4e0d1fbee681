"""The protocol of a format of weights: the manager saves and loads it without knowing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from milepost.format.manifest import Manifest
from milepost.loading.load_from import LoadReport
from milepost.loading.names import Translation
from milepost.loading.policy import Policy
from milepost.saving.job import Form
from milepost.tensors.layout import TensorLeaf


class WeightsFormat(Protocol):
    """The manager's interface to another format of weights. See ``milepost.HfModel``."""

    def form_of(self, dtypes: Mapping[str, str]) -> Form:
        """Return the form of a save of tensors of these keys and dtypes, all ranks' together. Pure.

        Raises:
            ConversionError: such tensors can't be stored in this format.
        """

    def record(self) -> Mapping[str, Any]:
        """Return the record of the model in each step's manifest ``extra``."""

    def check_record(self, extra: Mapping[str, Any], path: str) -> list[str]:
        """Return notes on the step at ``path`` with the record ``extra``.

        Raises:
            StateMismatchError: it belongs to another model.
        """

    def translate(self, manifest: Manifest) -> Translation | None:
        """Return a checkpoint's manifest under this run's names; None if it already has them, or unknown ones."""

    def load(
        self, path: str, leaves: Mapping[str, TensorLeaf], policy: Policy, *, num_threads: int, logs_progress: bool
    ) -> LoadReport:
        """Fill this rank's ``leaves`` from the weights at ``path``; empty: from the format's default.

        ``policy`` allows missing or unexpected keys. Not collective. Nothing is changed if the weights do not fit.
        """
