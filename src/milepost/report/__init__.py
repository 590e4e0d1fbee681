"""Reports over whole steps and runs. Torch-free.

In reading order::

    statistics   norm, mean, NaN of each tensor, streaming
    globs        the keys that a command is asked for
    diff         two checkpoints compared
    history      events and disk use of a run
    profile      samples of the weights of each step, and how they moved
    gather       all that the report shows, as values
    pictures     SVG; frame: the parts that pages are made of
    page         the report of a run as HTML; diff_page: that of a comparison
    tensorboard  layer norms and changes as scalars
    resume_plan  what a resume on given degrees would read, rank by rank
    resume_test  kill a training run, resume it, compare bit for bit
"""

from __future__ import annotations
