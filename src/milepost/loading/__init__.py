"""Load a committed step into existing tensors.

In reading order::

    load       ``load()``: into a caller's state dict
    load_from  the stages of every load: read the record, compare, plan, read
    policy     globs of keys that may be missing or left out (torch-free)
    fit        keys of both sides compared
    unwanted   stored keys that no rank wants
    names      keys of a model under the names of its wrappers
    mapped     the files of a step, mapped into memory
    template   a caller's nested state dict, as the target
    target     the target of a load, and the protocol of its objects: each is loaded by its own method
    parts      tensors composed of others; stateful: anything with ``load_state_dict()``
    trial      the effect of a module's own ``load_state_dict()``, found without data
    module     a module, with its hooks; optimizer: an optimizer, without stepping it
    restoring  passes the values read to their objects, and reports how far that went
    sources    the checkpoint, or this node's local part of the same save
    values     options, scalars and other values, most of them read once for all ranks
    measured   whether sharing of blocks pays off, measured with the first ones
    handing    blocks that several ranks need, read by one and distributed, round by round
    reader     ranged reads, checked block by block, straight into the tensors
"""

from __future__ import annotations
