"""A compact trainer for Llama 3 and Qwen 3 on any mix of parallelisms; it exercises every part of Milepost.

Run it with ``./run_train.sh`` or ``torchrun -m milepost.train``. The parts, in the order in which a run uses them::

    launch     torchrun with clean error reports: one message and an exit status instead of tracebacks
    __main__   one rank, from its command line to its exit status
    process    output, signals and exit of a rank
    options    TOML file and flags -> config; checks: report all impossible settings at once
    tokenizer  text -> token ids
    corpus     text files -> one array of token ids on disk
    data       global sample index -> sequence of tokens; the samples of a data-parallel rank at each step
    sizes      the sizes and settings of the model that the run starts from
    models     the architectures; parallel: sharding them over the ranks
    optim      optimizers and the learning rate schedule
    metrics    the log line and TensorBoard
    provenance  data saved with each step: the options, the tokenizer, the revision
    loop       the training loop
"""

from __future__ import annotations
