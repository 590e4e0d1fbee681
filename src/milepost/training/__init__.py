"""What a training loop talks to.

In reading order::

    manager         ``CheckpointManager``: when to save, what to keep, where to resume from
    arguments       what it is given, checked
    schedule        when a save is due
    history         what each save descends from
    metrics         values that a loop measures and a save records
    signals         requests to save and to stop, by signal or file, agreed on by all ranks
    training_state  the whole state of a run as one state dict, and back
    modules         the model's parts, their tensors by FQN
    optimizers      their state by FQN, or in a form of their own
    attached        files and values that belong to a step
    peft            configuration of a model's adapters, which travels with a step
    frozen          a sample of what is not trained, and so not in steps of the trainable part
    random_state    random generators, restored or derived
    choice          which step to resume from: pure
    resume          loading it
    events          what happened, for logs and TensorBoard
    hf_saves        periodic saves of the model in the other format, beside the steps
    remote          the tier behind the folder: committed steps copied on, beside the training
    node_tier       the same where each node has a folder of its own: when a step counts there, and what goes
    hooks           what is done after a commit: a function, a command line
"""

from __future__ import annotations
