"""Milepost inside frameworks that have a training loop of their own. Each file needs the one it is named for.

In reading order::

    choice        the step that a framework is to resume from, chosen and checked before it is told
    accelerate    loops with Hugging Face Accelerate
    transformers  the Trainer of Hugging Face transformers
    lightning     Lightning's Trainer
    torchtitan    torchtitan's CheckpointManager
    trackers      Weights & Biases, and MLflow
"""

from __future__ import annotations
