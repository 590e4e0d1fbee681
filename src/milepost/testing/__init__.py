"""Test tools, also for projects that build on Milepost.

In reading order::

    world          ranks as forks of this process; fake_rank: any rank of a simulated world
    sample         real checkpoints without torch or ranks
    storage_suite  the conformance suite that every storage passes; handle_suite: its part on open files
    wrap           storages around another; one that records each operation
    faulty         a storage that fails on command; faulty_client: an object store's client that does
    proxy          an HTTP proxy that injects network faults; seaweed: a real S3 store on this machine
    journal        the system calls with which a disk is changed; powercut: the states a power cut can leave
"""
