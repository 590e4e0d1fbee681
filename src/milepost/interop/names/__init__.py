"""Names of parameters between programs: tables read both ways. Torch-free.

In reading order::

    rules        one rule: pattern <-> pattern, and the tensor operation with its inverse
    model_sizes  the sizes of a model
    identity     which model a checkpoint is of, as it is recorded
    llama3, qwen3, qwen3_moe, torchtitan  the tables
    families     all of them by name
    assembled    a recipe put on top of stored tensors: those of one program read as another's
    match        which table fits which keys
    translate    a training checkpoint of another program under our names, for a load and for plan-resume
"""

from __future__ import annotations
