"""A reader of the documentation, with a run and models at the paths in the pages, who follows the pages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from pages import ROOT
from safetensors.torch import save_file

import milepost
from milepost.cli.main import main
from milepost.train.models import build_model

STEPS = (20, 40, 60, 500, 1000)
FLAVORS = ("--flavor", "--model_flavor")
LARGE = {"1B", "8B"}
"""Sizes that a test can't hold: the run below is of the debug model, and it is named in their place."""
MADE_BEFORE = {
    "mistral/step-0": "convert Mistral-7B mistral/step-0 --to dcp --model mistral",
    "model.pt": "convert outputs/checkpoint/step-500 model.pt --to pt --model llama3 --flavor debugmodel",
    "unpin": "pin outputs/checkpoint/step-500 outputs/checkpoint/step-1000",
}
"""What an example of the reference takes to be there already, or its command to have been done."""


class Counted:
    """Something with a state, as the trainer's progress, data and schedule have."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def settle(folder: Path) -> None:
    """Create in ``folder`` what the pages mention: the steps of a run, and folders of Hugging Face models."""
    model = build_model("llama3", "debugmodel", vocab_size=256, seq_len=32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    progress = Counted()
    config = milepost.CheckpointConfig(
        enable=True, interval=1, keep_latest_k=0, last_save_model_only=False, enable_first_step_checkpoint=True
    )
    manager = milepost.CheckpointManager(
        folder / "outputs/checkpoint", config, model=model, optimizer=optimizer, train_state=progress
    )
    for step in STEPS:
        optimizer.step()
        progress.step = step
        assert manager.save(step)
    manager.close()
    for name in ("Llama-3.2-1B", "Llama-3.1-8B"):
        convert = f"convert {folder}/outputs/checkpoint/step-500 {folder}/{name} --to hf --model llama3"
        assert main([*convert.split(), "--flavor", "debugmodel"]) == 0
    settle_adapter(folder / "outputs/lora/step-100", model.state_dict()["layers.0.attention.wq.weight"].shape)
    settle_mistral(folder / "Mistral-7B")
    assert (
        main(["convert", f"{folder}/Mistral-7B", f"{folder}/theirs/step-500", "--to", "dcp", "--model", "mistral"]) == 0
    )
    (folder / "tuned/out").mkdir(parents=True)
    shutil.copytree(folder / "Llama-3.2-1B", folder / "tuned/out/epoch_0")
    (folder / "my_text").mkdir()
    (folder / "my_text/a.txt").write_text("Once upon a time. " * 1000)
    (folder / "my.toml").write_text('[model]\nname = "llama3"\n')
    for name in ("configs", "scripts", "run_train.sh"):
        (folder / name).symlink_to(ROOT / name)


def settle_mistral(path: Path) -> None:
    """A Mistral of one small layer, as the hub names its tensors."""
    dim, kv_dim, hidden_dim, vocab_size = 32, 16, 64, 40
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    shapes = {
        "model.embed_tokens": (vocab_size, dim),
        "model.layers.0.self_attn.q_proj": (dim, dim),
        "model.layers.0.self_attn.k_proj": (kv_dim, dim),
        "model.layers.0.self_attn.v_proj": (kv_dim, dim),
        "model.layers.0.self_attn.o_proj": (dim, dim),
        "model.layers.0.mlp.gate_proj": (hidden_dim, dim),
        "model.layers.0.mlp.up_proj": (hidden_dim, dim),
        "model.layers.0.mlp.down_proj": (dim, hidden_dim),
        "model.layers.0.input_layernorm": (dim,),
        "model.layers.0.post_attention_layernorm": (dim,),
        "model.norm": (dim,),
        "lm_head": (vocab_size, dim),
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, path / "model.safetensors")


def settle_adapter(path: Path, shape: torch.Size) -> None:
    """A step that holds a LoRA adapter alone, as PEFT names it in a model's state."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    state = {
        f"{name}.lora_A.default.weight": torch.ones(4, shape[1]),
        f"{name}.lora_B.default.weight": torch.ones(shape[0], 4),
        "attached": {"files": {"adapter_config.json": b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'}},
    }
    milepost.save(path, state)


def copy(settled: Path, folder: Path) -> None:
    """A reader's own copy. Files are linked: nothing of Milepost writes into a file that is there."""
    shutil.copytree(settled, folder, copy_function=os.link, symlinks=True, dirs_exist_ok=True)


def small(words: list[str]) -> list[str]:
    """The command with the debug model in the place of a large one."""
    return [
        "debugmodel" if word in LARGE and before in FLAVORS else word
        for before, word in zip(["", *words], words, strict=False)
    ]


def run(words: list[str]) -> int:
    """Run a command of the pages in the working directory, and give its exit status."""
    words = small(words)
    if words[0] == "milepost":
        return main(words[1:])
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
    print(done.stdout + done.stderr)
    return done.returncode


def prepare(words: list[str]) -> None:
    """Do what a self-contained example assumes to have been done."""
    for needed, line in MADE_BEFORE.items():
        if needed == words[1] or (needed in words and words[1] == "diff"):
            assert main(line.split()) == 0
