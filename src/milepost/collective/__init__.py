"""Ranks, threads and signals acting together: the only folder that calls collectives.

In reading order::

    packing    Python objects as buffers for collectives
    alone      work of one process, without the other ranks
    comm       gather, broadcast and barrier over a process group; one rank's failure raised on all
    meeting    a rendezvous of the ranks before a save; a missing one is named within seconds
    interrupt  Ctrl-C deferred until no rank waits for this one
    progress   log lines during long work: its progress, and the cause of a wait
    threads    work spread over threads
    collector  the garbage collector held back while plans are made
"""

from __future__ import annotations
