"""The pages on frameworks: their code runs unchanged, and resumes."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from pages import ROOT, blocks

from milepost.run import catalog
from milepost.storage import LocalStorage
from milepost.testing.world import run_world

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
MAX_LINES = 10


def needs(*frameworks: str) -> pytest.MarkDecorator:
    missing = [name for name in frameworks if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not run: {', '.join(missing)} is not installed here")


def code_of(page: str) -> list[str]:
    found = [block.text for block in blocks(ROOT / f"docs/howto/{page}.md") if block.language == "python"]
    for text in found:
        assert sum(bool(line.strip()) for line in text.splitlines()) <= MAX_LINES
    return found


def run_in(folder: Path, page: str, make: Any, result: Any, first: int = 0, last: int | None = None) -> Any:
    """Run a page's blocks in a process of their own, with the names from ``make``; returns the value of ``result``."""
    (found,) = run_world(_run, 1, folder, code_of(page)[first:last], make, result)
    return found


def _run(folder: Path, code: list[str], make: Any, result: Any) -> Any:
    os.chdir(folder)
    names = make()
    for text in code:
        exec(compile(text, "page", "exec"), names)
    return result(names)


def tiny_llama() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.randint(0, 32, (40, 8))
    model = LlamaForCausalLM(config)
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    return {"model": model, "dataset": dataset, "optimizer": torch.optim.AdamW(model.parameters())}


@needs("transformers", "accelerate")
def test_transformers(tmp_path: Path) -> None:
    for trained in (25, 0):  # the second time nothing is left to train
        steps = run_in(tmp_path, "transformers", tiny_llama, logged_steps)
        assert steps == (25, trained)
    found = {entry.step for entry in catalog.scan(LocalStorage(str(tmp_path / "outputs")), "milepost")}
    assert found == {10, 20, 25}


def logged_steps(names: dict[str, Any]) -> tuple[int, int]:
    trainer = names["trainer"]
    return trainer.state.global_step, trainer.state.global_step - trainer._initial_global_step


def tiny_module() -> dict[str, Any]:
    import lightning
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log("val_loss", self.layer(batch).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(torch.randn(16, 2), batch_size=4)
    return {"module": Module(), "train_data": data, "val_data": data}


@needs("lightning")
def test_lightning(tmp_path: Path) -> None:
    for _ in range(2):
        assert run_in(tmp_path, "lightning", tiny_module, lambda names: names["trainer"].global_step) == 12
    assert (tmp_path / "outputs/last.ckpt/milepost.json").exists()


@needs("torchtitan")
def test_torchtitan() -> None:
    import titan_shim  # noqa: F401
    from torchtitan.config import ConfigManager

    names: dict[str, Any] = {}
    exec(code_of("torchtitan")[0], names)
    made = names["debugmodel_milepost"]()
    assert made.checkpoint.num_io_threads == 4
    assert made.checkpoint.interval == 10, "torchtitan's own options stay as they were"
    flags = ["--module", "llama3", "--config", "llama3_debugmodel"]
    assert ConfigManager().parse_args(flags).checkpoint.interval == 10


def example() -> dict[str, Any]:
    torch.manual_seed(1)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        loss = model(torch.randn(8, 4)).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    return {"num_steps": int(os.environ["NUM_STEPS"]), "train": train}


def trained(names: dict[str, Any]) -> list[Any]:
    modules = [names[name] for name in ("model", "average", "pair") if name in names]
    return [tensor.tolist() for module in modules for tensor in module.state_dict().values()]


def peft_works() -> bool:
    """It refuses the torchao that torchtune needs, which goes with the other tests."""
    if importlib.util.find_spec("peft") is None:
        return False
    return tuple(map(int, metadata.version("torchao").split(".")[:2])) > (0, 16)


LORA = pytest.param(4, marks=pytest.mark.skipif(not peft_works(), reason="not run: peft wants a newer torchao"))


@pytest.mark.parametrize("number", [1, 2, 3, LORA, 5, pytest.param(6, marks=pytest.mark.slow)])
def test_each_example_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def run(name: str, num_steps: int) -> list[Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv("NUM_STEPS", str(num_steps))
        code = code_of("more")
        return run_world(_run, 1, tmp_path / name, [code[0], code[number]], example, trained)[0]

    whole = run("whole", 5)
    run("parts", 2)
    assert run("parts", 5) == whole
    assert run("parts", 5) == whole, "nothing is left to train"
