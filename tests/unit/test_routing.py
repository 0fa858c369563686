# SPDX-License-Identifier: Apache-2.0
"""Which teacher scores which sample, with what weight, and on which rank."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.settings import teacher_config
from verl_gndpo.teacher.client import prompt_of
from verl_gndpo.teacher.routing import NoTeacherError, Routing, place_rows


def routing(**models) -> Routing:
    return Routing(teacher_config(models={name: {"path": name, **m} for name, m in models.items()}))


def test_a_single_teacher_scores_everything_and_needs_no_column():
    single = Routing(teacher_config())
    assert single.column is None
    assert single.route("whatever").weights == (("teacher", 1.0),)


def test_a_teachers_name_is_its_key_unless_it_has_others():
    several = routing(geo={}, maths={"keys": ["mmk12", "virl"]})
    assert several.column == "data_source"
    assert several.keys == ["geo", "mmk12", "virl"]
    assert [several.route(key).label for key in ("geo", "mmk12", "virl")] == ["geo", "maths", "maths"]


def test_teachers_of_one_sample_share_it_by_weight():
    several = routing(one={"keys": ["a"], "weight": 1}, all={"keys": ["*"], "weight": 3})
    assert several.route("a").weights == (("one", 0.25), ("all", 0.75))
    assert several.route("a").label == "one+all"
    assert several.route("b").weights == (("all", 1.0),)


def test_a_key_may_be_a_number_in_the_data():
    assert routing(x={"keys": ["7"]}).route(7).label == "x"


def test_a_sample_without_a_teacher_is_an_error_that_names_its_key_and_the_known_ones():
    with pytest.raises(NoTeacherError, match=r"no teacher for data_source=c; teacher\.models\.<name>\.keys has a, b"):
        routing(a={}, b={}).route("c")


def test_teachers_that_all_score_everything_need_no_column():
    assert routing(one={"keys": ["*"]}, two={"keys": ["*"]}).column is None


def parts(order: list[int], ranks: int) -> list[list[int]]:
    """As verl's dispatch cuts a batch: the first parts longer by one where it doesn't divide."""
    sizes = [len(order) // ranks + (rank < len(order) % ranks) for rank in range(ranks)]
    return [order[sum(sizes[:rank]) : sum(sizes[: rank + 1])] for rank in range(ranks)]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from("ab")), min_size=1, max_size=12),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_every_row_is_placed_once_and_no_prompt_on_more_ranks_than_it_must(prompts, ranks, random):
    rows = [(prompt, route) for prompt, (n, route) in enumerate(prompts) for _ in range(n)]
    random.shuffle(rows)
    tokens = [random.randint(1, 100) for _ in rows]
    order = place_rows([prompt for prompt, _ in rows], [route for _, route in rows], tokens, ranks)
    assert sorted(order) == list(range(len(rows)))
    if len({n for n, _ in prompts}) == 1 and len(prompts) % ranks == 0:
        held = [{rows[row][0] for row in part} for part in parts(order, ranks)]
        assert sum(map(len, held)) == len(prompts), "equal prompts that can be dealt out whole are"


def test_the_work_of_each_teacher_is_balanced_by_itself():
    # Two teachers, four prompts each with 2 rows; those of one teacher are ten times as long.
    prompts = [prompt for prompt in range(8) for _ in range(2)]
    routes = ["long" if prompt < 4 else "short" for prompt in prompts]
    tokens = [100 if route == "long" else 10 for route in routes]
    for part in parts(place_rows(prompts, routes, tokens, 4), 4):
        assert Counter(routes[row] for row in part) == {"long": 2, "short": 2}


def test_long_prompts_do_not_meet_on_one_rank():
    tokens = [9, 9, 8, 8, 1, 1, 2, 2]
    order = place_rows([0, 0, 1, 1, 2, 2, 3, 3], ["a"] * 8, tokens, 2)
    assert [sum(tokens[row] for row in part) for part in parts(order, 2)] == [20, 20]


def test_a_rows_prompt_may_have_underscores():
    assert prompt_of("data_7_3_0") == "data_7"
