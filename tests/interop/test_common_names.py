"""``diff --model`` and ``plan-resume --model`` of families that Milepost does not train, and of classes of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_models import KINDS

from milepost.cli.main import main
from milepost.errors import ConfigError, ConversionError
from milepost.report.diff import diff
from milepost.run import checkpoint_record
from milepost.storage import LocalStorage


@pytest.fixture
def places(memory_path: Path, request: pytest.FixtureRequest) -> Path:
    """A tiny model of a family as ``hub`` (Hugging Face), ``ours`` (a checkpoint with our names) and ``own.pt``."""
    kind = request.param
    family = kind.partition(",")[0]
    model = KINDS[kind].model()
    model.save_pretrained(memory_path / "hub")  # type: ignore[operator]
    torch.save(model.state_dict(), memory_path / "own.pt")
    assert main(["convert", str(memory_path / "hub"), str(memory_path / "ours"), "--to", "dcp", "--model", family]) == 0
    return memory_path


@pytest.mark.parametrize("places", ["qwen2, tied", pytest.param("deepseek_v3", marks=pytest.mark.slow)], indirect=True)
def test_a_model_is_the_same_in_every_format_whatever_family_it_is_of(places: Path) -> None:
    ours, hub, own = (str(places / name) for name in ("ours", "hub", "own.pt"))
    family = json.loads((places / "hub/config.json").read_text())["model_type"]
    for a, b in ((ours, hub), (hub, ours)):
        assert main(["diff", a, b, "--values", "--model", family]) == 0
    if family != "qwen2":  # its module has other names than its files
        return
    assert main(["diff", own, ours, "--values", "--model", "qwen2.5"]) == 0
    assert main(["diff", own, own, "--model", "qwen2"]) == 2, "nothing names the sizes"
    assert main(["diff", own, own, "--model", "qwen2", "--hf-assets", hub]) == 0
    assert main(["diff", hub, own, "--values", "--model", "hf"]) == 0, (
        "tied weights are once in one, twice in the other"
    )
    state = torch.load(own)
    state["model.norm.weight"][3] += 1
    torch.save(state, own)
    for model in (family, "hf"):
        report = diff(own, hub, values=True, model=model)
        assert [change.num_different for change in report.values] == [1]


@pytest.mark.parametrize("places", ["mistral"], indirect=True)
def test_a_resume_is_planned_against_the_tables_of_a_family(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, hub = str(places / "ours"), str(places / "hub")
    plan = ["--world-size", "2", "--exclude", "optimizer,train_state"]
    assert main(["plan-resume", ours, *plan]) == 0
    assert main(["plan-resume", ours, "--model", "mistral", *plan]) == 0
    assert main(["plan-resume", ours, *plan, "--degrees", "tp=2"]) == 0
    assert main(["plan-resume", ours, "--world-size", "3", "--degrees", "tp=3", *plan[2:]]) == 4
    assert "does not divide the model's 4 attention heads" in capsys.readouterr().out
    assert main(["convert", hub, str(places / "kept"), "--to", "dcp"]) == 0
    kept = str(places / "kept")
    assert main(["plan-resume", kept, *plan, "--model", "mistral"]) == 2
    assert "name a folder that has its config.json with --hf-assets" in capsys.readouterr().err
    assert main(["plan-resume", kept, *plan, "--model", "mistral", "--hf-assets", hub]) == 0
    config = json.loads((places / "hub/config.json").read_text()) | {"num_hidden_layers": 3}
    (places / "deeper").mkdir()
    (places / "deeper/config.json").write_text(json.dumps(config))
    assert main(["plan-resume", kept, *plan, "--model", "mistral", "--hf-assets", str(places / "deeper")]) == 4
    assert "model.layers.2.mlp.up_proj.weight" in capsys.readouterr().out
    assert checkpoint_record.read_manifest(LocalStorage(places), "ours").extra["model"]["name"] == "mistral"


@pytest.mark.parametrize("places", ["mistral"], indirect=True)
def test_a_model_that_is_another_or_none_is_reported(places: Path) -> None:
    ours, hub = places / "ours", places / "hub"
    with pytest.raises(ConfigError, match=r"no such family; did you mean 'mistral'\?"):
        diff(ours, hub, model="mistal")
    with pytest.raises(ConfigError, match="takes no --flavor"):
        diff(ours, hub, model="mistral", flavor="7B")
    with pytest.raises(ConfigError, match="sizes are recorded nowhere"):
        diff(ours, hub, model="qwen2")
    with pytest.raises(ConversionError, match=r"is of a mistral, not of a qwen2"):
        diff(ours, hub, model="qwen2", hf_assets=hub)
    with pytest.raises(ConversionError, match="does not hold this llama3 model"):
        diff(ours, hub, model="llama3", flavor="debugmodel")
