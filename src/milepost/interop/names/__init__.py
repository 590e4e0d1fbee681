"""Parameter names of different programs, in two-way tables. Torch-free.

In reading order::

    rules        one rule: pattern <-> pattern, and the tensor operation with its inverse
    model_sizes  the sizes of the trainer's models
    sizes        the sizes of any model, by the tables' names
    adapter_keys  the keys of PEFT's adapters
    identity     the recorded model of a checkpoint
    llama3, qwen3, qwen3_moe, torchtitan  the tables of the trainer's models
    config_family  families whose sizes are in a config.json: writing their tables
    hub_dense, hub_experts  their tables
    families     all of them by name
    assembled    recipes over stored tensors: reading one program's as another's
    nearest      the family that a set of keys resembles
    match        the table that fits a set of keys
    translate    another program's training checkpoint under our names, for a load and for plan-resume
"""

from __future__ import annotations
