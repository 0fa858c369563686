# SPDX-License-Identifier: Apache-2.0
"""The figures of each benchmark and the statistics, against numbers that were worked out by hand or elsewhere."""

import numpy as np
import pytest

from verl_gndpo.evaluation import breakdowns, certainty
from verl_gndpo.evaluation.breakdowns import Problem, figures_of, group_of


def column(*values):
    return np.array(values, dtype=float)[:, None]


def named(problems, acc):
    return {(f.breakdown, f.name): (round(f.value, 6), f.count) for f in figures_of(problems, acc)}


def we_math(number, right):
    """Rows of one question: `right` has one entry for each step, then one for the whole."""
    steps = len(right) - 1
    keys = [f"{steps}steps_{i}" for i in range(1, steps + 1)] + [f"{steps}steps_multi"]
    return [
        (Problem(breakdowns.WE_MATH, f"wemath-testmini-{steps}steps_{number}-{key}", "testmini", {"key": key}), hit)
        for key, hit in zip(keys, right, strict=True)
    ]


def test_we_math_categories():
    """Ten questions: 3 insufficient, 1 inadequate, 4 mastered, 1 with one step of two right, 1 by rote."""
    rights = [(0, 0, 0), (1, 0, 0), (0, 1, 1, 0), (1, 1, 0), *[(1, 1, 1)] * 3, (1, 1, 1, 1), (0, 1, 1), (0, 0, 0, 1)]
    rows = [row for number, right in enumerate(rights) for row in we_math(number, right)]
    rows += we_math(99, (1, 1, 1))[:2]  # without its whole: it counts for no category
    found = named([problem for problem, _ in rows], column(*(hit for _, hit in rows)))
    assert found["categories", "insufficient knowledge"] == (0.3, 10)
    assert found["categories", "inadequate generalisation"] == (0.1, 10)
    assert found["categories", "complete mastery (strict)"] == (0.4, 10)
    assert found["categories", "complete mastery (loose)"] == (0.5, 10)
    assert found["categories", "rote memorisation (strict)"] == (round(2 / 6, 6), 6)
    assert found["categories", "rote memorisation (loose)"] == (round(1 / 6, 6), 6)
    assert found["steps", "1-step questions (S1)"] == (round(17 / 25, 6), 25)
    assert found["steps", "2-step questions (S2)"] == (round(4 / 7, 6), 7)
    assert found["steps", "3-step questions (S3)"] == (round(2 / 3, 6), 3)
    assert found["", "score (strict)"] == (round(1 - 0.05 - 0.2 - 0.3, 6), 10)
    assert found["", "score (loose)"] == (round(1 - 0.05 - 0.1 - 0.3, 6), 10)


def test_dynamath_worst_case():
    hits = {"7": (1, 1, 1), "8": (1, 0, 1), "9": (0, 0, 0)}
    rows = [
        (Problem(breakdowns.DYNAMATH, f"dynamath-sample_variant{v}-{i}", f"sample_variant{v}", {}), hit)
        for i, right in hits.items()
        for v, hit in enumerate(right, 1)
    ]
    rows.append((Problem(breakdowns.DYNAMATH, "dynamath-sample_variant1-10", "sample_variant1", {}), 1))
    found = named([problem for problem, _ in rows], column(*(hit for _, hit in rows)))
    assert found["", "average case"] == (0.6, 10)
    assert found["", "worst case of 3 variant(s)"] == (round(1 / 3, 6), 3)
    assert group_of(rows[0][0]) == group_of(rows[1][0]) == "7"


@pytest.mark.parametrize(
    "source, breakdown, field, values",
    [
        (breakdowns.MATHVISTA, "task", "task", ("figure question answering", "math word problem")),
        (breakdowns.MATHVISTA, "context", "context", ("bar chart", "table")),
        (breakdowns.MATHVERSE, "version", "problem_version", ("Text Dominant", "Vision Only")),
        (breakdowns.MATH_VISION, "subject", "subject", ("algebra", "topology")),
        (breakdowns.MATH_VISION, "level", "level", (1, 5)),
        (breakdowns.LOGIC_VISTA, "skill", "skill", (["deductive"], "['spatial']")),
        (breakdowns.MMK12, "subject", "subject", ("math", "physics")),
    ],
)
def test_shares_by_a_field(source, breakdown, field, values):
    problems = [Problem(source, str(i), "test", {field: values[i % 2]}) for i in range(6)]
    first, second = (breakdowns._entries(value)[0] for value in values)
    found = named(problems, column(1, 0, 1, 0, 0, 1))
    assert found[breakdown, first] == (round(2 / 3, 6), 3)
    assert found[breakdown, second] == (round(1 / 3, 6), 3)


def test_a_problem_with_two_skills_counts_for_both():
    problems = [
        Problem(breakdowns.LOGIC_VISTA, "a", "test", {"skill": ["deductive", "numerical"]}),
        Problem(breakdowns.LOGIC_VISTA, "b", "test", {"skill": "['deductive']"}),
    ]
    assert named(problems, column(1, 0)) == {("skill", "deductive"): (0.5, 2), ("skill", "numerical"): (1.0, 1)}


def test_a_row_of_another_program_has_no_breakdowns():
    problem = breakdowns.problem_of({"data_source": "mine", "extra_info": {"index": 3, "meta": "{broken"}})
    assert (problem.id, problem.meta, figures_of([problem], column(1))) == ("3", {}, [])


def test_wilson_interval():
    """81 of 263: a worked example of Newcombe (1998), table I."""
    found = certainty.wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert certainty.wilson(0, 10).low == 0 and certainty.wilson(10, 10).high == 1


def test_mcnemar_is_the_binomial_test():
    assert certainty.mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert certainty.mcnemar(0, 0) == certainty.mcnemar(5, 5) == 1.0
    assert certainty.mcnemar(0, 5000) == pytest.approx(0)


def test_holm():
    """The example of Holm's procedure with four tests: 0.01, 0.04, 0.03, 0.005."""
    assert certainty.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_pass_at_k_is_the_mean_over_all_subsets():
    from itertools import combinations

    acc = np.random.default_rng(0).integers(0, 2, (7, 6)).astype(float)
    for k in range(1, 7):
        subsets = [acc[:, list(chosen)].max(axis=1).mean() for chosen in combinations(range(6), k)]
        assert certainty.pass_at_k(acc, k) == pytest.approx(np.mean(subsets))
    assert certainty.pass_at_k(acc, 1) == pytest.approx(acc.mean())
    with pytest.raises(ValueError, match="pass@7"):
        certainty.pass_at_k(acc, 7)


@pytest.mark.parametrize("answers", [1, 4])
def test_two_seeds_of_one_model_are_not_called_different(answers):
    """Of 300 pairs of seeds, at most so many are called different at 5 % as chance allows; a better model is."""
    rng = np.random.default_rng(1)
    skill = rng.beta(1, 1, (200, 1))
    draw = lambda level: (rng.random((200, answers)) < level).astype(float)  # noqa: E731
    p_values = [_p(draw(skill), draw(skill)) for _ in range(300)]
    # 5 % of 300 is 15, its standard deviation 3.8.
    assert sum(p < 0.05 for p in p_values) <= 27
    better = [_p(draw(skill), draw(np.minimum(skill + 0.25, 1))) for _ in range(20)]
    assert sum(p < 0.05 for p in better) >= 18


def _p(a, b):
    change = b.mean(axis=1) - a.mean(axis=1)
    if a.shape[1] == 1:
        return certainty.mcnemar(int((change < 0).sum()), int((change > 0).sum()))
    return certainty._sign_flip(change, 0)


def test_the_interval_of_a_difference_covers_it():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(100):
        skill = rng.beta(2, 2, (150, 1))
        a, b = ((rng.random((150, 2)) < level).astype(float) for level in (skill * 0.8, skill))
        found = certainty.compare(a, b, seed=trial).interval
        covered += found.low <= 0.1 <= found.high
    assert 88 <= covered <= 100


def test_related_problems_make_an_interval_wider():
    """Ten variants with equal answers are worth one problem."""
    acc = np.repeat(np.random.default_rng(3).integers(0, 2, (30, 1)), 10, axis=0).astype(float)
    groups = [row // 10 for row in range(300)]
    apart, together = certainty.accuracy(acc), certainty.accuracy(acc, groups)
    assert together.high - together.low > 2.5 * (apart.high - apart.low)
    assert apart.value == together.value
