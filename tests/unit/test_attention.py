# SPDX-License-Identifier: Apache-2.0
"""Prompts that are run once for all their responses: layout, packing and attention, against plain forwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from verl_gndpo.teacher.attention import (
    ATTENTION,
    Family,
    Layout,
    attending,
    attention,
    check_sequence_parallel,
    find_families,
    pack,
    share_prompts,
)

CPU = torch.device("cpu")
# Of one prompt: its length, and the lengths of its responses.
SHAPES = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


def families_of(shapes) -> list[Family]:
    families, row = [], 0
    for prompt, responses in shapes:
        families.append(Family(tuple(range(row, row + len(responses))), prompt, tuple(responses)))
        row += len(responses)
    return families


def sequences(families: list[Family]) -> list[list[int]]:
    """Places in the packed row of each sequence's tokens, prompt and response, in order; written independently."""
    result, start = [], 0
    for family in families:
        prompt = list(range(start, start + family.prompt))
        start += family.prompt
        for response in family.responses:
            result.append(prompt + list(range(start, start + response)))
            start += response
    return result


@given(SHAPES)
@settings(max_examples=100, deadline=None)
def test_the_place_before_each_response_token_predicts_it(shapes):
    families = families_of(shapes)
    lengths = [response for family in families for response in family.responses]
    expected = [
        places[position - 1]
        for places, response in zip(sequences(families), lengths, strict=True)
        for position in range(len(places) - response, len(places))
    ]
    assert Layout(families, CPU).predicting.tolist() == expected


class Group:
    """What a layout asks of the ranks that share a row."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = lambda: size, lambda: rank


@given(SHAPES, st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_ranks_that_share_a_row_predict_each_response_token_once(shapes, ranks):
    families = families_of(shapes)
    predicting = Layout(families, CPU).predicting
    layouts = [Layout(families, CPU, Group(ranks, rank)) for rank in range(ranks)]
    length = -(-sum(family.tokens for family in families) // ranks)
    assert [(x.part.start, x.part.stop) for x in layouts] == [(r * length, r * length + length) for r in range(ranks)]
    here, places = zip(*(layout.predicted_here() for layout in layouts), strict=True)
    assert sorted(torch.cat(here).tolist()) == list(range(len(predicting)))
    for layout, tokens, within in zip(layouts, here, places, strict=True):
        assert torch.equal(predicting[tokens], within + layout.part.start)
        assert ((within >= 0) & (within < length)).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("flex", [False, True])
@given(SHAPES, st.sampled_from([None, 1, 3, 100]), st.sampled_from([(2, 2), (4, 2), (4, 1)]))
@settings(max_examples=100, deadline=None)
def test_attention_is_that_of_each_sequence_alone(flex, shapes, window, heads):
    torch.manual_seed(0)
    families = families_of(shapes)
    tokens = sum(family.tokens for family in families)
    query = torch.randn(1, heads[0], tokens, 8)
    key, value = torch.randn(2, 1, heads[1], tokens, 8).unbind(0)
    layout = Layout(families, CPU, flex=flex)
    with attending(layout):
        out, weights = attention(None, query, key, value, None, scaling=0.3, sliding_window=window)
    assert out.shape == (1, tokens, heads[0], 8) and weights is None and layout.calls == 1
    for places in sequences(families):
        length = len(places)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < (window or length))
        alone = scaled_dot_product_attention(
            query[:, :, places], key[:, :, places], value[:, :, places], attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[0, places], alone[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


@given(SHAPES, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_packing_keeps_every_response_once_and_the_limit_where_it_can(shapes, limit):
    families = families_of(shapes)
    batches = pack(families, limit)
    packed = sorted(row for batch in batches for part in batch for row in part.rows)
    assert packed == sorted(row for family in families for row in family.rows)
    responses = {row: n for family in families for row, n in zip(family.rows, family.responses, strict=True)}
    prompts = {row: family.prompt for family in families for row in family.rows}
    for batch in batches:
        for part in batch:
            assert part.responses == tuple(responses[row] for row in part.rows)
            assert {prompts[row] for row in part.rows} == {part.prompt}
        # Only a single sequence may exceed the limit, alone.
        assert sum(part.tokens for part in batch) <= limit or [len(part.rows) for part in batch] == [1]


def test_a_family_that_fits_stays_together():
    families = families_of([(10, [5] * 4), (10, [5] * 4)])
    assert pack(families, 60) == [families]
    assert [len(batch) for batch in pack(families, 30)] == [1, 1]


def test_rows_are_one_family_only_with_the_same_words_positions_and_pictures():
    prompt, other = torch.arange(5), torch.arange(1, 6)
    picture = {"pixel_values": torch.ones(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    brighter = picture | {"pixel_values": torch.full((4, 3), 2.0)}
    rows = [
        (prompt, 0, picture),
        (other, 0, picture),
        (prompt, 0, brighter),
        (prompt, 1, picture),
        (prompt, 0, {}),
        (prompt, 0, {name: value.clone() for name, value in picture.items()}),
    ]
    ids = [torch.cat([words, torch.tensor([90 + number])]) for number, (words, _, _) in enumerate(rows)]
    positions = [torch.arange(6).repeat(4, 1) + shift for _, shift, _ in rows]
    families = find_families(ids, positions, [1] * len(rows), [images for _, _, images in rows])
    assert [family.rows for family in families] == [(0, 5), (1,), (2,), (3,), (4,)]
    assert families[0] == Family((0, 5), 5, (1, 1))


def test_rows_with_images_in_their_responses_share_no_prompt():
    ids, positions = [torch.arange(6)] * 4, [torch.arange(6)] * 4
    families = find_families(ids, positions, [2] * 4, [{}] * 4, alone={1, 2})
    assert [family.rows for family in families] == [(0, 3), (1,), (2,)]


def test_the_same_ids_split_elsewhere_are_another_prompt():
    ids = [torch.arange(6), torch.arange(6)]
    positions = [torch.arange(6), torch.arange(6)]
    families = find_families(ids, positions, [2, 3], [{}, {}])
    assert [(family.prompt, family.responses) for family in families] == [(4, (2,)), (3, (3,))]


def test_what_it_cannot_compute_is_refused():
    query = torch.randn(1, 1, 3, 4)
    with pytest.raises(RuntimeError, match="attending"):
        attention(None, query, query, query, None)
    for option in ({"softcap": 30.0}, {"s_aux": torch.zeros(1)}):
        with pytest.raises(NotImplementedError, match="bounds its scores or has attention sinks"):
            attention(None, query, query, query, None, **option)


def tiny(family: str):
    """A random text model of a real architecture."""
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if family == "Qwen2 with a sliding window":
        sizes |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = {
        "Qwen2": transformers.Qwen2Config,
        "Qwen2 with a sliding window": transformers.Qwen2Config,
        "Qwen3": transformers.Qwen3Config,
        "Llama": transformers.LlamaConfig,
    }[family](**sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("family", ["Qwen2", "Qwen2 with a sliding window", "Qwen3", "Llama"])
def test_a_models_output_is_that_of_each_sequence_alone(family):
    model = tiny(family)
    families = families_of([(7, [3, 9, 1]), (4, [5]), (12, [2, 2])])
    tokens = torch.randint(0, 50, (sum(f.tokens for f in families),), generator=torch.Generator().manual_seed(1))
    whole = sequences(families)
    with torch.no_grad():
        expected = [model(input_ids=tokens[places][None]).logits[0] for places in whole]
        share_prompts(model)
        positions = torch.empty_like(tokens)
        for places in whole:
            positions[places] = torch.arange(len(places))
        layout = Layout(families, CPU)
        with attending(layout):
            packed = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0]
    assert layout.calls == 2
    for places, alone in zip(whole, expected, strict=True):
        torch.testing.assert_close(packed[places], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "shared", "possible"),
    [(4, 2, [1, 2, 4]), (4, 1, [1, 2, 4]), (28, 4, [1, 2, 4, 28]), (12, 3, [1, 3, 6, 12]), (6, 6, [1, 2, 3, 6])],
)
def test_heads_are_dealt_out_evenly_or_not_at_all(heads, shared, possible):
    from transformers import Qwen2_5_VLConfig, Qwen2Config

    text = {"num_attention_heads": heads, "num_key_value_heads": shared}
    for config in (Qwen2Config(**text), Qwen2_5_VLConfig(text_config=text)):
        for ranks in range(1, 30):
            if ranks in possible:
                check_sequence_parallel(config, ranks)
                continue
            with pytest.raises(
                ValueError, match=rf"size={ranks} does not fit .* {heads} attention heads and {shared} of"
            ):
                check_sequence_parallel(config, ranks)


def test_inputs_that_sequence_parallelism_does_not_know_are_refused():
    model = tiny("Qwen2")
    share_prompts(model)
    families = families_of([(3, [2])])
    tokens = torch.arange(5)[None]
    layout = Layout(families, CPU, Group(2, 0))
    with attending(layout), pytest.raises(NotImplementedError, match="Qwen2Model is given cache_position"):
        model(input_ids=tokens, position_ids=tokens, use_cache=False, cache_position=tokens[0])
    with attending(layout), pytest.raises(NotImplementedError, match="input 0 without a name"):
        model.model(tokens)


def test_layers_of_another_kind_are_refused():
    model = tiny("Qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(NotImplementedError, match="linear_attention"):
        share_prompts(model)
    assert model.config._attn_implementation != ATTENTION
