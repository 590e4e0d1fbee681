"""The state as tensors and values, and pure plans over their boxes.

In reading order::

    state   objects with a ``state_dict`` <-> one flat mapping {key: tensor or value}
    values  values of other kinds as records; value_types: the types that are known; registry: those of the user's
    snapshot  large plain values: copied at once, encoded later
    parts   tensors that are made of others, taken apart and put together
    tree    how the values of a checkpoint were nested, and that put together again
    layout  DTensor, FSDP and pipeline words -> global shapes and boxes; below it there are only boxes and bytes
    plan    who writes which box where, who reads which bytes: pure functions of frozen values (torch-free)
    sharing  what ranks hold in common, and the plan that each makes of it alone (torch-free)
"""

from __future__ import annotations
