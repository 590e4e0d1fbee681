"""What a run's folder holds, and who may change it. Torch-free.

In reading order::

    catalog    one scanner: which steps are there, committed, incomplete, damaged or external
    node_part  one node's part of a step, where each node has a folder of its own
    node_steps which steps all nodes hold, then
    branches   which steps descend from which, and where a run goes on
    retention  which of them may be deleted, and why; deletes them
    owner      the process that an attempt or a lock belongs to, and whether it lives
    lock       one run at a time in a folder
    sweep      deletes steps and stale save attempts, and only what is provably Milepost's
    takeover   locks a run's folder, once the writers of a run that died have finished
    signoff    the record each rank leaves of what it wrote, and the wait for all of them
    assemble   sign-offs -> one manifest
    hf_folder  a Hugging Face folder, or a step saved as one, described as a manifest
    values     values that are not tensors, read without torch
    commit     the one place where a checkpoint becomes visible
    underway   saves that are being written, watched from outside
"""

from __future__ import annotations
