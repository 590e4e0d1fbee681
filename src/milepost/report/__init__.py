"""What commands work out over whole steps and runs. Torch-free. In reading order::

diff         two checkpoints compared
resume_plan  what a resume on given degrees would read, rank by rank
resume_test  kill a training run, resume it, compare bit for bit
"""

from __future__ import annotations
