"""Other programs' formats and names.

In reading order::

    dcp      ``StorageWriter`` and ``StorageReader`` for stock torch.distributed.checkpoint
    weights  tensors from and to any format, streaming (torch-free)
    names    parameter names of different programs, in two-way tables (torch-free)
    hf       Hugging Face: configuration, saving from ranks, loading into them
    as_stored  weights that keep their names: any model of transformers (torch-free)
    by_config  models of families without a trainer here, from their config.json (torch-free)
    tabled   a model with tables, as recorded in a source or as requested (torch-free)
    common_names  the models of several sources under common names (torch-free)
    arrays   stored tensors as numpy arrays, read on indexing (torch-free)
    sinks    targets of weights: a DCP folder, a Hugging Face folder, a ``.pt`` file (torch-free)
    any_weights  weights of any model by their own names, into a rank's tensors
    training_state  a full training step from one program's names to another's (torch-free)
    options  the options of a conversion; convert: running it (torch-free)
    adapters  PEFT's adapters, exported from a step; lora: a base model with one merged in (torch-free)
    merging  merging weights of one model from several sources (torch-free)
"""

from __future__ import annotations
