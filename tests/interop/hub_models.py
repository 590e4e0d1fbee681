"""Tiny random models of classes of transformers that the trainer does not train."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import randomize

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Kind:
    """A class of transformers, tiny."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> torch.nn.Module:
        config = getattr(transformers, self.config)(**{**SIZES, **self.options})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomize(model)
        return model.eval()


KINDS = {
    "mistral": Kind("MistralConfig"),
    "qwen2, tied": Kind("Qwen2Config", {"tie_word_embeddings": True}),
    "gemma3": Kind("Gemma3TextConfig", {"head_dim": 16}),
    "phi3": Kind("Phi3Config"),
    "olmo2": Kind("Olmo2Config"),
    "gpt2": Kind("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}),
    "deepseek_v3": Kind(
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": Kind("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "llama4": Kind(
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
        },
    ),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(1, 17).reshape(1, -1)).logits
    return found


def saved(kind: str, folder: Path) -> torch.nn.Module:
    model = KINDS[kind].model()
    model.save_pretrained(folder, max_shard_size="60KB")  # type: ignore[operator]
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return model
