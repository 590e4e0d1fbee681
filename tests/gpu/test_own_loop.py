"""Custom loops on one GPU: a saved run resumes bit for bit, and moves to a CPU and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(240),
]

MODES = ("disabled", "async", "async_with_pinned_mem")


class Convolutions(nn.Module):
    """BatchNorm (buffers that forward changes), dropout (the GPU's generator) and channels-last weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(16, 4, 3)
        ).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()


class Perceptron(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 256, dtype=dtype), nn.GELU(), nn.Dropout(0.2), nn.Linear(256, 8, dtype=dtype)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).float().square().mean()


class Loop:
    """A training loop as a user writes it; inputs are drawn from the GPU's generator, so that one must resume too."""

    def __init__(
        self,
        folder: Path,
        mode: str,
        *,
        model: Callable[[], nn.Module] = Perceptron,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        scale: bool = False,
        compiled: str = "",
        shape: tuple[int, ...] = (32, 64),
    ) -> None:
        torch.manual_seed(1)
        self.module = model().cuda()
        self.forward = torch.compile(self.module, mode=compiled) if compiled else self.module
        self.optimizer = optimizer(self.module.parameters())
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        self.scaler = torch.amp.GradScaler("cuda", enabled=scale, init_scale=2.0**10, growth_interval=3)
        self.dtype = next(self.module.parameters()).dtype
        self.shape = shape
        self.step = 0
        self.manager = CheckpointManager(
            folder,
            CheckpointConfig(interval=2, async_mode=mode, keep_latest_k=0, last_save_model_only=False),  # type: ignore[arg-type]
            model=self.module,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            train_state=self,
            states={"scaler": self.scaler} if scale else {},
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def run(self, until: int) -> list[float]:
        """The losses of the steps that were made."""
        self.manager.load()
        losses = []
        while self.step < until:
            x = torch.randn(self.shape, device="cuda", dtype=self.dtype)
            with torch.autocast("cuda", torch.float16, enabled=self.scaler.is_enabled()):
                loss = self.forward(x)
            self.scaler.scale(loss).backward()
            self.manager.maybe_wait_for_staging()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.step += 1
            losses.append(loss.item())
            self.manager.save(self.step, last_step=self.step == until)
        self.manager.close()
        return losses

    def bits(self) -> dict[str, bytes]:
        values = {key: value.cpu().contiguous() for key, value in self.module.state_dict().items()}
        return {key: value.flatten().view(torch.uint8).numpy().tobytes() for key, value in values.items()}


KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "fused": {"optimizer": lambda p: torch.optim.AdamW(p, fused=True)},
    "step counters on the GPU": {"optimizer": lambda p: torch.optim.Adam(p, capturable=True)},
    "tensor learning rate": {"optimizer": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), capturable=True)},
    "bfloat16": {"model": lambda: Perceptron(torch.bfloat16)},
    "scaled fp16": {"scale": True},
    "buffers and channels-last": {"model": Convolutions, "shape": (8, 3, 16, 16)},
    "compiled": {"compiled": "default"},
    "compiled with CUDA graphs": {"compiled": "reduce-overhead"},
}


@pytest.fixture(autouse=True)
def exact_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_loop_ends_as_an_undisturbed_one(kind: str, mode: str, tmp_path: Path):
    whole = Loop(tmp_path / "whole", mode, **KINDS[kind])
    losses = whole.run(until=8)

    first = Loop(tmp_path / "halves", mode, **KINDS[kind]).run(until=4)
    second = Loop(tmp_path / "halves", mode, **KINDS[kind])
    rest = second.run(until=8)

    assert first + rest == losses
    assert second.bits() == whole.bits()


def test_the_state_moves_between_gpu_and_cpu(tmp_path: Path):
    on_gpu = Perceptron().cuda()
    generator = torch.cuda.get_rng_state()
    milepost.save(tmp_path / "gpu", {"model": on_gpu.state_dict()})
    on_cpu = Perceptron()
    milepost.load(tmp_path / "gpu", {"model": on_cpu.state_dict()})
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True))

    milepost.save(tmp_path / "cpu", {"model": on_cpu.state_dict()})
    back = Perceptron().cuda()
    milepost.load(tmp_path / "cpu", {"model": back.state_dict()})
    assert all(torch.equal(a, b) for a, b in zip(on_gpu.parameters(), back.parameters(), strict=True))

    # A template-less load of what was on the GPU comes to the CPU: the machine that reads may have no GPU.
    read = milepost.load(tmp_path / "gpu")
    assert {value.device.type for value in read["model"].values()} == {"cpu"}
    assert torch.equal(torch.cuda.get_rng_state(), generator), "nothing drew from the GPU's generator"


def test_a_manager_s_step_of_a_gpu_resumes_on_a_cpu_and_on_the_gpu_again(tmp_path: Path):
    def train(module: nn.Module, device: str, step: int) -> None:
        optimizer = torch.optim.AdamW(module.parameters())
        config = CheckpointConfig(interval=1)
        with CheckpointManager(tmp_path / "run", config, model=module, optimizer=optimizer) as own:
            report = own.load()
            assert (report is None) == (step == 1)
            module(torch.ones(4, 64, device=device)).backward()
            optimizer.step()
            own.save(step)

    for step, device in enumerate(("cuda", "cpu", "cuda"), start=1):
        train(Perceptron().to(device), device, step)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-1", "step-2", "step-3"]


def test_a_graph_of_kernels_is_saved_between_replays(tmp_path: Path):
    """Replays change weights without PyTorch's version counters: a background save must still not tear."""
    module = Perceptron().cuda()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(32, 64, device="cuda")
    module.body[2].p = 0.0
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            module(x).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        module(x).backward()
        optimizer.step()

    config = CheckpointConfig(interval=1, async_mode="async_with_pinned_mem", keep_latest_k=0)
    expected = {}
    with CheckpointManager(tmp_path / "run", config, model=module, optimizer=optimizer) as manager:
        for step in range(1, 5):
            manager.maybe_wait_for_staging()
            graph.replay()
            torch.cuda.synchronize()
            expected[step] = {key: value.cpu().clone() for key, value in module.state_dict().items()}
            manager.save(step)
    for step, weights in expected.items():
        read = milepost.load(tmp_path / "run" / f"step-{step}")
        assert all(torch.equal(read[key], value) for key, value in weights.items())
