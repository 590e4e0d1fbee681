"""The tables: complete, invertible, and of the sizes of the models that they describe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.format.box import Box, cover_faults
from milepost.interop.names.assembled import Assembled
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import MODEL_NAMES, ModelArgs, MoEArgs, RopeScaling, model_args, model_flavors
from milepost.interop.names.rules import Correspondence, correspond, key_faults
from milepost.interop.weights.boxes import Array, TensorInfo
from milepost.train.models import build_model

FLAVORS = [(model, flavor) for model in MODEL_NAMES for flavor in model_flavors(model)]


class Memory:
    """Tensors in memory, read as files are."""

    def __init__(self, arrays: dict[str, Array]):
        self.arrays = arrays
        self.tensors = {key: TensorInfo(str(array.dtype), array.shape) for key, array in arrays.items()}

    def unit_rows(self, key: str) -> int:
        return 1

    def read_into(self, key: str, box: Box, out: Array) -> None:
        out[...] = self.arrays[key][tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]


def whole(readable: Assembled) -> dict[str, Array]:
    found = {}
    for key, info in readable.tensors.items():
        found[key] = np.full(info.shape, -1, info.dtype)
        readable.read_into(key, Box.whole(info.shape), found[key])
    return found


def numbered(shapes: dict[str, tuple[int, ...]]) -> Memory:
    """Tensors of which no two elements are equal."""
    arrays, start = {}, 0
    for key, shape in shapes.items():
        count = int(np.prod(shape))
        arrays[key] = np.arange(start, start + count, dtype=np.float32).reshape(shape)
        start += count
    return Memory(arrays)


def there_and_back(found: Correspondence) -> tuple[Memory, dict[str, Array]]:
    ours = numbered(dict(found.ours))
    theirs = Assembled(ours, found.into_theirs())
    return ours, whole(Assembled(theirs, found.into_ours()))


@pytest.mark.parametrize(("model", "flavor"), FLAVORS)
def test_our_side_of_the_tables_is_the_state_dict_of_our_model(model: str, flavor: str):
    args = model_args(model, flavor)
    with torch.device("meta"):
        state = build_model(model, flavor, vocab_size=None, seq_len=16).state_dict()
    family = family_of(model, args)
    ours = correspond(family, family.schemes[0], args).ours
    assert ours == {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(("model", "flavor"), [*[f for f in FLAVORS if "debug" in f[1]], ("llama3", "1B")])
def test_every_scheme_of_every_family_covers_both_sides_exactly_once(model: str, flavor: str):
    args = model_args(model, flavor)
    family = family_of(model, args)
    for scheme in family.schemes:
        found = correspond(family, scheme, args)
        for recipes in (found.into_ours(), found.into_theirs()):
            for key, recipe in recipes.items():
                faults = cover_faults(recipe.shape, [piece.target for piece in recipe.pieces])
                assert not faults or recipe.dtype is not None, f"{scheme.name}: {key}: {faults}"


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(4, 2), (4, 4), (6, 2), (2, 1)]),
    head_dim=st.sampled_from([2, 4, 8]),
    dim=st.integers(1, 7),
    experts=st.sampled_from([None, 1, 3]),
    tied=st.booleans(),
    model=st.sampled_from(["llama3", "qwen3"]),
)
def test_there_and_back_is_the_identity_in_every_scheme(
    heads: tuple[int, int], head_dim: int, dim: int, experts: int | None, tied: bool, model: str
):
    args = ModelArgs(
        dim=dim,
        n_layers=2,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=head_dim,
        hidden_dim=5,
        vocab_size=9,
        max_seq_len=8,
        rope_theta=1e4,
        norm_eps=1e-5,
        tied_embeddings=tied,
        rope_scaling=RopeScaling(factor=8.0),
        moe=MoEArgs(num_experts=experts, top_k=1, hidden_dim=3) if experts and model == "qwen3" else None,
    )
    family = family_of(model, args)
    for scheme in family.schemes:
        ours, back = there_and_back(correspond(family, scheme, args))
        assert back.keys() == ours.arrays.keys()
        for key, array in ours.arrays.items():
            np.testing.assert_array_equal(back[key], array, err_msg=f"{scheme.name}: {key}")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_box_of_an_assembled_tensor_is_that_part_of_the_whole(data: st.DataObject):
    model, flavor = data.draw(st.sampled_from([("llama3", "debugmodel"), ("qwen3", "debugmodel_moe")]))
    args = model_args(model, flavor)
    family = family_of(model, args)
    found = correspond(family, data.draw(st.sampled_from(family.schemes)), args)
    recipes = data.draw(st.sampled_from([found.into_ours(), found.into_theirs()]))
    key = data.draw(st.sampled_from([k for k in recipes if "layers.0." in k and recipes[k].pieces]))
    keys = {piece.source_key for piece in recipes[key].pieces}
    sources = found.ours if recipes.keys() == found.into_theirs().keys() and keys <= found.ours.keys() else found.theirs
    readable = Assembled(numbered({k: sources[k] for k in keys}), {key: recipes[key]})
    shape = recipes[key].shape
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = Box(tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds))
    part = np.full(box.sizes, -1, np.float32)
    readable.read_into(key, box, part)
    expected = whole(readable)[key][tuple(slice(low, high) for low, high in bounds)]
    np.testing.assert_array_equal(part, expected)


def test_query_rows_are_reordered_as_metas_own_conversion_script_does():
    args = model_args("llama3", "debugmodel")
    family = family_of("llama3", args)
    found = correspond(family, family.scheme("hf"), args)
    ours = numbered({key: shape for key, shape in found.ours.items() if "layers.0.attention.wq" in key})
    key = "model.layers.0.self_attn.q_proj.weight"
    theirs = whole(Assembled(ours, {key: found.into_theirs()[key]}))[key]
    # `permute` of transformers' convert_llama_weights_to_hf.py, in torch.
    w = torch.from_numpy(ours.arrays["layers.0.attention.wq.weight"])
    heads, dim = args.n_heads, args.dim
    expected = w.view(heads, dim // heads // 2, 2, dim).transpose(1, 2).reshape(dim, dim)
    assert torch.equal(torch.from_numpy(theirs), expected)


def test_missing_unexpected_and_misshapen_keys_are_distinguished():
    args = model_args("llama3", "debugmodel")
    family = family_of("llama3", args)
    found = correspond(family, family.scheme("hf"), args)
    stored = dict(found.theirs)
    del stored["model.norm.weight"]
    stored["model.norm.wieght"] = (256,)
    stored["lm_head.weight"] = (2048, 255)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    faults = key_faults(found, stored)
    assert faults.missing == ("model.norm.weight",)
    assert faults.unexpected == ("model.norm.wieght",)
    assert faults.misshapen == ("lm_head.weight has shape [2048, 255], expected [2048, 256] by the model's sizes",)
