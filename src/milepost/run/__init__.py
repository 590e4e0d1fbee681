"""The contents of a run's folder, and who may change them. Torch-free.

In reading order::

    step_names         names in a run's folder, including steps
    node_part          one node's part of a step, where each node has its own folder
    checkpoint_record  the commit record of a checkpoint, and the check of its files against it
    marks              marks of pinned and damaged steps, and of the remote folder
    catalog            the scanner: committed, incomplete, damaged and external steps
    node_steps         the steps that every node holds, with per-node folders
    branches           the descent of steps, and the step to resume from
    retention          the rules for deleting steps, and their deletion
    owner              the process that an attempt or a lock belongs to, and whether it is alive
    lock               one run at a time in a folder
    beside             the user's own files in a step's folder: kept whatever becomes of the step
    deletion           hides folders from readers in one place, then removes them together
    sweep              deletes steps and stale save attempts that are provably Milepost's
    object_sweep       the same on an object store, which has no folders to rename
    takeover           locks a run's folder, once the writers of a run that died have finished
    place              location and names of an attempt's files
    attempts           the folder that a save writes to: begun, taken over, aborted
    signoff            each rank's record of what it wrote, and the wait for all of them
    assemble           sign-offs -> one manifest
    hf_folder          a Hugging Face folder, or a step saved as one, described as a manifest
    values             values that are not tensors, read without torch
    commit             the one place where a checkpoint becomes visible
    object_commit      the commit on an object store: the manifest, put last
    outcome            whether a save was committed, for the ranks that wait for it
    underway           saves in progress, watched from outside
"""

from __future__ import annotations
