# SPDX-License-Identifier: Apache-2.0
"""Test which ground truths count as unmatchable."""

import pytest

from verl_gndpo.conversion.matchable import is_matchable, natural_forms
from verl_gndpo.conversion.text import plain_choices

MATCHABLE = [
    ("5", "math"),
    ("20{}^\\circ", "math"),
    ("{{8}^{\\circ }}", "math"),
    ("70$textdegree$", "math"),
    ("$$7$$ $$10$$", "list"),
    ("(1)$$0.04$$ (2)$$440$$", "list"),
    ("1.3.4.5", "math"),
    ("$$\\dfrac{35}{4}$$(or fill in $$8.75$$)", "math"),
    ("$\\frac{\\sqrt{2\\pi }+2}{\\pi -2}$", "math"),
    ("Yes", "math"),
    ("B", "choice"),
    ("y=2x+1", "math"),
    ("12 cm", "number"),
    ("rectangle\nsquare\ncircle\ntriangle\nrectangle\ncircle\ntriangle", "list"),
    ("\\begin{cases}x=1\\\\y=2\\end{cases}", "math"),
    ("\\therefore 5", "math"),
    ("45^{o}", "math"),
    ("50&deg;", "math"),
    ("x&lt;3", "math"),
    ("\\left( 3,4 \\right)", "math"),
    ("-\\dfrac{\\sqrt{3}}{2}", "math"),
    ("12\\%", "number"),
]
UNMATCHABLE = [
    ("Because AB is parallel to CD, the alternate angles are equal, so that the triangles are congruent.", "math"),
    (
        "\u2235 the two angles are equal, \u2234 the lines are parallel; the quadrilateral must be a square",
        "math",
    ),
    ("x" * 101, "math"),
    # A grader accepts these to the letter, but no model writes them.
    ("5\\unknowncmd", "math"),
    ("$$\\unknown{3}$$", "math"),
    ("{8", "math"),
    ("\\frac{1}{2", "math"),
    ("\\begin{cases}x=1", "math"),
    ("see the solution", "math"),
    ("Omitted.", "math"),
    ("略", "text"),
    ("<p>5</p>", "text"),
    ("\n".join("abcdefghijklm"), "list"),
    ("$$\\unknown$$ see the figure of the solution below for this", "number"),
]


@pytest.mark.parametrize(("truth", "kind"), MATCHABLE)
def test_matchable(truth, kind):
    assert is_matchable(truth, kind, [])


@pytest.mark.parametrize(("truth", "kind"), UNMATCHABLE)
def test_unmatchable(truth, kind):
    assert not is_matchable(truth, kind, [])


def test_a_choice_counts_by_letter_and_text():
    assert is_matchable("B", "choice", ["5", "6"])
    assert is_matchable("6", "choice", ["5", "6"])
    assert not is_matchable("7", "choice", ["5", "6"])


def test_forms_are_what_a_model_would_write():
    assert list(natural_forms("$$\\frac{1}{4}{}^\\circ$$", []))[:3] == ["1/4", "0.25", "1/4\u00b0"]


def test_choices_may_be_numbers():
    assert plain_choices((1, 2.5, "B. 3")) == ("1", "2.5", "B. 3")
