"""Ranks, threads and signals acting together: the only folder that calls collectives. In reading order::

comm       gather, broadcast and barrier over a process group, and one rank's failure raised on all
word       the same where the group can't be used: a notice in the job's store
interrupt  Ctrl-C held until no rank waits for this one
watch      a line in the log when work takes long; progress: how far it is
threads    work spread over threads
"""

from __future__ import annotations
