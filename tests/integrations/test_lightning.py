"""Lightning's Trainer with Milepost: killed and resumed, against a run that was not disturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import milepost
from milepost.errors import MilepostError
from milepost.integrations.lightning import MilepostCallback, MilepostCheckpointIO, load_from_checkpoint
from milepost.testing.world import run_world

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Net(pl.LightningModule):
    def __init__(self, kill_at: int = 0, sharded: bool = False):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
        if sharded:
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.kill_at, self.sharded, self.losses = kill_at, sharded, []

    def configure_model(self) -> None:
        if self.sharded and not hasattr(self.layers[0], "unshard"):
            for layer in (self.layers[0], self.layers[-1]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.global_step == self.kill_at > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = self.layers(batch[0]).square().mean()
        self.losses.append((self.global_step, loss.item()))
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self.layers(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def data(count: int = 32) -> DataLoader:
    return DataLoader(
        TensorDataset(torch.randn(count, 8, generator=torch.Generator().manual_seed(5))), batch_size=4, shuffle=True
    )


def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def fit(folder: Path, kill_at: int = 0, kind: str = "one", mode: str | None = "async") -> dict[str, Any]:
    torch.manual_seed(9)
    net = Net(kill_at, sharded=kind == "sharded")
    keep = ModelCheckpoint(dirpath=folder, monitor="val", save_top_k=2, save_last=True, filename="{epoch}")
    world_size = int(os.environ["WORLD_SIZE"])
    strategies = {"one": "auto", "ddp": "ddp", "sharded": ModelParallelStrategy(1 * world_size, 1)}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategies[kind],
        max_epochs=5,
        callbacks=[MilepostCallback(mode), keep],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=True,
    )
    trainer.fit(net, data(), data(8), ckpt_path="last")
    states = trainer.optimizers[0].state.values()
    return {
        "losses": net.losses,
        "parameters": [full(p).tolist() for p in net.state_dict().values()],
        "optimizer": [full(value).tolist() for entry in states for value in entry.values()],
        "random": torch.rand(1).item(),
        "best": (Path(keep.best_model_path).name, keep.best_model_score.item()),
        "rate": trainer.lr_scheduler_configs[0].scheduler.get_last_lr(),
    }


@pytest.mark.parametrize(("world_size", "kind"), [(1, "one"), (2, "ddp"), (2, "sharded")])
def test_a_killed_run_resumes_to_the_last_bit(tmp_path: Path, world_size: int, kind: str) -> None:
    undisturbed = run_world(fit, world_size, tmp_path / "whole", 0, kind)
    steps_an_epoch = 8 // world_size
    run_world(fit, world_size, tmp_path / "killed", 3 * steps_an_epoch + 2, kind, allow_death=True)
    resumed = run_world(fit, world_size, tmp_path / "killed", 0, kind)
    for rank, (whole, again) in enumerate(zip(undisturbed, resumed, strict=True)):
        losses = again.pop("losses")
        all_losses = whole.pop("losses")
        assert len(losses) in (2 * steps_an_epoch, 3 * steps_an_epoch), f"rank {rank} resumed from the third epoch"
        assert losses == all_losses[-len(losses) :]
        assert again == whole
    assert len(list((tmp_path / "whole").glob("*.ckpt"))) == 3, "the two best, and the last"
    assert not list((tmp_path / "whole").glob(".milepost-attempt-*")), "fit() returns when the last save is committed"
    assert milepost.load(tmp_path / "whole/last.ckpt")["train_state"]["global_step"] == 5 * steps_an_epoch
    for path in (*(tmp_path / "whole").glob("*.ckpt"), *(tmp_path / "killed").glob("*.ckpt")):
        assert milepost.verify(path).is_sound


def test_a_module_is_made_of_a_checkpoint_and_of_one_of_lightning_s_own(tmp_path: Path) -> None:
    class Sized(Net):
        def __init__(self, factor: float):
            super().__init__()
            self.save_hyperparameters()

    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(callbacks=[MilepostCallback(), keep], **options)
    net = Sized(0.5)
    trainer.fit(net, data())
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    trainer.validate(net, data(8), ckpt_path=str(tmp_path / "mine.ckpt"), verbose=False)
    trained = {"last.ckpt": {key: value.clone() for key, value in net.state_dict().items()}}
    stock = pl.Trainer(**options, default_root_dir=tmp_path / "stock")
    stock.fit(net, data())
    stock.save_checkpoint(tmp_path / "stock.ckpt")
    trained["stock.ckpt"] = net.state_dict()
    with pytest.raises(IsADirectoryError):  # so that the page names the way
        Sized.load_from_checkpoint(tmp_path / "last.ckpt")
    for name in ("last.ckpt", "stock.ckpt"):
        loaded = load_from_checkpoint(Sized, tmp_path / name)
        assert loaded.hparams.factor == 0.5
        for key, value in trained[name].items():
            assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.slow
def test_what_sharded_ranks_saved_is_whole_on_other_numbers_of_them(tmp_path: Path) -> None:
    trained, *_ = run_world(fit, 2, tmp_path / "two", 0, "sharded")
    for world_size in (1, 4):
        for again in run_world(fit, world_size, tmp_path / "two", 0, "sharded"):
            assert again["losses"] == [], "all epochs are trained"
            assert {name: again[name] for name in ("parameters", "optimizer", "rate", "best")} == {
                name: trained[name] for name in ("parameters", "optimizer", "rate", "best")
            }


def save_in_place_of(checkpoints: MilepostCheckpointIO, new: Path, old: Path, state: dict[str, Any]) -> None:
    """As ``ModelCheckpoint`` does it."""
    checkpoints.save_checkpoint(state, new)
    checkpoints.remove_checkpoint(old)
    checkpoints.teardown()


def test_nothing_is_removed_before_what_replaces_it_is_committed_nor_anything_that_is_no_checkpoint(
    tmp_path: Path,
) -> None:
    checkpoints = MilepostCheckpointIO()
    state = {"state_dict": {"weight": torch.ones(3)}, "global_step": 3, "callbacks": {"a.b": {1: (2, None)}}}
    checkpoints.save_checkpoint(state, tmp_path / "old.ckpt")
    checkpoints.teardown()
    (tmp_path / "mine.ckpt").mkdir()
    (tmp_path / "mine.ckpt/notes.txt").write_text("keep")
    (tmp_path / "blocked.ckpt").write_text("a file that is not replaced")
    checkpoints.remove_checkpoint(tmp_path / "mine.ckpt")
    assert (tmp_path / "mine.ckpt/notes.txt").exists()
    with pytest.raises(MilepostError, match=r"blocked\.ckpt"):
        save_in_place_of(checkpoints, tmp_path / "blocked.ckpt", tmp_path / "old.ckpt", state)
    assert milepost.verify(tmp_path / "old.ckpt").is_sound
    save_in_place_of(checkpoints, tmp_path / "new.ckpt", tmp_path / "old.ckpt", state)
    assert not (tmp_path / "old.ckpt").exists()
    loaded = checkpoints.load_checkpoint(tmp_path / "new.ckpt")
    assert torch.equal(loaded.pop("state_dict")["weight"], torch.ones(3))
    assert loaded == {"global_step": 3, "callbacks": {"a.b": {1: (2, None)}}}
