"""What a training loop talks to.

In reading order::

    manager         ``CheckpointManager``: when to save, what to keep, where to resume from
    schedule        when a save is due
    signals         SIGUSR1 and SIGTERM, agreed on by all ranks
    training_state  the whole state of a run as one state dict, and back
    modules         the model's parts, their tensors by FQN
    optimizers      their state by FQN, or in a form of their own
    random_state    random generators, restored or derived
    resume          which step to resume from, and loading it
    events          what happened, for logs and TensorBoard
"""

from __future__ import annotations
