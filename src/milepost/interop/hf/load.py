"""Start training from Hugging Face files: every rank reads only the ranges that it holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from os import PathLike

from milepost.errors import ConversionError
from milepost.format.huggingface import CONFIG_NAME
from milepost.interop.any_weights import check_fit, fill, weights_report
from milepost.interop.hf.extras import check_config
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.families import family_of
from milepost.interop.names.match import match
from milepost.interop.names.model_sizes import ModelArgs
from milepost.interop.weights.dequantized import plain_weights
from milepost.interop.weights.open import open_weights, refuse_one_of_several
from milepost.loading.load_from import LoadReport
from milepost.tensors.layout import TensorLeaf

_TO_DO = (
    "set model.name and model.flavor (of HfModel: name and flavor) to those of these weights; a model of another "
    "family is trained by a loop of your own, see docs/howto/own-loop.md"
)


def load_hf(
    path: str | PathLike[str],
    model: str,
    args: ModelArgs,
    leaves: Mapping[str, TensorLeaf],
    *,
    num_threads: int = 2,
    logs_progress: bool = False,
) -> LoadReport:
    """Fill this rank's ``leaves`` (our keys) from the weights at ``path``. Not collective.

    ``path`` has any format of ``milepost convert``. With ``logs_progress`` the progress of a long load is logged.

    Raises:
        ConversionError: the weights belong to another model; nothing was changed.
        StateMismatchError: they lack tensors of the leaves; nothing was changed.
        CheckpointDamagedError: files are missing, truncated or malformed, or bytes changed.
    """
    started = time.monotonic()
    refuse_one_of_several(path)
    opened = open_weights(path)
    with opened.source:
        weights = plain_weights(opened, "float32")
        source = weights.source
        family = family_of(model, args)
        if weights.config is not None:
            check_config(weights.config, family.name, args, f"{source.path}/{CONFIG_NAME}")
        found = match(source, family, args, source.path, to_do=_TO_DO)
        if found.args != args:
            raise ConversionError(
                f"{source.path} has a vocabulary of {found.args.vocab_size}, the model one of {args.vocab_size}",
                path=source.path,
            )
        ours = Assembled(found.tensors, found.found.into_ours())
        cast = check_fit(ours, leaves, source.path)
        nbytes = fill(ours, leaves, num_threads, f"loading {source.path}" if logs_progress else None)
        source.check_digests()  # for a `.pt` file or a checkpoint: partly read digests are completed
    notes = (*weights.notes, *found.notes)
    return weights_report(source.path, len(leaves), nbytes, started, cast=cast, notes=notes)
