"""``HfModel``: the model of a run, so that it can read and write Hugging Face files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from milepost.errors import ConfigError, StateMismatchError
from milepost.format.manifest import Manifest
from milepost.interop.hf.form import HfForm
from milepost.interop.hf.hub_model import HubModel
from milepost.interop.hf.load import load_hf
from milepost.interop.hf.save import HfTarget, plan_image
from milepost.interop.names.identity import CUSTOM, RECORD, ModelIdentity, size_differences, with_settings
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.names.translate import translate
from milepost.loading.load_from import LoadReport
from milepost.loading.names import Translation
from milepost.loading.policy import Policy
from milepost.tensors.layout import TensorLeaf


@dataclass(frozen=True, slots=True, kw_only=True)
class HfModel:
    """The model that a run trains, as the conversion tables define it: needed to read and write Hugging Face files.

    Give it to a :class:`milepost.CheckpointManager` as ``hf``. ``assets`` is a Hugging Face folder that provides
    config, tokenizer files and file index to a save, and weights to a start without ``initial_load_path``; may be
    empty.
    """

    name: str
    args: ModelArgs
    assets: str = ""
    flavor: str = CUSTOM
    """The recorded and displayed name of these sizes."""

    @staticmethod
    def of(model: nn.Module, assets: str = "") -> HubModel:
        """Return any model of transformers as a manager's ``hf``: its steps are written like by ``save_pretrained``.

        ``model`` is a ``PreTrainedModel``, sharded or not (FSDP2, tensor parallelism), or a module around one, such as
        DDP's; the manager is given the same. ``assets`` is a Hugging Face folder that provides tokenizer files to a
        save, and weights to a start without ``initial_load_path``; may be empty.

        Raises:
            ConfigError: there is no such model in it, or it is quantized or has PEFT adapters.
        """
        return HubModel(model, assets)

    @property
    def identity(self) -> ModelIdentity:
        """The model's name, flavor and sizes."""
        return ModelIdentity(name=self.name, flavor=self.flavor, sizes=self.args)

    def record(self) -> Mapping[str, Any]:
        """Return the record of each step, so that it can be converted and exported without naming the model."""
        return {RECORD: self.identity.record()}

    def check_record(self, extra: Mapping[str, Any], path: str) -> list[str]:
        """Return notes on other settings in a step of this model; none if the step does not record them.

        Raises:
            StateMismatchError: the step at ``path`` records another model, or other sizes.
        """
        saved, here = ModelIdentity.recorded(extra), self.identity
        if saved is None:
            return []
        differences = size_differences(saved.sizes, here.sizes)
        if saved.name != here.name or differences:
            what = "" if saved.name != here.name else f" ({', '.join(differences)})"
            raise StateMismatchError(
                f"{path} holds {saved}, but this run trains {here}{what}: choose the model that was saved, or another "
                "folder for the checkpoints of this one",
                path=path,
                mismatched=differences,
            )
        _, changed = with_settings(here.sizes, saved.sizes)
        return [f"it was saved with {', '.join(changed)}, which this run does not use"] if changed else []

    def translate(self, manifest: Manifest) -> Translation | None:
        """Return the manifest of another program's checkpoint under our names."""
        return translate(manifest, self.name, self.args)

    def form_of(self, dtypes: Mapping[str, str]) -> HfForm:
        """Return the form of a save of tensors of these keys and dtypes, all ranks' together.

        Raises:
            ConversionError: the tables lack the model, or the assets belong to another model.
        """
        target = HfTarget(model=self.name, args=self.args, dtypes=dict(dtypes), assets=self.assets)
        plan_image(target)
        return HfForm(target)

    def load(
        self, path: str, leaves: Mapping[str, TensorLeaf], policy: Policy, *, num_threads: int, logs_progress: bool
    ) -> LoadReport:
        """Fill this rank's ``leaves`` from the weights at ``path``, by default from the assets. Not collective.

        The ``policy`` has no effect: the tables define the required keys.

        Raises:
            ConfigError: there is neither a path nor assets.
            ConversionError, StateMismatchError: the weights belong to another model; nothing was changed.
            CheckpointDamagedError: files are missing, truncated or malformed, or bytes changed.
        """
        path = path or self.assets
        if not path:
            raise ConfigError(
                "checkpoint.initial_load_in_hf needs checkpoint.initial_load_path or model.hf_assets_path"
            )
        return load_hf(path, self.name, self.args, leaves, num_threads=num_threads, logs_progress=logs_progress)
