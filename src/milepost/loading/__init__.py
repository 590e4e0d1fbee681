"""From a committed step into the tensors that are there.

In reading order::

    load       ``load()``: read the record, compare, plan, read, restore
    policy     globs of keys that may be missing or left out (torch-free)
    fit        keys of both sides compared
    unwanted   stored keys that no rank has a place for
    names      keys of a model that stand under the names of its wrappers
    mapped     the files of a step mapped into memory, for all of it
    template   a nested state dict of the caller's to load into
    target     what is read into what, and the owners of state: each is loaded through its own door
    parts      tensors that are made of others; stateful: anything with ``load_state_dict()``
    module     a module, with its hooks; optimizer: an optimizer, without a step of it
    sources    the checkpoint, or, nearer, what this node's own folder has of the same save
    values     options, scalars and other values, most of them read once for all ranks
    measured   whether blocks that several ranks want are handed on, found out with the first ones
    handing    blocks that several ranks want, read by one of them and handed on, round by round
    reader     ranged reads, checked block by block, straight into the tensors
"""

from __future__ import annotations
