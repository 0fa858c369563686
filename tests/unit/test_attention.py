# SPDX-License-Identifier: Apache-2.0
"""Prompts that are run once for all their responses: attention and whole models, against each sequence alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.unit.packed import SHAPES, groups_of, sequences, tiny
from verl_gndpo.teacher import attention
from verl_gndpo.teacher.attention import FlexKernel, SharedPromptAttention, attend_by_prompt
from verl_gndpo.teacher.packing import Layout

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("flex", [False, True])
@given(SHAPES, st.sampled_from([None, 1, 3, 100]), st.sampled_from([(2, 2), (4, 2), (4, 1)]), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_attention_is_that_of_each_sequence_alone(flex, shapes, window, heads, padding):
    torch.manual_seed(0)
    groups = groups_of(shapes)
    tokens = sum(group.tokens for group in groups)
    query = torch.randn(1, heads[0], tokens + padding, 8)
    key, value = torch.randn(2, 1, heads[1], tokens + padding, 8).unbind(0)
    layout = Layout(groups, CPU)
    if flex:
        out = FlexKernel(layout).attend(query, key, value, 0.3, window)
    else:
        out = attend_by_prompt(layout, query, key, value, 0.3, window)
    assert out.shape == query.shape and out.isfinite().all()
    for places in sequences(groups):
        length = len(places)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < (window or length))
        alone = scaled_dot_product_attention(
            query[:, :, places], key[:, :, places], value[:, :, places], attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[:, :, places], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("flex", [False, True])
@pytest.mark.parametrize("name", ["Qwen2", "Qwen2 with a sliding window", "Qwen3", "Llama"])
def test_a_models_output_is_that_of_each_sequence_alone(name, flex):
    model = tiny(name)
    groups = groups_of([(7, [3, 9, 1]), (4, [5]), (12, [2, 2])])
    tokens = torch.randint(0, 50, (sum(g.tokens for g in groups),), generator=torch.Generator().manual_seed(1))
    whole = sequences(groups)
    with torch.no_grad():
        expected = [model(input_ids=tokens[places][None]).logits[0] for places in whole]
        attention = SharedPromptAttention(model, flex)
        positions = torch.empty_like(tokens)
        for places in whole:
            positions[places] = torch.arange(len(places))
        with attention.attending(Layout(groups, CPU)):
            packed = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0]
        with attention.plainly():
            plain = model(input_ids=tokens[whole[0]][None]).logits[0]
    for places, alone in zip(whole, expected, strict=True):
        torch.testing.assert_close(packed[places], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain, expected[0])


def test_a_sliding_window_repeats_no_keys(monkeypatch):
    seen = []

    def attend(query, key, value, **options):
        seen.append((query, key, value))
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", attend)
    query, key, value = torch.randn(1, 6, 40, 8), *torch.randn(2, 1, 2, 40, 8)
    attend_by_prompt(Layout(groups_of([(10, [10, 10, 9, 1])]), CPU), query, key, value, None, 5)
    assert len(seen) > 2
    for heads, *shared in seen:
        assert heads.shape[1] == 3
        assert all(x.shape[1] == 3 and x.stride(1) == 0 for x in shared)
    # The prompt's are the model's own.
    assert seen[0][1].untyped_storage().data_ptr() == key.untyped_storage().data_ptr()


def test_two_models_attend_by_layouts_of_their_own():
    one, other = tiny("Qwen2"), tiny("Qwen2")
    groups = groups_of([(3, [2])])
    attention, _ = SharedPromptAttention(one), SharedPromptAttention(other)
    tokens = torch.arange(5)[None]
    with attention.attending(Layout(groups, CPU)), torch.no_grad():
        one(input_ids=tokens, use_cache=False)
        with pytest.raises(RuntimeError, match=r"only within SharedPromptAttention\.attending"):
            other(input_ids=tokens, use_cache=False)


def test_a_model_that_shares_prompts_does_not_run_without_a_layout():
    model = tiny("Qwen2")
    SharedPromptAttention(model)
    with pytest.raises(RuntimeError, match=r"only within SharedPromptAttention\.attending"):
        model(input_ids=torch.arange(5)[None], use_cache=False)


def test_bounded_scores_and_attention_sinks_are_refused():
    shared, query = SharedPromptAttention(tiny("Qwen2")), torch.randn(1, 1, 3, 4)
    for option in ({"softcap": 30.0}, {"s_aux": torch.zeros(1)}):
        with pytest.raises(NotImplementedError, match="bounds its scores or has attention sinks"):
            shared.attention(None, query, query, query, None, **option)


def test_a_layer_with_an_attention_of_its_own_is_noticed():
    """It would let responses to one prompt see each other."""
    model = tiny("Qwen2")
    attention = SharedPromptAttention(model)
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **_: (hidden_states, None)
    with (
        pytest.raises(NotImplementedError, match=r"Qwen2ForCausalLM: 1 of its 2 layers use the attention"),
        attention.attending(Layout(groups_of([(3, [2, 2])]), CPU)),
    ):
        model(input_ids=torch.arange(7)[None], use_cache=False)


def test_layers_of_another_kind_are_refused():
    model = tiny("Qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(NotImplementedError, match="Qwen2ForCausalLM has layers of the kind linear_attention"):
        SharedPromptAttention(model)
    assert model.config._attn_implementation == "sdpa"
