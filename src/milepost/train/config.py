"""All options of the trainer: one frozen dataclass per section, with torchtitan's names and a line on each.

``milepost.train.options`` fills these from a TOML file and flags; ``milepost.train.checks`` rejects invalid
combinations. None of the three imports torch, so a mistake is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from milepost.config import CheckpointConfig
from milepost.parallelism.degrees import ALL_DEGREES
from milepost.storage import join_path

Dtype = Literal["float32", "bfloat16"]
DecayType = Literal["linear", "cosine", "sqrt"]
PipelineSchedule = Literal["GPipe", "1F1B", "Interleaved1F1B"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """The job: its configuration file and output folder."""

    config_file: str = ""
    """TOML file with the options; flags override it."""
    dump_folder: str = "./outputs"
    """Folder for all output of the run."""
    description: str = "milepost training"
    """Description of the run, for people."""
    print_config: bool = False
    """Print the options in effect as TOML when the run starts."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model and its size."""

    name: str = "llama3"
    """Architecture: llama3 or qwen3."""
    flavor: str = "debugmodel"
    """Size of the model; each architecture has its own list."""
    hf_assets_path: str = ""
    """Folder with the model's tokenizer.json. Without one, tokens are bytes."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Data, batches and precision."""

    dataset: str = "python_docs"
    """Data set: python_docs (the language reference that ships inside every Python)."""
    dataset_path: str = ""
    """Your own text: a .txt, .jsonl (field `text`) or .parquet (column `text`) file, or a folder of these."""
    local_batch_size: int = 8
    """Sequences of one forward and backward pass on a data-parallel rank."""
    global_batch_size: int = -1
    """Sequences per step over all ranks, by gradient accumulation; -1 is local_batch_size x data-parallel ranks."""
    seq_len: int = 2048
    """Tokens in a sequence."""
    steps: int = 10000
    """Total number of steps of the run, including those before a resume."""
    max_norm: float = 1.0
    """Gradient clipping: the maximum norm of the gradient; 0 disables it."""
    dtype: Dtype = "float32"
    """Dtype of the parameters and of the optimizer's state."""
    mixed_precision_param: Dtype = "bfloat16"
    """Dtype of the parameters in the forward and backward pass."""
    mixed_precision_reduce: Dtype = "float32"
    """Dtype of the gradients when they are summed over ranks."""
    seed: int = 0
    """Seed of the initial weights and of the order of the samples."""
    deterministic: bool = False
    """Use deterministic kernels only; slower on a GPU."""


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """Degrees of parallelism. All but expert_parallel_degree multiply to the number of ranks."""

    data_parallel_replicate_degree: int = 1
    """Replicas of the model, each on different data (with a shard degree above 1: HSDP)."""
    data_parallel_shard_degree: int = -1
    """Ranks over which one replica is sharded, each on different data (FSDP); -1 takes the remaining ranks."""
    tensor_parallel_degree: int = 1
    """Ranks that split each matrix product."""
    pipeline_parallel_degree: int = 1
    """Ranks that hold consecutive layers."""
    pipeline_parallel_schedule: PipelineSchedule = "1F1B"
    """Pipeline schedule."""
    pipeline_parallel_microbatch_size: int = 1
    """Sequences of one pipeline microbatch."""
    context_parallel_degree: int = 1
    """Ranks that split each sequence."""
    expert_parallel_degree: int = 1
    """Ranks that split the experts of a mixture-of-experts model; taken from the shard, context and tensor ranks."""

    def degrees(self) -> dict[str, int]:
        """Return the six degrees by option name, as given."""
        return {name: getattr(self, name) for name in ALL_DEGREES}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Optimizer; AdamW has decoupled weight decay."""
    lr: float = 8e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Adam epsilon."""
    weight_decay: float = 0.1
    """Weight decay; decoupled in AdamW."""


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """The learning rate schedule: warm-up, stable, decay."""

    warmup_steps: int = 200
    """Warm-up: steps over which the learning rate rises to optimizer.lr."""
    decay_ratio: float | None = None
    """Fraction of training.steps, at the end, over which it decays. Unset: from the end of the warm-up."""
    decay_type: DecayType = "linear"
    """Shape of the decay."""
    min_lr_factor: float = 0.0
    """Learning rate at the end of the decay, as a fraction of optimizer.lr."""


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointConfig:
    """Activation checkpointing: less memory for more time."""

    mode: Literal["none", "full"] = "none"
    """full: keep only each layer's input and recompute the rest in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Logging while training."""

    log_freq: int = 10
    """Log every N steps."""
    enable_tensorboard: bool = False
    """Write the same metrics for TensorBoard."""
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
    checkpoint: CheckpointConfig = field(default_factory=partial(CheckpointConfig, enable=False))

    def checkpoint_folder(self) -> str:
        """Return the folder of the steps: ``checkpoint.folder``, below ``job.dump_folder`` unless it is a URL."""
        return join_path(self.job.dump_folder, self.checkpoint.folder)

    def checkpoint_options(self) -> CheckpointConfig:
        """Return the checkpointing options, with ``remote_folder`` also resolved below ``job.dump_folder``."""
        if not self.checkpoint.remote_folder:
            return self.checkpoint
        remote = join_path(self.job.dump_folder, self.checkpoint.remote_folder)
        return replace(self.checkpoint, remote_folder=remote)
