"""The last save as Hugging Face files: what every rank must know of all ranks' tensors before it begins."""

from __future__ import annotations

import torch

from milepost.collective.comm import Comm, failure_on, raise_together
from milepost.interop.hf.form import HfForm, HfModel
from milepost.interop.hf.save import HfTarget, plan_image
from milepost.tensors.layout import dtype_name, stored_as
from milepost.tensors.state import flatten
from milepost.training.training_state import TrainingState


def hf_form(comm: Comm, hf: HfModel, state: TrainingState, dtype: torch.dtype | None) -> HfForm:
    """How the model is to be saved, its floating-point tensors as ``dtype``. Collective: ranks may hold other tensors.

    Raises:
        ConversionError: on every rank, if the model is not one that the tables know; nothing was written.
    """
    stored: dict[str, str] = {}
    failure = None
    try:
        for key, leaf in flatten(state.state_dict(("model",))).tensors.items():
            stored[key] = dtype_name(leaf.dtype if dtype is None else stored_as(leaf, dtype).dtype)
    except BaseException as cause:  # noqa: BLE001 - the other ranks wait for what this one holds
        failure = failure_on(comm.rank, cause)
    raise_together(comm, failure)
    brought = comm.gather(stored)
    merged = {key: name for part in brought for key, name in part.items()} if brought is not None else {}
    dtypes = comm.broadcast(merged)
    target = HfTarget(model=hf.name, args=hf.args, dtypes=dtypes, assets=hf.assets)
    try:
        plan_image(target)  # refuses a model that the tables do not know
    except BaseException as cause:  # noqa: BLE001 - as above
        failure = failure_on(comm.rank, cause)
    raise_together(comm, failure)
    return HfForm(target)
