"""The models by themselves, on one process: sizes, names, and what their parts compute."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from milepost.errors import ConfigError
from milepost.interop.names.model_sizes import MoEArgs, RopeScaling
from milepost.train.models import MODEL_NAMES, ModelArgs, build_model, model_args, model_flavors
from milepost.train.models.decoder import Decoder
from milepost.train.models.llama3 import Llama3
from milepost.train.models.moe import MoE
from milepost.train.models.qwen3 import Qwen3
from milepost.train.models.rope import rope_table, rotate_halves, rotate_interleaved
from milepost.train.parallel.initial import initial_weight

TINY = ModelArgs(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    vocab_size=61,
    max_seq_len=64,
    rope_theta=10_000.0,
    norm_eps=1e-5,
)
TINY_MOE = replace(TINY, moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=16, balance_loss_weight=0.5))

PUBLISHED = {
    ("llama3", "1B"): 1_235_814_400,
    ("llama3", "3B"): 3_212_749_824,
    ("llama3", "8B"): 8_030_261_248,
    ("llama3", "70B"): 70_553_706_496,
    ("llama3", "405B"): 405_853_388_800,
    ("qwen3", "0.6B"): 596_049_920,
    ("qwen3", "1.7B"): 1_720_574_976,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen3", "14B"): 14_768_307_200,
    ("qwen3", "32B"): 32_762_123_264,
    ("qwen3", "30B-A3B"): 30_532_122_624,
    ("qwen3", "235B-A22B"): 235_093_634_560,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Other tests fork this process, which its pools of threads would not survive."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _filled(model: Decoder) -> Decoder:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than at the start of a training, so that every part affects the result.
            parameter.copy_(initial_weight(name, parameter.shape, model.args.n_layers, seed=0) * 5)
    return model


@pytest.mark.parametrize(("name", "flavor"), PUBLISHED, ids=lambda part: part)
def test_parameter_counts_are_the_published_ones(name: str, flavor: str) -> None:
    with torch.device("meta"):
        model = build_model(name, flavor, vocab_size=None, seq_len=16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name, flavor]


def test_every_published_size_is_counted_here() -> None:
    sizes = {(name, flavor) for name in MODEL_NAMES for flavor in model_flavors(name)}
    assert {size for size in sizes if not size[1].startswith("debugmodel")} == set(PUBLISHED)


def test_sizes_are_known_without_torch() -> None:
    program = "import sys, milepost.train.models as m, milepost.train.checks; m.model_args('llama3', '8B'); "
    subprocess.run([sys.executable, "-c", program + "sys.exit('torch' in sys.modules)"], check=True)


def test_unknown_model_or_flavor_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.name = 'lama3': there is no such model; did you mean 'llama3'\?"):
        model_args("lama3", "8B")
    with pytest.raises(
        ConfigError, match=r"model\.flavor = '30B-A3': .* did you mean '30B-A3B'\? choices: debugmodel, "
    ):
        model_args("qwen3", "30B-A3")


def test_vocabulary_of_the_tokenizer_replaces_the_published_one() -> None:
    with torch.device("meta"):
        model = build_model("llama3", "8B", vocab_size=257, seq_len=16)
    assert model.state_dict()["output.weight"].shape == (257, 4096)
    assert model(torch.empty(2, 16, dtype=torch.int64, device="meta")).shape == (2, 16, 257)


def test_llama3_has_the_names_of_meta() -> None:
    with torch.device("meta"):
        names = set(Llama3(replace(TINY, n_layers=1), 16).state_dict())
    assert names == {
        "tok_embeddings.weight",
        *(f"layers.0.attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")),
        *(f"layers.0.feed_forward.{w}.weight" for w in ("w1", "w2", "w3")),
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "norm.weight",
        "output.weight",
    }


def test_qwen3_moe_has_the_names_of_torchtitan() -> None:
    with torch.device("meta"):
        state = Qwen3(replace(TINY_MOE, n_layers=1), 16).state_dict()
    assert {name: tuple(state[name].shape) for name in state if name.startswith("layers")} == {
        "layers.0.attention.wq.weight": (32, 32),
        "layers.0.attention.wk.weight": (16, 32),
        "layers.0.attention.wv.weight": (16, 32),
        "layers.0.attention.wo.weight": (32, 32),
        "layers.0.attention.q_norm.weight": (8,),
        "layers.0.attention.k_norm.weight": (8,),
        "layers.0.attention_norm.weight": (32,),
        "layers.0.ffn_norm.weight": (32,),
        "layers.0.moe.router.gate.weight": (4, 32),
        "layers.0.moe.experts.w1": (4, 32, 16),  # [experts, in, out]
        "layers.0.moe.experts.w2": (4, 16, 32),
        "layers.0.moe.experts.w3": (4, 32, 16),
    }


def test_tied_embedding_is_stored_once_and_projects() -> None:
    model = _filled(Llama3(replace(TINY, tied_embeddings=True), 16))
    assert "output.weight" not in model.state_dict()
    untied = Llama3(TINY, 16)
    untied.load_state_dict({**model.state_dict(), "output.weight": model.tok_embeddings.weight})
    tokens = torch.arange(12).view(1, 12)
    torch.testing.assert_close(model(tokens), untied(tokens))


@pytest.mark.parametrize("model_class", [Llama3, Qwen3])
def test_logits_depend_on_earlier_tokens_only(model_class: type[Decoder]) -> None:
    model = _filled(model_class(TINY_MOE if model_class is Qwen3 else TINY, 16))
    tokens = torch.arange(16).view(1, 16)
    changed = tokens.clone()
    changed[0, 9] = 40
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(dim=-1).any()


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_halves])
def test_rotated_scores_depend_on_the_distance_only(rotate) -> None:  # type: ignore[no-untyped-def]
    table = rope_table(TINY, 32)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 32, 1, 8)
    scores = torch.einsum("bthd,bshd->ts", rotate(q, table), rotate(k, table))
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_the_two_rotations_differ_by_the_order_of_channels() -> None:
    table = rope_table(TINY, 5)
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    interleaved_to_halves = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    expected = rotate_interleaved(x, table)[..., interleaved_to_halves]
    torch.testing.assert_close(rotate_halves(x[..., interleaved_to_halves], table), expected)


def test_rope_scaling_stretches_long_wavelengths_only() -> None:
    scaling = RopeScaling(factor=8.0, original_seq_len=64)
    plain, scaled = (rope_table(replace(TINY, rope_scaling=s), 2)[1] for s in (None, scaling))  # angles of position 1
    angles, stretched = (torch.atan2(t[:, 1], t[:, 0]) for t in (plain, scaled))
    assert stretched[0] == angles[0], "wavelength 2 pi is short against 64 positions"
    torch.testing.assert_close(stretched[-1], angles[-1] / 8)


def test_buffers_come_back_after_a_stay_on_meta() -> None:
    with torch.device("meta"):
        model = Llama3(TINY, 16)
    model.to(torch.bfloat16).to_empty(device="cpu")
    model.reset_buffers()
    assert torch.equal(model.rope, rope_table(TINY, 16))
    assert "rope" not in model.state_dict()


def test_mixture_is_the_weighted_sum_of_the_chosen_experts() -> None:
    moe = _moe()
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moe(x), _one_token_at_a_time(moe, x))


def test_experts_that_no_token_chose_get_a_gradient_of_zero() -> None:
    moe = _moe()
    with torch.no_grad():
        moe.router.gate.weight.zero_()[:2] = 1.0
    moe(torch.ones(1, 4, 32)).sum().backward()
    gradient = moe.experts.w1.grad
    assert gradient is not None
    assert gradient[:2].any()
    assert not gradient[2:].any()


def test_mixture_takes_no_rows_at_all() -> None:
    experts = _moe().experts
    rows = torch.empty(0, 32, requires_grad=True)
    out = experts(rows, torch.zeros(4, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, 32)
    assert experts.w2.grad is not None, "without a gradient this rank would be missing in a collective"


def test_balance_loss_is_one_for_even_use_and_grows_with_imbalance() -> None:
    x = torch.zeros(1, 4, 32)
    x[0, :, :4] = torch.eye(4)
    assert _balance_loss(x, gate=lambda weight: weight.fill_diagonal_(5.0)) == pytest.approx(1.0, abs=0.05)
    assert _balance_loss(x, gate=lambda weight: weight[:2, :4].fill_(5.0)) > 1.5


def test_balance_loss_of_a_batch_is_the_sum_over_its_sequences() -> None:
    """So that neither microbatches nor the split over ranks change it."""
    x = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(2))
    whole = _balance_loss(x)
    assert whole == pytest.approx(sum(_balance_loss(sequence) for sequence in x.split(1)), rel=1e-5)


def _moe() -> MoE:
    model = _filled(Qwen3(TINY_MOE, 16))
    moe = model.blocks()[0].moe
    assert moe is not None
    return moe


def _one_token_at_a_time(moe: MoE, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for position in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])):
        token = x[tuple(position)]
        probabilities = F.softmax(F.linear(token, moe.router.gate.weight), dim=-1)
        best = probabilities.argsort(descending=True)[:2]
        for expert in best:
            hidden = F.silu(token @ moe.experts.w1[expert]) * (token @ moe.experts.w3[expert])
            out[tuple(position)] += (
                probabilities[expert] / probabilities[best].sum() * (hidden @ moe.experts.w2[expert])
            )
    return out


def _balance_loss(x: Tensor, gate=None) -> float:  # type: ignore[no-untyped-def]
    """The balancing loss of sequences ``x``, with scale 1, after ``gate`` has set the router's weights."""
    moe = _moe()
    if gate is not None:
        with torch.no_grad():
            gate(moe.router.gate.weight.zero_())
    moe.balance_scale = 1.0
    moe(x).sum().backward()
    assert moe.balance_loss is not None
    return moe.balance_loss.item()
