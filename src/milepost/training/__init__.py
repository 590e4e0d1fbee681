"""The interface to a training loop: saves and resumes its whole state.

In reading order::

    manager         ``CheckpointManager``: when to save, what to keep, where to resume from
    arguments       its arguments, checked
    run_folder      the folder it writes to, locked, and its remote folder
    training_run    the run that it saves and resumes, as one value
    run_saves       the saves of a run: begun when due, followed to their end
    due             whether a save is due, agreed by all ranks
    schedule        when a save is due by steps or time: pure
    signals         requests to save and to stop, by signal or file
    save_request    the content of each save
    staging_memory  the memory that saves are staged in, estimated before the first is planned
    pending         a save in progress
    save_failures   the consequence of a failed save
    history         the lineage of each save
    metrics         values measured by the loop and recorded with a save
    training_state  the full state of a run as one state dict, and back; owners: how each part is loaded
    modules         the model's parts, their tensors by FQN
    optimizers      optimizer state by FQN, or in the optimizer's own form; optimizers_owner: its load
    foreign_forms   optimizer state as other programs save it
    given_options   this run's options that the saved ones replaced
    attached        files and values that belong to a step
    peft            configuration of a model's adapters, saved with a step
    frozen          a sample of frozen parameters, saved with steps that hold only trainable ones
    random_state    random generators, restored or derived
    choice          which step to resume from: pure
    resume          loading it; parts_load: the parts of the state to load, and their target
    weights_format  the protocol for weights in another format
    events          saves, failures and resumes, for logs and TensorBoard
    hf_saves        periodic saves of the model in Hugging Face's format, beside the steps
    remote          copies committed steps to a remote folder while training continues
    node_tier       the same for per-node folders: when a step counts, and pruning
    hooks           callbacks after a commit: a function, a command line
"""

from __future__ import annotations
