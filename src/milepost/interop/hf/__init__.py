"""Hugging Face's form of a model.

In reading order::

    config  ``config.json`` <-> sizes
    classes classes of transformers -> families, and what family a config is of
    extras  what lies beside the tensors: config, index, the tokenizer's files (torch-free)
    identity   which model a source says that it is (torch-free)
    model   ``HfModel``: what a training run knows of Hugging Face's files, of a model with a table
    hub_model  the same of any model of transformers; hub_names: how transformers names and stores its tensors
    kept    such a model as files (torch-free)
    class_names  the names of a class in its files, asked of transformers in another process (torch-free)
    form    a save in this form, as a job writes it (torch-free)
    save    safetensors written by the ranks, without a pass that consolidates (torch-free)
    merge   safetensors made of the ranks' files, in a store, where no two ranks can write one (torch-free)
    load    safetensors into a sharded model
"""

from __future__ import annotations
