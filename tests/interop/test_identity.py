"""The identity of a source's model: from its config or its record, with the settings of its training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milepost.errors import ConversionError
from milepost.format.huggingface import CONFIG_NAME
from milepost.format.safetensors import plan_layout
from milepost.interop import convert as convert_module
from milepost.interop.convert import convert
from milepost.interop.hf.config import config_faults, identity_of, make_config
from milepost.interop.names.families import family_of
from milepost.interop.names.identity import ModelIdentity, flavor_of, size_differences
from milepost.interop.names.model_sizes import MODEL_NAMES, ModelArgs, RopeScaling, model_args, model_flavors
from milepost.interop.names.rules import correspond
from milepost.interop.options import ConvertOptions

LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Meta-Llama-3-8B": ("8B", {"max_position_embeddings": 8192, "rope_scaling": None}),
    "Llama-3.1-8B": ("8B", {"max_position_embeddings": 131072, "rope_scaling": LLAMA_31}),
    "Llama-3.2-1B": ("1B", {"max_position_embeddings": 131072, "rope_scaling": LLAMA_31 | {"factor": 32.0}}),
    "Llama-3.2-3B": ("3B", {"max_position_embeddings": 131072, "rope_scaling": LLAMA_31 | {"factor": 32.0}}),
    "Llama-3.3-70B-Instruct": ("70B", {"max_position_embeddings": 131072, "rope_scaling": LLAMA_31}),
}
"""What the ``config.json`` of the published models says of RoPE, and the flavor that their weights have."""


def stand_in(folder: Path, name: str) -> Path:
    """A folder as published, with weights of the right sizes that take no space."""
    flavor, rope = PUBLISHED[name]
    args = model_args("llama3", flavor)
    config = {k: v for k, v in make_config("llama3", args, "bfloat16").items() if k != "rope_parameters"} | rope
    family = family_of("llama3", args)
    shapes = correspond(family, family.scheme("hf"), args).theirs
    layout = plan_layout({key: ("bfloat16", shape) for key, shape in shapes.items()})
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(layout.prefix)
        file.truncate(layout.nbytes)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("is_given", [True, False])
def test_every_published_llama_3_converts_with_its_own_rope(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_given: bool
) -> None:
    """All but the copying of up to 141 GB."""
    written: list[ModelArgs] = []

    def record_only(source: Any, plan: Any, sink: Any, *_: Any) -> int:
        written.append(ModelIdentity.recorded(sink._extra).sizes)  # type: ignore[union-attr]
        return 0

    monkeypatch.setattr(convert_module, "_run", record_only)
    flavor, rope = PUBLISHED[name]
    model = {"model": "llama3", "flavor": flavor} if is_given else {}
    report = convert(stand_in(tmp_path / name, name), tmp_path / "step-0", ConvertOptions(to="dcp", **model))
    assert (report.model, report.flavor) == ("llama3", flavor)
    factor = rope["rope_scaling"] and rope["rope_scaling"]["factor"]
    (sizes,) = written
    assert (sizes.rope_scaling and sizes.rope_scaling.factor, sizes.max_seq_len) == (
        factor,
        rope["max_position_embeddings"],
    )
    expected = "differs from llama3 8B as published: rope_scaling none instead of by 8 from 8192"
    assert any(note.startswith(expected) for note in report.notes) == (name == "Meta-Llama-3-8B" and is_given)


def test_a_flavor_of_other_sizes_is_refused_in_one_sentence(tmp_path: Path) -> None:
    source = stand_in(tmp_path / "source", "Llama-3.2-1B")
    with pytest.raises(ConversionError, match=r"holds llama3 1B, not llama3 8B: dim 2048 instead of 4096, n_layers 16"):
        convert(source, tmp_path / "x", ConvertOptions(to="dcp", model="llama3", flavor="8B"))


SIZES = [(name, flavor) for name in MODEL_NAMES for flavor in model_flavors(name)]


@pytest.mark.parametrize(("name", "flavor"), SIZES)
def test_a_model_is_known_again_by_its_config_and_by_its_record(name: str, flavor: str) -> None:
    sizes = model_args(name, flavor)
    identity = ModelIdentity(name=name, flavor=flavor, sizes=sizes)
    config = make_config(family_of(name, sizes).name, sizes, "float32")
    assert identity_of(json.loads(json.dumps(config))) == identity
    assert ModelIdentity.recorded({"model": json.loads(json.dumps(identity.record()))}) == identity
    assert flavor_of(name, replace(sizes, vocab_size=7, rope_theta=1.0)) == flavor


def test_only_what_the_weights_depend_on_is_a_difference_of_sizes() -> None:
    sizes = model_args("llama3", "8B")
    others = replace(sizes, rope_theta=1.0, rope_scaling=None, norm_eps=0.1, max_seq_len=1)
    assert size_differences(sizes, others) == []
    assert size_differences(sizes, replace(sizes, n_layers=4)) == ["n_layers 32 instead of 4"]
    moe = model_args("qwen3", "30B-A3B")
    assert size_differences(moe, replace(moe, moe=None)) == ["experts 128 instead of None"]


HOSTILE: list[dict[str, Any]] = [
    {"n_layers": 10**12},
    {"n_layers": -1},
    {"dim": "wide"},
    {"rope_theta": float("inf")},
    {"rope_scaling": {"factor": 0}},
    {"moe": {"num_experts": 10**9, "top_k": 1, "hidden_dim": 1}},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_a_record_that_makes_no_sense_says_nothing(change: dict[str, Any]) -> None:
    record = ModelIdentity(name="llama3", flavor="8B", sizes=model_args("llama3", "8B")).record()
    record["sizes"] |= change
    assert ModelIdentity.recorded({"model": record}) is None
    assert ModelIdentity.recorded({"model": 5}) is None


def test_a_scaling_of_rope_that_we_do_not_have_is_refused() -> None:
    sizes = model_args("llama3", "8B")
    config = make_config("llama3", sizes, "float32") | {
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "yarn", "factor": 4.0}
    }
    found = identity_of(config)
    assert found is not None
    assert any(fault.startswith("rope_scaling is") for fault in config_faults(config, "llama3", found.sizes))


def test_the_debug_model_has_the_rope_of_torchtitans() -> None:
    assert model_args("llama3", "debugmodel").rope_scaling == RopeScaling(factor=8.0, original_seq_len=8192)
    assert model_args("qwen3", "debugmodel").rope_scaling is None
