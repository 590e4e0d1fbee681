"""Ranks, threads and signals acting together: the only folder that calls collectives.

In reading order::

    packing    Python objects as memory that collectives move
    comm       gather, broadcast and barrier over a process group; one rank's failure raised on all
    meeting    ranks that come together for a save; one that does not is named within seconds
    interrupt  Ctrl-C held until no rank waits for this one
    progress   lines in the log while work takes long: how far it is, what it waits for
    threads    work spread over threads
    collector  the garbage collector held back while plans are made
"""

from __future__ import annotations
