"""The family of a ``config.json``: by its ``model_type``, by transformers' classes, by a class's name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from milepost.cli.main import main
from milepost.interop.hf.classes import architecture, model_type
from milepost.interop.hf.config import config_faults, make_config
from milepost.interop.names.model_sizes import model_args


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "mistral", "architectures": ["LlamaForCausalLM"]}, "mistral"),
        ({"architectures": ["LlamaForCausalLM"]}, "llama"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "qwen3_moe"),
        ({"architectures": ["BertForMaskedLM"]}, "bert"),
        ({"architectures": ["GPT2LMHeadModel"]}, "gpt2"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "t5"),
        ({"architectures": ["AcmeForCausalLM"]}, "acme"),
        ({"architectures": ["AcmeModel"]}, "acme"),
        ({"architectures": ["Model"]}, "model"),
        ({"architectures": []}, None),
        ({"architectures": "LlamaForCausalLM", "model_type": 7}, None),
        ({}, None),
        (None, None),
    ],
)
def test_a_config_names_its_family(config: dict[str, object] | None, family: str | None) -> None:
    assert model_type(config) == family


def test_every_class_of_transformers_auto_mappings_has_a_family() -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    for name in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
        mapping = getattr(auto, name)
        shared = {}
        for family, classes in mapping.items():
            for one in [classes] if isinstance(classes, str) else classes:
                shared.setdefault(one, set()).add(family)
        wrong = {one: model_type({"architectures": [one]}) for one, families in shared.items()
                 if model_type({"architectures": [one]}) not in families}  # fmt: skip
        assert wrong == {}, name


def test_a_config_of_another_class_is_refused_by_its_family() -> None:
    args = model_args("llama3", "debugmodel")
    config = make_config("llama3", args, "float32")
    assert architecture(config) == "LlamaForCausalLM"
    del config["model_type"]
    assert config_faults(config, "llama3", args) == []
    (fault,) = config_faults(config | {"architectures": ["BertForMaskedLM"]}, "llama3", args)
    assert "'bert' (of BertForMaskedLM)" in fault


def test_inspect_says_of_what_family_a_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": np.zeros(3, "float32")}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OlmoForCausalLM"]}))
    assert main(["inspect", str(tmp_path)]) == 0
    assert "Hugging Face folder of olmo (OlmoForCausalLM)" in " ".join(capsys.readouterr().out.split())
