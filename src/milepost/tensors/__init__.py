"""The state as tensors and values, and pure plans over their boxes.

In reading order::

    state   objects with a ``state_dict`` <-> one flat mapping {key: tensor or value}
    value_types  values of other kinds: the types that are known; registry: those of the user's
    value_traits  what is asked of one before it is written, and how it is refused
    value_writer  values as records; value_reader: values of records
    snapshot  large plain values: copied at once, encoded later
    parts   tensors that are made of others, taken apart and put together
    tree    how the values of a checkpoint were nested, and that put together again
    layout  DTensor, FSDP and pipeline words -> global shapes and boxes; below it there are only boxes and bytes
    plan    who writes which box where, who reads which bytes: pure functions of frozen values (torch-free)
    sharing  what ranks hold in common, and the plan that each makes of it alone (torch-free)
"""

from __future__ import annotations
