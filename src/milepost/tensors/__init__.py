"""The state as tensors and values, and pure plans over their boxes.

In reading order::

    state   objects with a ``state_dict`` <-> one flat mapping {key: tensor or value}
    value_types  values other than tensors: the supported types; registry: the user's types
    value_traits  checks of a value before it is written, and the errors
    value_writer  values as records; value_reader: values of records
    snapshot  large plain values: copied at once, encoded later
    parts   tensors composed of others, taken apart and assembled; part_context: what their classes keep besides
    tree    the nesting of a checkpoint's values, recorded and rebuilt
    aliases  tensors that overlap in memory; placements: DTensors on a mesh
    layout  DTensors and other tensors -> global shapes and boxes; below it there are only boxes and bytes
    devices  the order between the streams of a GPU
    plan    who writes which box where: pure functions of frozen values; read_plan: who reads which bytes (torch-free)
    sharing  the state common to ranks, and each rank's plan from it (torch-free)
"""

from __future__ import annotations
