"""What a training loop talks to.

In reading order::

    manager         ``CheckpointManager``: when to save, what to keep, where to resume from
    schedule        when a save is due
    signals         SIGUSR1 and SIGTERM, agreed on by all ranks
    training_state  the whole state of a run as one state dict, and back
    parts           model, optimizer, scheduler, loader and random generators, each in its own way
    resume          which step to resume from (torch-free); loader: doing so
    events          what happened, for logs and TensorBoard
"""

from __future__ import annotations
