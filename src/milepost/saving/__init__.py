"""From a state dict to a committed step.

In reading order::

    save            ``save()``: flatten, agree, stage, write, sign off, publish
    arguments       what it is given, checked
    request         what a saver is asked for, and this rank's part of it: flattened, encoded, described
    structure       what ranks tell each other of their states, and what rank 0 makes of it
    agreement       what all ranks agree on before a byte is written: who writes what
    messages        what they and rank 0 say to each other for that; last_plan: what is remembered of it
    comparison      what ranks have in common, compared, and the attempt begun
    nodes           which ranks share a folder, where each node has its own
    replicas        what several ranks hold under one key is the same on all of them, or is stored for each
    stage           the arena, and how tensors become the bytes of this rank's file
    samples         some elements of each, by which changes are noticed that torch does not count
    writer          one rank's file, digested on the way to the storage (torch-free)
    frozen          the file of frozen tensors, shared with the step before (torch-free)
    job             write, sign off, publish, prune: a save from its plan to its end (torch-free)
    async_save      ``async_save()``: the same in the background
    background      one save in the background, and all that becomes of it (torch-free)
    writer_link     the trainer's end of its link to a writer process
    writer_process  that process (torch-free)
    copy_step       a committed step copied to another place, and committed there (torch-free)
    copy_part       the parts that nodes hold of a step, brought together in another place (torch-free)
    copy_process    the process that copies, beside the training (torch-free)
"""

from __future__ import annotations
