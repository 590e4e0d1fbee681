"""Saves other than full steps by ranks with shards or stages: HF folders, and trainable parameters only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from hub_models import Kind
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import milepost
from milepost import CheckpointConfig, CheckpointManager, HfModel
from milepost.errors import StateMismatchError
from milepost.interop.convert import convert
from milepost.interop.names.model_sizes import model_args
from milepost.interop.options import ConvertOptions
from milepost.parallelism.placement import Stage
from milepost.testing.world import run_world
from milepost.train.models import make_model

LLAMA = replace(model_args("llama3", "debugmodel", vocab_size=96), dim=64, n_heads=4, n_kv_heads=4, hidden_dim=96)
NUM_LAYERS = 3


def hub_model(how: str) -> Any:
    """A tiny Llama of transformers, sharded by ``how`` over all ranks; its embedding is tied."""
    torch.manual_seed(4)
    model: Any = Kind("LlamaConfig", {"tie_word_embeddings": True}).model()
    if how == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    if how == "tp":
        plan: dict[str, Any] = {"model.layers.*.mlp.up_proj": ColwiseParallel()}
        plan |= {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {"model.layers.*.self_attn.o_proj": RowwiseParallel()}
        return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    return model


def stage_of_ours(tied: bool) -> nn.Module:
    """This rank's stage of a pipeline of a model of the trainer's."""
    torch.manual_seed(4)
    sizes = replace(LLAMA, n_layers=NUM_LAYERS, tied_embeddings=tied)
    model = make_model("llama3", sizes, 16)
    world_size = dist.get_world_size()
    model.keep_stage(Stage(index=dist.get_rank(), num_stages=world_size, num_layers=NUM_LAYERS, tied=tied))
    return model


def train(folder: Path, model: Any, hf: Any, steps: range, **options: Any) -> milepost.LoadReport | None:
    """Every save is followed at once by an update of the weights."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config = CheckpointConfig(interval=1, last_save_model_only=False, keep_latest_k=0, **options)
    with CheckpointManager(folder, config, model=model, optimizer=optimizer, hf=hf) as manager:
        report = manager.load()
        for step in steps:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
            manager.maybe_wait_for_staging()
            optimizer.step()
            manager.save(step)
    return report


def interval(folder: Path, how: str, mode: str) -> None:
    if how.startswith("pp"):
        tied = how == "pp, tied"
        model = stage_of_ours(tied)
        hf: Any = HfModel(name="llama3", args=replace(LLAMA, n_layers=NUM_LAYERS, tied_embeddings=tied))
    else:
        model = hub_model(how)
        hf = HfModel.of(model)
    train(folder, model, hf, range(1, 3), hf_interval=1, hf_keep_latest_k=0, async_mode=mode)


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("fsdp", "async"),
        ("pp, tied", "disabled"),
        pytest.param("tp", "async_with_pinned_mem", marks=pytest.mark.slow),
        pytest.param("pp", "async", marks=pytest.mark.slow),
    ],
)
def test_a_periodic_folder_has_the_weights_of_the_step_beside_it(memory_path: Path, how: str, mode: str) -> None:
    run_world(interval, 2, memory_path, how, mode)
    for step in (1, 2):
        folder, beside = memory_path / "hf" / f"step-{step}", memory_path / f"step-{step}"
        if how.startswith("pp"):
            convert(beside, memory_path / f"as-hf-{step}", ConvertOptions(to="hf"))
            beside = memory_path / f"as-hf-{step}"
        with milepost.open(folder) as found, milepost.open(beside) as expected:
            keys = {key for key in expected if not key.startswith(("optimizer.", "rng."))} - {"lm_head.weight"}
            assert set(found) - {"lm_head.weight"} == keys
            for key in keys:
                assert np.array_equal(found[key][...], expected[key][...]), (step, key)
    transformers.AutoModelForCausalLM.from_pretrained(memory_path / "hf" / "step-2")


def frozen_below(model: nn.Module) -> nn.Module:
    """The norms are trained, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def whole(model: nn.Module) -> dict[str, Any]:
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).tolist()
        for key, value in model.state_dict().items()
    }


def only_trainable(folder: Path, how: str, steps: int, base: float = 0.0) -> Any:
    """Train ``steps``, and what the weights are at the end; or why it was refused."""
    model = frozen_below(stage_of_ours(tied=True) if how == "pp" else hub_model(how))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.2.mlp.down" in name or "layers.1.feed_forward.w2" in name or "layers.1.mlp.down" in name:
                parameter += base
    try:
        report = train(folder, model, None, range(1, steps + 1), only_trainable=True)
    except StateMismatchError as error:
        return error.message
    return report is not None, whole(model)


@pytest.mark.parametrize(
    "how", ["fsdp", pytest.param("tp", marks=pytest.mark.slow), pytest.param("pp", marks=pytest.mark.slow)]
)
def test_what_is_trained_alone_resumes_over_shards_and_stages(memory_path: Path, how: str) -> None:
    trained = run_world(only_trainable, 2, memory_path, how, 2)
    with milepost.open(memory_path / "step-2") as step:
        assert {key for key in step if not key.startswith(("optimizer.", "rng."))} == {
            key for _, weights in trained for key in weights if "norm" in key
        }
    again = run_world(only_trainable, 2, memory_path, how, 0)
    assert again == [(True, weights) for _, weights in trained]
    refused = run_world(only_trainable, 2, memory_path, how, 0, 1.0)
    assert all("trained on other frozen weights" in message for message in refused), "on every rank, whoever holds them"
    if how != "pp":
        other = {"fsdp": "tp", "tp": "fsdp"}[how]
        assert run_world(only_trainable, 2, memory_path, other, 0) == again, "a step is of no layout"
        assert run_world(only_trainable, 1, memory_path, "one", 0) == again[:1]
