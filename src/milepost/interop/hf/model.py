"""``HfModel``: which model a run trains, so that it can start from Hugging Face files and end in them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from milepost.errors import ConfigError
from milepost.interop.hf.form import HfForm
from milepost.interop.hf.load import load_hf
from milepost.interop.hf.save import HfTarget, plan_image
from milepost.interop.names.model_sizes import ModelArgs
from milepost.loading.load import LoadReport
from milepost.tensors.layout import TensorLeaf


@dataclass(frozen=True, slots=True, kw_only=True)
class HfModel:
    """The model that a run trains, in the words of the conversion tables, which Hugging Face files need.

    Give it to a :class:`milepost.CheckpointManager` as ``hf``. ``assets`` is a Hugging Face folder that lends config,
    tokenizer files and file index to a save, and weights to a start without ``initial_load_path``; may be empty.
    """

    name: str
    args: ModelArgs
    assets: str = ""

    def form_of(self, dtypes: Mapping[str, str]) -> HfForm:
        """How a save of tensors of these keys and dtypes, all ranks' together, is written.

        Raises:
            ConversionError: the model is not one that the tables know, or the assets are of another.
        """
        target = HfTarget(model=self.name, args=self.args, dtypes=dict(dtypes), assets=self.assets)
        plan_image(target)
        return HfForm(target)

    def load(self, path: str, leaves: Mapping[str, TensorLeaf], *, num_threads: int, logs_progress: bool) -> LoadReport:
        """Fill this rank's ``leaves`` from the weights at ``path``, by default from the assets. Not collective.

        Raises:
            ConfigError: there is neither a path nor assets.
            ConversionError, StateMismatchError: the weights are of another model; nothing was changed.
            CheckpointDamagedError: files are missing, truncated or malformed, or bytes changed.
        """
        path = path or self.assets
        if not path:
            raise ConfigError(
                "checkpoint.initial_load_in_hf needs checkpoint.initial_load_path or model.hf_assets_path"
            )
        started = time.monotonic()
        found = load_hf(path, self.name, self.args, leaves, num_threads=num_threads, tell=logs_progress)
        return LoadReport(
            path=found.path,
            step=None,
            kind="model",
            num_tensors=found.num_tensors,
            wanted_nbytes=found.read_nbytes,
            read_nbytes=found.read_nbytes,
            seconds=time.monotonic() - started,
            unexpected=(),
            missing=(),
            cast=found.cast,
            notes=found.notes,
        )
