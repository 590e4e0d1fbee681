"""Other programs' formats and names.

In reading order::

    dcp      ``StorageWriter`` and ``StorageReader`` for stock torch.distributed.checkpoint
    weights  tensors from any format and into any, streaming (torch-free)
    names    names of parameters between programs, a table read both ways (torch-free)
    hf       Hugging Face: configuration, saving from ranks, loading into them
    as_stored  weights that keep their names: those of any model of transformers (torch-free)
    by_config  which model of a family that is not trained here a source is of (torch-free)
    tabled   a model that there are tables for, as a source says or as it was asked for (torch-free)
    common_names  several sources' models by common names (torch-free)
    arrays   stored tensors as numpy arrays, read when they are indexed (torch-free)
    sinks    what weights are written to: a DCP folder, a Hugging Face folder, a ``.pt`` file (torch-free)
    any_weights  weights of any model by their own names, into a rank's tensors
    training_state  a whole training step from one program's names to another's (torch-free)
    options  what can be asked of a conversion; convert: doing it (torch-free)
    adapters  PEFT's adapters out of a step, or merged into the base model (torch-free)
    merging  weights of one model from several sources into one (torch-free)
"""

from __future__ import annotations
