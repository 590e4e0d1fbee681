"""Every option of the trainer: one frozen dataclass a section, with torchtitan's names and a line on each.

``milepost.train.options`` fills these from a TOML file and flags; ``milepost.train.checks`` refuses what can't work.
Neither they nor this module import torch, so a mistake is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from milepost.config import CheckpointConfig
from milepost.parallelism.degrees import ALL_DEGREES
from milepost.storage import join_path

Dtype = Literal["float32", "bfloat16"]
DecayType = Literal["linear", "cosine", "sqrt"]
PipelineSchedule = Literal["GPipe", "1F1B", "Interleaved1F1B"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """The run as a whole."""

    config_file: str = ""
    """TOML file with the options; flags go over it."""
    dump_folder: str = "./outputs"
    """Folder for everything that the run writes."""
    description: str = "milepost training"
    """A word on the run, for its log."""
    print_config: bool = False
    """Print the options that are in effect, as TOML, when the run starts."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, of which size."""

    name: str = "llama3"
    """Architecture: llama3 or qwen3."""
    flavor: str = "debugmodel"
    """Size of the model; each architecture has its own list."""
    hf_assets_path: str = ""
    """Folder with the model's tokenizer.json. Without one, tokens are bytes."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Data, batches and numbers."""

    dataset: str = "python_docs"
    """Data set: python_docs (the language reference that ships inside every Python)."""
    dataset_path: str = ""
    """Your own text instead: a .txt, .jsonl (field `text`) or .parquet (column `text`) file, or a folder of such."""
    local_batch_size: int = 8
    """Sequences that a data-parallel rank takes through the model at a time."""
    global_batch_size: int = -1
    """Sequences per step over all ranks, by gradient accumulation; -1 is local_batch_size x data-parallel ranks."""
    seq_len: int = 2048
    """Tokens in a sequence."""
    steps: int = 10000
    """Number of steps of the whole run, those before a resume included."""
    max_norm: float = 1.0
    """Gradients are scaled down to this norm when theirs is larger; 0 leaves them."""
    dtype: Dtype = "float32"
    """Dtype of the parameters and of the optimizer's state."""
    mixed_precision_param: Dtype = "bfloat16"
    """Dtype in which parameters take part in forward and backward."""
    mixed_precision_reduce: Dtype = "float32"
    """Dtype in which gradients are summed over ranks."""
    seed: int = 0
    """Seed of the initial weights and of the order of the samples."""
    deterministic: bool = False
    """Use deterministic kernels only; slower on a GPU."""


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """How the work is spread over the ranks. The degrees but expert_parallel's multiply to the number of ranks."""

    data_parallel_replicate_degree: int = 1
    """Copies of the model that each see other data (with a shard degree above 1: HSDP)."""
    data_parallel_shard_degree: int = -1
    """Ranks that share one copy of the model and each see other data (FSDP); -1 takes what the others leave."""
    tensor_parallel_degree: int = 1
    """Ranks that split each matrix product."""
    pipeline_parallel_degree: int = 1
    """Ranks that hold consecutive layers."""
    pipeline_parallel_schedule: PipelineSchedule = "1F1B"
    """Order of the micro-batches in a pipeline."""
    pipeline_parallel_microbatch_size: int = 1
    """Sequences in a micro-batch of a pipeline."""
    context_parallel_degree: int = 1
    """Ranks that split each sequence."""
    expert_parallel_degree: int = 1
    """Ranks that split the experts of a mixture-of-experts model; taken from the shard, context and tensor ranks."""

    def degrees(self) -> dict[str, int]:
        """The six degrees by option name, as they were given."""
        return {name: getattr(self, name) for name in ALL_DEGREES}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights follow gradients."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Optimizer; AdamW decays weights apart from the gradient."""
    lr: float = 8e-4
    """Learning rate at its highest."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Part of each weight that a step at learning rate 1 would take away."""


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """The course of the learning rate: up, along, down."""

    warmup_steps: int = 200
    """Steps over which the learning rate rises to optimizer.lr."""
    decay_ratio: float | None = None
    """Part of training.steps, at the end, over which it falls. Unset: it falls from the end of the warm-up on."""
    decay_type: DecayType = "linear"
    """Shape of the fall."""
    min_lr_factor: float = 0.0
    """Where the fall ends, as a part of optimizer.lr."""


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointConfig:
    """Trading time for memory."""

    mode: Literal["none", "full"] = "none"
    """full: keep only each layer's input and compute the rest again in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is told while training."""

    log_freq: int = 10
    """Steps between two log lines."""
    enable_tensorboard: bool = False
    """Write the same figures for TensorBoard."""
    save_tb_folder: str = "tb"
    """Folder of the TensorBoard files, below job.dump_folder."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a language model. Options come from the TOML file at --job.config_file, then from flags."""

    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def checkpoint_folder(self) -> str:
        """Where the steps go: ``checkpoint.folder`` below ``job.dump_folder``, or on its own if it is a URL."""
        return join_path(self.job.dump_folder, self.checkpoint.folder)
