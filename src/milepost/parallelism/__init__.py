"""Degrees of parallelism and what they place where, for the trainer and for plans. Torch-free. In reading order::

degrees    the degrees and their rules
placement  which box of a parameter each rank holds
"""

from __future__ import annotations
