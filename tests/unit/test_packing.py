# SPDX-License-Identifier: Apache-2.0
"""Rows grouped by prompt, groups packed into micro-batches, and where each token of a micro-batch stands."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.packed import SHAPES, RanksOfRow, groups_of, sequences
from verl_gndpo.teacher.packing import Layout, PromptGroup, alike, concatenate, group_by_prompt, pack

CPU = torch.device("cpu")


@given(SHAPES)
@settings(max_examples=100, deadline=None)
def test_the_place_before_each_response_token_predicts_it(shapes):
    groups = groups_of(shapes)
    lengths = [response for group in groups for response in group.responses]
    expected = [
        places[position - 1]
        for places, response in zip(sequences(groups), lengths, strict=True)
        for position in range(len(places) - response, len(places))
    ]
    assert Layout(groups, CPU).predicting.tolist() == expected


@given(SHAPES, st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_ranks_that_share_a_row_predict_each_response_token_once(shapes, ranks):
    groups = groups_of(shapes)
    predicting = Layout(groups, CPU).predicting
    layouts = [Layout(groups, CPU, RanksOfRow(ranks, rank)) for rank in range(ranks)]
    length = -(-sum(group.tokens for group in groups) // ranks)
    assert [(x.part.start, x.part.stop) for x in layouts] == [(r * length, r * length + length) for r in range(ranks)]
    here, places = zip(*(layout.predicted_here() for layout in layouts), strict=True)
    assert sorted(torch.cat(here).tolist()) == list(range(len(predicting)))
    for layout, tokens, within in zip(layouts, here, places, strict=True):
        assert torch.equal(predicting[tokens], within + layout.part.start)
        assert ((within >= 0) & (within < length)).all()


@given(SHAPES, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_packing_keeps_every_response_once_and_the_limit_where_it_can(shapes, limit):
    groups = groups_of(shapes)
    batches = pack(groups, limit)
    packed = sorted(row for batch in batches for part in batch for row in part.rows)
    assert packed == sorted(row for group in groups for row in group.rows)
    responses = {row: n for group in groups for row, n in zip(group.rows, group.responses, strict=True)}
    prompts = {row: group.prompt for group in groups for row in group.rows}
    for batch in batches:
        for part in batch:
            assert part.responses == tuple(responses[row] for row in part.rows)
            assert {prompts[row] for row in part.rows} == {part.prompt}
        # Only a single sequence may exceed the limit, alone.
        assert sum(part.tokens for part in batch) <= limit or [len(part.rows) for part in batch] == [1]


def test_a_group_that_fits_stays_together():
    groups = groups_of([(10, [5] * 4), (10, [5] * 4)])
    assert pack(groups, 60) == [groups]
    assert [len(batch) for batch in pack(groups, 30)] == [1, 1]


@given(SHAPES)
@settings(max_examples=50, deadline=None)
def test_values_are_laid_out_with_each_prompt_once(shapes):
    groups = groups_of(shapes)
    places = sequences(groups)
    row = torch.arange(sum(group.tokens for group in groups))
    # On one axis, and on several.
    assert torch.equal(concatenate(groups, [row[own] for own in places]), row)
    both = torch.stack([row, -row])
    assert torch.equal(concatenate(groups, [both[:, own] for own in places]), both)


def test_rows_are_one_group_only_with_the_same_words_positions_and_pictures():
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
    groups = group_by_prompt(ids, positions, [1] * len(rows), [images for _, _, images in rows])
    assert [group.rows for group in groups] == [(0, 5), (1,), (2,), (3,), (4,)]
    assert groups[0] == PromptGroup((0, 5), 5, (1, 1))


def test_rows_with_images_in_their_responses_share_no_prompt():
    ids, positions = [torch.arange(6)] * 4, [torch.arange(6)] * 4
    groups = group_by_prompt(ids, positions, [2] * 4, [{}] * 4, alone={1, 2})
    assert [group.rows for group in groups] == [(0, 3), (1,), (2,)]


def test_the_same_ids_split_elsewhere_are_another_prompt():
    ids = [torch.arange(6), torch.arange(6)]
    positions = [torch.arange(6), torch.arange(6)]
    groups = group_by_prompt(ids, positions, [2, 3], [{}, {}])
    assert [(group.prompt, group.responses) for group in groups] == [(4, (2,)), (3, (3,))]


def pairs(tokens: int, before: int) -> int:
    """Count what each token attends to, one by one."""
    return sum(range(before + 1, before + tokens + 1))


@given(st.lists(st.integers(0, 20000), min_size=1, max_size=40), st.sampled_from([0, 1, 600, 8192]))
@settings(deadline=None)
def test_responses_attend_with_others_of_similar_length(lengths, prompt):
    """At most 1.15 times the attention that is needed, for every mixture of lengths, and of the tokens."""
    groups = alike(lengths, prompt)
    assert sorted(member for group in groups for member in group) == list(range(len(lengths)))
    longest = [max(lengths[member] for member in group) for group in groups]
    padded = sum(len(group) * pairs(most, prompt) for group, most in zip(groups, longest, strict=True))
    assert padded <= 1.15 * sum(pairs(length, prompt) for length in lengths)
    assert sum(len(group) * most for group, most in zip(groups, longest, strict=True)) <= 1.15 * sum(lengths)


def test_one_long_response_attends_alone_and_equal_ones_together():
    assert alike([500] * 15 + [16368], 600) == [[15], list(range(15))]
    assert alike([700] * 16, 600) == [list(range(16))]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 40), st.integers(50, 100))
@settings(deadline=None)
def test_a_prompt_runs_as_seldom_as_first_fit_allows(responses, prompt, limit):
    """Two parts of a group would not fit into one, so that no more than half of each is wasted."""
    parts = [
        part
        for batch in pack([PromptGroup(tuple(range(len(responses))), prompt, tuple(responses))], limit)
        for part in batch
    ]
    sizes = sorted(sum(part.responses) for part in parts)
    assert len(sizes) < 2 or prompt + sizes[0] + sizes[1] > limit
