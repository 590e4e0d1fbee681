"""A training that starts from Hugging Face files and ends with them, as a user would run it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from milepost.errors import ConfigError
from milepost.interop.convert import convert
from milepost.interop.options import ConvertOptions
from milepost.testing.world import run_world
from milepost.train.config import TrainConfig
from milepost.train.loop import Trainer
from milepost.train.models import model_args
from milepost.train.options import load_config

ARGS = model_args("llama3", "debugmodel", vocab_size=256)


def make_weights(folder: Path) -> None:
    """A Hugging Face Llama of the debug model's sizes, made and saved by transformers."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=ARGS.dim,
        intermediate_size=ARGS.hidden_dim,
        num_hidden_layers=ARGS.n_layers,
        num_attention_heads=ARGS.n_heads,
        num_key_value_heads=ARGS.n_kv_heads,
        vocab_size=256,
        rms_norm_eps=ARGS.norm_eps,
        rope_theta=ARGS.rope_theta,
        max_position_embeddings=ARGS.max_seq_len,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="8MB")


def configure(folder: Path, world_size: int, *flags: str) -> TrainConfig:
    options = {
        "job.dump_folder": folder,
        "training.steps": 2,
        "training.seq_len": 32,
        "training.local_batch_size": 4,
        "training.mixed_precision_param": "float32",
        "metrics.log_freq": 1,
        "checkpoint.interval": 1,
    }
    argv = [f"--{name}={value}" for name, value in options.items()]
    return load_config([*argv, "--checkpoint.enable", *flags], world_size)


def run(config: TrainConfig) -> list[float]:
    trainer = Trainer(config)
    losses: list[float] = []
    log = trainer.meter.log

    def watched(figures, **rest):
        losses.append(figures.loss)
        log(figures, **rest)

    trainer.meter.log = watched  # type: ignore[method-assign]
    trainer.run()
    return losses


def start_both_ways(folder: Path, world_size: int, *layout: str) -> tuple[list[float], list[float]]:
    """The losses of a run from Hugging Face files and of one from the converted DCP folder; both end in safetensors."""
    from_hf = configure(
        folder / f"hf{world_size}",
        world_size,
        "--checkpoint.initial_load_in_hf",
        f"--checkpoint.initial_load_path={folder / 'weights'}",
        "--checkpoint.last_save_in_hf",
        *layout,
    )
    from_dcp = configure(
        folder / f"dcp{world_size}",
        world_size,
        f"--checkpoint.initial_load_path={folder / 'converted'}",
        "--checkpoint.async_mode=async_with_pinned_mem",
        "--checkpoint.last_save_in_hf",
        "--checkpoint.export_dtype=bfloat16",
        *layout,
    )
    return run(from_hf), run(from_dcp)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def test_started_from_hugging_face_files_is_started_from_the_converted_checkpoint_bit_for_bit(memory_path: Path):
    make_weights(memory_path / "weights")
    sizes = replace(ARGS, vocab_size=256)
    convert(memory_path / "weights", memory_path / "converted", ConvertOptions(to="dcp", model="llama3", sizes=sizes))
    for world_size, layout in (
        (1, ()),
        (4, ("--parallelism.data_parallel_shard_degree=2", "--parallelism.tensor_parallel_degree=2")),
    ):
        for from_hf, from_dcp in run_world(start_both_ways, world_size, memory_path, world_size, *layout):
            assert from_hf == from_dcp
            assert len(from_hf) == 2
        saved = memory_path / f"hf{world_size}" / "checkpoint" / "step-2"
        halved = memory_path / f"dcp{world_size}" / "checkpoint" / "step-2"
        exact, rounded = tensors_of(saved), tensors_of(halved)
        assert exact.keys() == rounded.keys() == tensors_of(memory_path / "weights").keys()
        assert all(torch.equal(exact[key].bfloat16(), rounded[key]) for key in exact)
        assert any(not torch.equal(exact[key], value) for key, value in tensors_of(memory_path / "weights").items())
    model = transformers.AutoModelForCausalLM.from_pretrained(memory_path / "hf1" / "checkpoint" / "step-2")
    assert model.config.hidden_size == ARGS.dim
    assert torch.equal(
        model.model.norm.weight, tensors_of(memory_path / "hf1" / "checkpoint" / "step-2")["model.norm.weight"]
    )


def test_weights_of_another_model_are_refused_before_training(memory_path: Path):
    make_weights(memory_path / "weights")

    def start() -> str:
        config = configure(
            memory_path / "run",
            1,
            "--model.name=qwen3",
            "--checkpoint.initial_load_in_hf",
            f"--checkpoint.initial_load_path={memory_path / 'weights'}",
        )
        with pytest.raises(Exception, match=r"llama|config\.json|model_type") as refused:
            run(config)
        return type(refused.value).__name__

    assert run_world(start, 1) == ["ConversionError"]


def test_a_folder_without_weights_is_reported_on_every_rank():
    with pytest.raises(ConfigError, match="needs the folder with the weights"):
        load_config(["--checkpoint.enable", "--checkpoint.initial_load_in_hf"], 1)
