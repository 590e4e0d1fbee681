"""Hugging Face's form of a model.

In reading order::

    config  ``config.json`` <-> sizes
    extras  what lies beside the tensors: config, index, the tokenizer's files (torch-free)
    form    ``HfModel``: the form of a save, from inside a training run
    save    safetensors written by the ranks, without a pass that consolidates (torch-free)
    load    safetensors into a sharded model
"""

from __future__ import annotations
