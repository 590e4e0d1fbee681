"""Names of parameters between programs: tables read both ways. Torch-free.

In reading order::

    rules        one rule: pattern <-> pattern, and the tensor operation with its inverse
    model_sizes  the sizes of every model that is trained here
    sizes        the sizes of any model, as tables name them
    adapter_keys  what adapters of PEFT add to a model's keys
    identity     which model a checkpoint is of, as it is recorded
    llama3, qwen3, qwen3_moe, torchtitan  the tables of models that are trained here
    config_family  families whose sizes a config.json tells: how a table is written
    hub_dense, hub_experts  their tables
    families     all of them by name
    assembled    a recipe put on top of stored tensors: those of one program read as another's
    nearest      which family a set of keys resembles
    match        which table fits which keys
    translate    a training checkpoint of another program under our names, for a load and for plan-resume
"""

from __future__ import annotations
