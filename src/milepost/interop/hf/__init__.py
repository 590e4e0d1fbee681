"""Hugging Face's form of a model.

In reading order::

    config  ``config.json`` <-> sizes
    classes classes of transformers -> families, and the family of a config
    extras  files beside the tensors: config, index, the tokenizer's (torch-free)
    identity   the model recorded in a source (torch-free)
    model   ``HfModel``: Hugging Face files of a training run, for a model with a table
    hub_model  the same for any model of transformers; hub_names: its tensors' names and form in files
    traced  the elements of tensors followed through a program that only moves them
    kept    the files of such a model (torch-free)
    class_names  the names of a class in its files, asked of transformers in another process (torch-free)
    form    the form of a save, for its job (torch-free)
    save    safetensors written by all ranks, without consolidation (torch-free)
    merge   safetensors merged from the ranks' files, in a store (torch-free)
    load    safetensors into a sharded model
"""

from __future__ import annotations
