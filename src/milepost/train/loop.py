"""The training loop, to be read from top to bottom: set up, resume, then step after step."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from milepost import CheckpointConfig, CheckpointManager, HfModel
from milepost.collective.comm import default_comm, errors_shared, on_rank_0
from milepost.errors import ConfigError
from milepost.loading.load_from import LoadReport
from milepost.parallelism.degrees import Degrees
from milepost.train.config import TrainConfig
from milepost.train.corpus import Corpus, load_corpus
from milepost.train.data import DataLoader
from milepost.train.metrics import Meter, StepFigures
from milepost.train.models import ModelArgs, make_model
from milepost.train.optim import LRSchedule, build_optimizers
from milepost.train.options import to_toml
from milepost.train.parallel import Meshes, ParallelModel, parallelize
from milepost.train.process import accept_save_requests, write_line
from milepost.train.provenance import Provenance
from milepost.train.sizes import flavor_sizes, settled_sizes
from milepost.train.tokenizer import Tokenizer, build_tokenizer

log = logging.getLogger("milepost.train")

_UNCHANGED = CheckpointConfig(enable=False)


def train(config: TrainConfig) -> int:
    """Run the whole job on this rank: join the process group, train, leave it. Returns the exit status."""
    device_type = "cuda" if torch.cuda.is_available() and not config.checkpoint.create_seed_checkpoint else "cpu"
    if device_type == "cuda":
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    join_process_group(device_type)
    status = Trainer(config, device_type).run()
    dist.barrier()
    dist.destroy_process_group()
    return status


def _take_gpu(local_rank: int) -> None:
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        num_ranks = os.environ.get("LOCAL_WORLD_SIZE", "?")
        raise ConfigError(f"NGPU is {num_ranks}, but this machine has {num_gpus} {'GPU' if num_gpus == 1 else 'GPUs'}")
    torch.cuda.set_device(local_rank)


def join_process_group(device_type: str) -> None:
    """Create the default process group of the ranks that torchrun started; without torchrun, of this process only."""
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


@dataclass
class TrainState:
    """The progress of the run; part of every full checkpoint."""

    step: int = 0
    ntokens_seen: int = 0
    loss: float = float("nan")

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self.ntokens_seen = int(state["ntokens_seen"])
        self.loss = float(state.get("loss", "nan"))  # absent from torchtitan's checkpoints


class Trainer:
    """A training run on this rank. The default process group must exist."""

    def __init__(self, config: TrainConfig, device_type: str = "cpu"):
        self.config = config
        if config.job.print_config:
            log.info(to_toml(config))
        self._seed_random_numbers()
        degrees = Degrees.resolve(config.parallelism.degrees(), dist.get_world_size())
        meshes = Meshes.build(degrees, device_type)
        self.device = meshes.device

        tokenizer = build_tokenizer(config.model.hf_assets_path)
        self.data = self._build_data(tokenizer, meshes)
        sizes = self._settle_sizes(tokenizer)
        self.model = self._build_model(sizes, meshes)
        self.optimizers = build_optimizers(self.model.parts, config.optimizer)
        self.lr_schedule = LRSchedule(
            self.optimizers, lr=config.optimizer.lr, num_steps=config.training.steps, config=config.lr_scheduler
        )
        self.state = TrainState()
        self._step_at_work: int | None = None

        dump_folder = Path(config.job.dump_folder)
        self.checkpoint_folder = config.checkpoint_folder()
        self._say_what_has_no_effect()
        self.provenance = self._read_provenance()
        self.checkpoints = CheckpointManager(
            self.checkpoint_folder,
            config.checkpoint_options(),
            model=self.model.parts,
            optimizer=self.optimizers,
            lr_scheduler=self.lr_schedule,
            dataloader=self.data,
            train_state=self.state,
            layout=degrees.as_dict(),
            hf=HfModel(
                name=config.model.name,
                flavor=config.model.flavor,
                args=sizes,
                assets=config.model.hf_assets_path,
            ),
        )
        self.tokens_per_step = self.data.global_batch_size * config.training.seq_len
        self.meter = Meter(
            config.metrics,
            tb_folder=dump_folder / config.metrics.save_tb_folder,
            tokens_per_step=self.tokens_per_step,
            num_steps=config.training.steps,
            writes_tensorboard=dist.get_rank() == 0,
        )

    def run(self) -> int:
        """Train from the newest checkpoint to the last step, or only write the seed checkpoint.

        Returns the exit status: 0, or 128 + the signal's number if SIGTERM, SIGINT or SIGHUP came before the last step
        (the state is saved then).
        """
        if self.config.checkpoint.create_seed_checkpoint:
            self._save_seed()
        elif not self._is_finished():
            self._resume()
            self._train()
        try:
            self.checkpoints.close()
        finally:
            self.meter.log_saves(self.checkpoints.take_events())
            self.meter.close()
        stop = self.checkpoints.stop_signal
        return self._stopped(stop) if stop is not None and self.state.step < self.config.training.steps else 0

    def _stopped(self, number: signal.Signals) -> int:
        """Log how to resume after a request to stop; returns the exit status, 0 if a file asked to stop."""
        reason = self.checkpoints.stop_reason
        command = "the same command"
        if self.config.checkpoint.restart_branch:
            command += " without checkpoint.restart_branch"
        is_saved = self.checkpoints.committed_step == self.state.step
        where = "there" if is_saved else "the newest step: this save failed"
        log.info(f"stopped by {reason} after step {self.state.step}; {command} resumes from {where}")
        return 128 + number if reason == number.name else 0

    def _train(self) -> None:
        num_steps = self.config.training.steps
        self.model.train()
        self.meter.start(step=self.state.step, blocked_s=self.checkpoints.blocked_s)
        self.checkpoints.listen_to_signals(interrupt=True, on_stop=self._say_when_it_stops)
        accept_save_requests()
        while self.state.step < num_steps and not self.checkpoints.stop_requested:
            self._step_at_work = self.state.step + 1
            figures = self.train_step()
            self.meter.log(figures, blocked_s=self.checkpoints.blocked_s)
            self._step_at_work = None
            self._save(is_last=self.state.step == num_steps)
            self.meter.log_saves(self.checkpoints.take_events())

    def _save(self, *, is_last: bool) -> None:
        """Save if due, with the step's metrics and files."""
        metrics = {"loss": self.state.loss} if self.state.step else {}
        beside = self.provenance
        self.checkpoints.save(
            self.state.step, last_step=is_last, metrics=metrics, files=beside.files, extra=beside.extra
        )

    def _say_when_it_stops(self, number: signal.Signals) -> None:
        """Report when the run will stop, from a signal handler: a save between steps may have seen the signal."""
        if self.state.step == self.config.training.steps:
            when = "the last save is being committed"
        elif self._step_at_work is not None:
            when = f"saving after step {self._step_at_work}, then stopping"
        else:
            when = "saving at the next step, then stopping"
        again = {signal.SIGINT: "Ctrl-C again", signal.SIGHUP: "SIGTERM"}.get(number, f"a second {number.name}")
        write_line(f"{number.name}: {when}; {again} stops at once")

    def train_step(self) -> StepFigures:
        """One optimizer step over one global batch."""
        loss_share = torch.zeros((), device=self.device)
        for tokens, labels in self.data.next_batch():  # (local_batch, seq) each
            loss_share += self.model.forward_backward(
                torch.from_numpy(tokens), torch.from_numpy(labels), self.tokens_per_step
            )
        grad_norm = self.model.clip_grad_norm(self.config.training.max_norm)
        lr = self.lr_schedule.lr
        self.checkpoints.maybe_wait_for_staging()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.lr_schedule.step()
        self.state.step += 1
        self.state.ntokens_seen += self.tokens_per_step
        self.state.loss = self.model.reduce_loss(loss_share)
        return StepFigures(step=self.state.step, loss=self.state.loss, grad_norm=grad_norm.item(), lr=lr)

    # Resuming, or starting.

    def _resume(self) -> None:
        report = self.checkpoints.load()
        self._refuse_to_count_again(report)
        self._refuse_to_train_nothing(report)
        self.lr_schedule.apply()  # replaces the learning rate that was loaded with the optimizer
        if report is not None:
            log.info(_what_was_loaded(report, self.state.step))
            for note in report.notes:
                log.info(f"  {note}")
        elif self.config.parallelism.pipeline_parallel_degree > 1:
            log.warning(
                "there is no checkpoint to start from, so every pipeline rank initialises its own stage's weights, "
                "slowly for a large model. --checkpoint.create_seed_checkpoint does this once, for any degrees"
            )

    def _refuse_to_count_again(self, report: LoadReport | None) -> None:
        """Refuse a resume that leaves the step at 0: saves would replace the run's own steps of the same numbers."""
        resumed = report.resumed_step if report is not None else None
        is_left_out = "train_state" in self.config.checkpoint.exclude_from_loading
        if report is None or not resumed or self.state.step or not is_left_out:
            return
        raise ConfigError(
            f"checkpoint.exclude_from_loading = train_state restarts at step 0, but {self.checkpoint_folder} holds "
            f"step-{resumed}: saves would replace steps of the same numbers. To start a new run from that step, set "
            f"checkpoint.initial_load_path = {report.path}, checkpoint.initial_load_model_only = false, and another "
            "job.dump_folder or checkpoint.folder"
        )

    def _refuse_to_train_nothing(self, report: LoadReport | None) -> None:
        """Refuse a state in which all steps are done already: the run would end without a checkpoint of its own."""
        if report is None or self.state.step < self.config.training.steps:
            return
        raise ConfigError(
            f"training.steps is {self.config.training.steps}, but in {report.path} {_steps(self.state.step)} done "
            "already: raise training.steps"
            + (
                ""
                if report.resumed_step is not None
                else ", or start from the weights alone, with step 0, by checkpoint.initial_load_model_only = true"
            )
        )

    def _is_finished(self) -> bool:
        """Return True, with a log line, if the last step was already reached before."""
        num_steps = self.config.training.steps
        last = self.checkpoints.finished_step(num_steps)
        if last is None:
            return False
        log.info(
            f"this run is finished: {self.checkpoint_folder}/step-{last} exists and training.steps is {num_steps}. To "
            f"continue training, raise training.steps; to start over, choose another job.dump_folder"
        )
        return True

    def _save_seed(self) -> None:
        latest = self.checkpoints.latest_step
        if latest is not None:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint: {self.checkpoint_folder} already holds step-{latest}; "
                "a seed checkpoint is for a new run. Choose another folder"
            )
        self._save(is_last=True)
        log.info(f"wrote the seed checkpoint {self.checkpoint_folder}/step-0")

    def _say_what_has_no_effect(self) -> None:
        checkpoint = self.config.checkpoint
        changed = [f.name for f in fields(checkpoint) if getattr(checkpoint, f.name) != getattr(_UNCHANGED, f.name)]
        verb = "has" if len(changed) == 1 else "have"
        if not checkpoint.enable and changed:
            log.warning(f"checkpointing is off (checkpoint.enable = false), so {', '.join(changed)} {verb} no effect")

    # Setting up.

    def _seed_random_numbers(self) -> None:
        """Seed this rank's random number stream; weights and data have separate streams."""
        training = self.config.training
        seed = int(np.random.SeedSequence([training.seed, dist.get_rank()]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        if training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def _build_data(self, tokenizer: Tokenizer, meshes: Meshes) -> DataLoader:
        training = self.config.training
        corpus = self._load_corpus(tokenizer)
        at_once = training.local_batch_size * meshes.dp_degree
        data = DataLoader(
            corpus,
            tokenizer=tokenizer.fingerprint,
            seq_len=training.seq_len,
            seed=training.seed,
            local_batch_size=training.local_batch_size,
            global_batch_size=at_once if training.global_batch_size == -1 else training.global_batch_size,
            dp_rank=meshes.dp_rank,
            dp_degree=meshes.dp_degree,
        )
        log.info(
            f"data: {corpus.name}, {len(corpus.tokens):,} tokens ({tokenizer.name}), {data.order.num_samples:,} "
            f"samples of {training.seq_len}, {data.global_batch_size} a step"
        )
        return data

    def _read_provenance(self) -> Provenance:
        """Read the provenance that is saved with each step; on rank 0."""
        with errors_shared(default_comm()):
            is_needed = dist.get_rank() == 0 and self.config.checkpoint.enable
            return Provenance.of(self.config) if is_needed else Provenance()

    def _load_corpus(self, tokenizer: Tokenizer) -> Corpus:
        """Encode the text in one process per node; the others then load the result."""
        training = self.config.training
        cache_folder = Path(self.config.job.dump_folder) / "tokens"
        load = partial(load_corpus, training.dataset, training.dataset_path, tokenizer, cache_folder)
        with errors_shared(default_comm()):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                load()
        return load()

    def _settle_sizes(self, tokenizer: Tokenizer) -> ModelArgs:
        """Return the model's sizes and settings; rank 0 reads the checkpoint that the run starts from."""
        sizes = flavor_sizes(self.config, tokenizer)
        sizes, note = on_rank_0(default_comm(), partial(settled_sizes, self.config, sizes))
        if note is not None:
            log.info(note)
        return sizes

    def _build_model(self, sizes: ModelArgs, meshes: Meshes) -> ParallelModel:
        """Build the model on the meta device, shard it and set its initial weights: it never exists in full."""
        config = self.config
        with torch.device("meta"):
            whole = make_model(config.model.name, sizes, config.training.seq_len)
        num_parameters = sum(p.numel() for p in whole.parameters())
        model = parallelize(whole, meshes, config.training, config.parallelism, config.activation_checkpoint)
        model.init_weights(config.training.seed)
        spread = [f"{name.removesuffix('_degree')} {n}" for name, n in meshes.degrees.as_dict().items() if n > 1]
        log.info(
            f"model: {config.model.name} {config.model.flavor}, {num_parameters:,} parameters, "
            f"on {dist.get_world_size()} x {self.device.type} ({', '.join(spread) or 'one rank'})"
        )
        return model


def _what_was_loaded(report: LoadReport, num_steps: int) -> str:
    """Describe the load in one log line: a resume continues a run, an initial load or a seed checkpoint starts one."""
    if report.resumed_step == 0 and report.kind == "model":
        return f"starting from the seed checkpoint {report.path}"
    if report.resumed_step is None and num_steps == 0:
        return f"starting from the weights of {report.path}; everything else is newly initialized"
    if report.resumed_step is None:
        return f"starting from the state of {report.path} ({report.kind}), where {_steps(num_steps)} done"
    return f"resumed from {report.path} ({report.kind}): {_steps(num_steps)} done"


def _steps(number: int) -> str:
    return "1 step is" if number == 1 else f"{number} steps are"
