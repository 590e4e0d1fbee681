"""Reports over whole steps and runs. Torch-free.

In reading order::

    statistics   norm, mean, NaN of each tensor, streaming
    globs        selection of keys by shell patterns
    diff         two checkpoints compared; differences: the elements of two tensors
    history      events and disk use of a run
    profile      samples of each step's weights, and their changes
    gather       everything that the report shows, as values
    pictures     SVG; frame: the building blocks of the pages
    page         the report of a run as HTML; diff_page: the report of a comparison
    tensorboard  layer norms and changes as scalars
    resume_plan  what a resume on given degrees would read, rank by rank
    resume_test  kill a training run, resume it, compare bit for bit
"""

from __future__ import annotations
