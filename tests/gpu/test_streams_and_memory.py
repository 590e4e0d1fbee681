"""Saves from other streams than the default one, and the memory that saves and loads take on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import milepost
from milepost import CheckpointConfig, CheckpointManager, HfModel
from milepost.collective.comm import SingleProcess
from milepost.run.assemble import SaveInfo
from milepost.saving.async_save import AsyncSaver
from milepost.saving.request import SaveRequest
from milepost.storage import LocalStorage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(240),
]

INFO = SaveInfo(step=None, kind="state")
MODES = ("disabled", "async", "async_with_pinned_mem")
SIDE = 4096
LONG = 6_000_000_000
"""Cycles, some three seconds: longer than the first save of a process takes to begin."""


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_a_save_waits_for_the_stream_that_it_is_called_on(mode: str, tmp_path: Path):
    saver = AsyncSaver(LocalStorage(str(tmp_path)), SingleProcess(), mode, timeout_s=60.0)
    live = {f"w{i}": torch.zeros(1024, 1024, device="cuda") for i in range(16)}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for round_number in range(2):
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000_000)  # half a second or so: the change comes long after the call
            for value in live.values():
                value.add_(1)
            handle = saver.save(SaveRequest(f"ck-{round_number}", lambda: live, INFO))
            handle.staged(60)
            for value in live.values():
                value.add_(1)
        handle.committed(60)
        side.synchronize()
        into = {key: torch.zeros(1024, 1024, device="cuda") for key in live}
        milepost.load(tmp_path / f"ck-{round_number}", into)
        assert all(bool((value == 2 * round_number + 1).all()) for value in into.values())
    saver.close()


def test_a_synchronous_save_waits_for_the_stream_that_it_is_called_on(tmp_path: Path):
    live = {f"w{i}": torch.zeros(1024, 1024, device="cuda") for i in range(16)}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        for value in live.values():
            value.add_(1)
        milepost.save(tmp_path / "ck", live)
    into = {key: torch.zeros(1024, 1024, device="cuda") for key in live}
    milepost.load(tmp_path / "ck", into)
    assert all(bool((value == 1).all()) for value in into.values())


@pytest.mark.parametrize("mode", MODES)
def test_saves_and_loads_take_no_memory_of_the_gpu(mode: str, tmp_path: Path):
    """The state is 805 MB, most of a real GPU: there is no room for another copy of it, or of one large tensor."""
    module = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(4)]).cuda()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(1, SIDE, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    config = CheckpointConfig(interval=1, async_mode=mode, keep_latest_k=2)  # type: ignore[arg-type]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with CheckpointManager(tmp_path / "run", config, model=module, optimizer=optimizer) as manager:
        for step in range(1, 5):
            manager.save(step)
            manager.maybe_wait_for_staging()
            with torch.no_grad():
                module[0].weight.mul_(2)
        manager.maybe_wait_for_saving()
    assert torch.cuda.max_memory_allocated() <= before + (1 << 20), "a save took memory of the GPU"

    expected = [parameter.detach().cpu() for parameter in module.parameters()]
    expected[0] /= 2
    torch.cuda.reset_peak_memory_stats()
    with CheckpointManager(tmp_path / "run", config, model=module, optimizer=optimizer) as manager:
        manager.load()
    assert torch.cuda.max_memory_allocated() <= before + (64 << 20), "a load took memory of the GPU"
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(module.parameters(), expected, strict=True))


def test_a_tensor_of_more_than_four_gigabytes_comes_back(tmp_path: Path):
    """Offsets beyond 32 bits, in the copy, the file and the digests."""
    nbytes = (4 << 30) + 12_345
    live = {"w": torch.arange(251, dtype=torch.uint8, device="cuda").repeat(nbytes // 251 + 1)[:nbytes]}
    handle = milepost.async_save(tmp_path / "ck", live)
    handle.committed(200)
    into = {"w": torch.zeros(nbytes, dtype=torch.uint8, device="cuda")}
    milepost.load(tmp_path / "ck", into)
    assert torch.equal(into["w"], live["w"])


def test_a_load_is_not_overwritten_by_kernels_that_were_queued_before(tmp_path: Path):
    """As by an initialization that was queued on another stream; transposed targets are filled by kernels too."""
    saved = torch.rand(2048, 1024)
    milepost.save(tmp_path / "ck", {"w": saved, "t": saved})
    into = {"w": torch.zeros(2048, 1024, device="cuda"), "t": torch.zeros(1024, 2048, device="cuda").t()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        for value in into.values():
            value.zero_()
        milepost.load(tmp_path / "ck", into)
        after = [value.clone() for value in into.values()]
    torch.cuda.synchronize()
    assert all(torch.equal(value.cpu(), saved) for value in (*into.values(), *after))


def test_stock_dcp_with_our_writer_and_reader_keeps_to_the_stream_that_it_is_called_on(tmp_path: Path):
    live = {f"w{i}": torch.zeros(1024, 1024, device="cuda") for i in range(16)}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        for value in live.values():
            value.add_(1)
        dcp.save(live, storage_writer=milepost.StorageWriter(tmp_path / "ck"), no_dist=True)
        torch.cuda._sleep(LONG)
        for value in live.values():
            value.zero_()
        dcp.load(live, storage_reader=milepost.StorageReader(tmp_path / "ck"), no_dist=True)
    torch.cuda.synchronize()
    assert all(bool((value == 1).all()) for value in live.values())


def test_weights_in_hugging_face_files_keep_to_the_stream_that_the_manager_is_called_on(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=512, num_hidden_layers=2, **sizes)).cuda()
    weights = model.model.layers[0].mlp.up_proj.weight
    config = CheckpointConfig(interval=1, last_save_in_hf=True, last_save_model_only=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        torch.cuda._sleep(LONG)
        weights.fill_(3)
        with CheckpointManager(tmp_path / "run", config, model=model, hf=HfModel.of(model)) as manager:
            manager.save(1, last_step=True)
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run" / "step-1")
    assert bool((found.model.layers[0].mlp.up_proj.weight == 3).all())

    config = CheckpointConfig(initial_load_path=str(tmp_path / "run" / "step-1"), initial_load_in_hf=True)
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        torch.cuda._sleep(LONG)
        weights.fill_(5)
        with CheckpointManager(tmp_path / "next", config, model=model, hf=HfModel.of(model)) as manager:
            manager.load()
    torch.cuda.synchronize()
    assert bool((weights == 3).all())
