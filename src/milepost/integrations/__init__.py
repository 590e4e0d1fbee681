"""Milepost inside frameworks with their own training loop. Each file needs the framework it is named after.

In reading order::

    choice        choosing and checking the step to resume from, before the framework starts
    accelerate    loops with Hugging Face Accelerate
    transformers  the Trainer of Hugging Face transformers
    lightning     Lightning's Trainer
    torchtitan    torchtitan's CheckpointManager
    trackers      Weights & Biases, and MLflow
"""

from __future__ import annotations
