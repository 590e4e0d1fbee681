"""From a state dict to a committed step.

In reading order::

    save            ``save()``: flatten, agree, stage, write, sign off, publish
    arguments       checks of its arguments
    request         the request of a save, and this rank's part of it: flattened, encoded, described
    structure       the ranks' descriptions of their states, and rank 0's view of them
    agreement       the agreement before a byte is written: who writes what
    messages        the messages between rank 0 and the others; last_plan: the plan kept for the next save
    comparison      comparing replicated state, and starting the attempt
    nodes           the ranks that share a folder, with per-node folders
    replicas        state that several ranks hold under one key: equal, or stored per rank
    arena           the memory in which background saves are staged
    stage           staging of tensors into the image of this rank's file
    samples         sampled elements, to detect changes that torch does not count
    writer          writing one rank's file, with digests (torch-free)
    frozen          the file of frozen tensors, shared with the previous step (torch-free)
    job             write, sign off, publish, prune: a save after its plan (torch-free)
    async_save      ``async_save()``: a save in the background
    peers           noticing the death of a rank that a save waits for (torch-free)
    background      one save in the background, and its outcome (torch-free)
    writer_link     the trainer's end of the connection to a writer process
    writer_process  that process (torch-free)
    copy_step       copying a committed step to another place (torch-free)
    copy_part       combining nodes' parts of a step in another place (torch-free)
    copy_process    the process that copies during training (torch-free)
"""

from __future__ import annotations
