"""What commands work out over whole steps and runs. Torch-free.

In reading order::

    statistics   norm, mean, NaN of each tensor, streaming
    diff         two checkpoints compared
    history      events and disk use of a run
    profile      samples of the weights of each step, and how they moved
    gather       all that the report shows, as values; page: the HTML of it; pictures: its SVG
    resume_plan  what a resume on given degrees would read, rank by rank
    resume_test  kill a training run, resume it, compare bit for bit
"""

from __future__ import annotations
