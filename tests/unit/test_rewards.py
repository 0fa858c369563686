# SPDX-License-Identifier: Apache-2.0
"""Test what verl_gndpo.rewards grades right and wrong: one case for each trap, and every answer of the real sets."""

import asyncio
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.reward_score import geo3k as verl_geo3k

from verl_gndpo.rewards import compute_score
from verl_gndpo.rewards.answer_types import ANSWER_TYPE_OF_SOURCE, ANSWER_TYPES
from verl_gndpo.rewards.extract import answers_of, well_formed
from verl_gndpo.rewards.graders import GRADERS, grade

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"

NUMBERS_RIGHT = [
    ("12", "12.0"),
    ("12.0", "12"),
    ("1,234", "1234"),
    ("1\\,234", "1234"),
    ("1{,}234", "1234"),
    ("12 cm", "12"),
    ("12", "12 cm"),
    ("12cm", "12\\text{ cm}"),
    ("12\\mathrm{~cm}", "12 centimeters"),
    ("5m", "5"),
    ("25°.", "25"),
    ("25^\\circ", "25^{\\circ}"),
    ("25 degrees", "25°"),
    ("25\\degree", "25"),
    ("3 \\mathrm{~m}^{3}", "3 m³"),
    ("3 cubic meters", "3 m^3"),
    ("3 square cm", "3\\text{ cm}^2"),
    ("60 km/h", "60 km per hour"),
    ("5 m/s", "5 m s^{-1}"),
    ("$5", "5"),
    ("\\$1,350", "1350 dollars"),
    ("50%", "50"),
    ("50\\%", "0.5"),
    ("0.5", "50%"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("x \\approx 5.2", "5.2"),
    ("\\frac{7}{4}", "1.75"),
    ("7/4", "=\\frac{7}{4}"),
    ("\\dfrac74", "7/4"),
    ("\\frac {7} {4}", "\\tfrac{7}{4}"),
    ("4 \\frac { 4 } { 11 }", "48/11"),
    ("4 4/11", "48/11"),
    ("3½", "3.5"),
    ("-2\\frac{1}{2}", "-2.5"),
    ("3\\times 10^{5}", "300000"),
    ("3e5", "300000"),
    ("1.5 \\cdot 10^{-3}", "0.0015"),
    ("3×10⁵", "300000"),
    ("-51", "−51"),
    (".5", "0.5"),
    ("2^{10}", "1024"),
    ("5\\sqrt{3}", "8.66"),
    ("2\\pi", "6.283"),
    ("9.2736", "9.3"),
    ("169.6", "169.6087"),
    ("\\boxed{5}", "5"),
    ("24 units", "24"),
    ("5 times", "5"),
    ("360 sets", "360"),
    ("217 ^\\circ T", "217"),
    # What is counted, scales and directions.
    ("7 million", "7,000,000"),
    ("7,000,000", "7 million"),
    ("3 apples", "3 apple"),
    ("3 boxes", "3 box"),
    ("3 apples", "3"),
    ("3", "3 apples"),
    ("3 m east", "3 m"),
    ("40° N", "40°"),
    ("3 quarters", "3/4"),
    ("24 units", "24 cm"),
]
NUMBERS_WRONG = [
    ("120", "12"),
    ("12", "120"),
    ("1.2", "12"),
    ("-12", "12"),
    ("12 cm", "12 m"),
    ("12 cm^2", "12 cm^3"),
    ("2017", "2016"),
    ("2017", "2016.0"),
    ("97.05", "97"),
    ("9.4", "9.3"),
    ("0.54", "0.5"),
    ("44/11", "4 4/11"),
    ("1 2", "12"),
    ("12, 13", "12"),
    ("12 or 13", "12"),
    ("5x", "5"),
    ("", "5"),
    ("nan", "5"),
    ("inf", "5"),
    ("5/0", "5"),
    ("0.67", "\\frac{2}{3}"),
    ("five", "5"),
    ("1:2:4", "1:8"),
    ("\\sqrt{-4}", "2"),
    ("500%", "0.5"),
    ("30", "30 + x"),
    # What is counted, scales and directions.
    ("7 million", "7"),
    ("3 million", "3 billion"),
    ("7 thousand", "7"),
    ("2 kPa", "2 Pa"),
    ("2 micrometers", "2 km"),
    ("2 tons", "2 kg"),
    ("2 acres", "2 m^2"),
    ("2 °F", "2 °C"),
    ("3 m east", "3 m west"),
    ("40° N", "40° S"),
    ("3 boys", "3 girls"),
    ("7 squared", "7"),
    ("3 quarters", "3"),
    ("5 wrong", "5"),
    ("5 nor six", "5"),
]
MATH_RIGHT = [
    ("\\frac{y^2}{9}-\\frac{(x+1)^2}{9}=1", "y^2-(x+1)^2=9"),
    ("1633.63", "Volume $=1633.63 \\mathrm{~m}^{3}$"),
    ("1633.6 m³", "Volume $=1633.63 \\mathrm{~m}^{3}$"),
    ("1.75", "=\\frac{7}{4}"),
    ("(a^2+3b^2)^{1/2}", "$$\\sqrt{a^{2}+3b^{2}}$$"),
    ("√(a²+3b²)", "$$\\sqrt{a^{2}+3b^{2}}$$"),
    ("(7,3)", "(7, 3)"),
    ("\\left(7, 3\\right)", "(7, 3)"),
    ("(14/2, 3)", "(7, 3)"),
    ("AD and BE", "A D and B E"),
    ("BE, AD", "A D and B E"),
    ("\\overline{AD} \\text{ and } \\overline{EB}", "A D and B E"),
    ("2, 3, 6, 7", "angles 2,3, 6, and 7"),
    ("\\angle 2, \\angle 3, \\angle 6, \\angle 7", "angles 2,3, 6, and 7"),
    ("1+2n", "2n+1."),
    ("2*n+1", "2n+1"),
    ("n/(n+1)", "$\\frac{n}{n+1}$"),
    ("1-\\frac{1}{n+1}", "$\\frac{n}{n+1}$"),
    ("2/3", "$\\frac{\\text{2}}{\\text{3}}$"),
    ("24", "$$\\number{24} $$"),
    ("1/\\sqrt{3}", "$$1:\\sqrt{3}$$"),
    ("2:4", "1:2"),
    ("sqrt(2)-1", "$$\\sqrt{2}-1$$"),
    ("\\sqrt{12}", "2√3"),
    ("\\sqrt{84}\\cdot 2", "\\sqrt { 336 }"),
    ("6\\sqrt{2}", "6 \\sqrt 2"),
    ("4+\\ln x", "$g(x)=\\ln x+4$"),
    ("g(x)=4+\\ln(x)", "$g(x)=\\ln x+4$"),
    ("-2\\sin(\\frac{\\pi}{6}-2x)", "$2\\sin (2x-\\frac{\\pi }{6})$"),
    ("\\frac{25x+35}{2x+3}", "\\frac{5\\left(5x+7\\right)}{2x+3} units"),
    ("1, 10.5", "1;10.5"),
    ("6, 6", "6\n6"),
    ("120; 70; 12; 6", "120\n70\n12\n6"),
    ("2; 0<x<1 or x<-\\sqrt{2}", "2;\nx<−√2 or 0<x<1."),
    ("(-\\infty,-\\sqrt{2})\\cup(0,1)", "x<−√2 or 0<x<1."),
    ("-2<x\\le 1", "(-2,1]"),
    ("(-2,1]", "-2 < x ≤ 1"),
    ("x>-\\sqrt{2}", "-\\sqrt{2}<x"),
    ("\\{2,1\\}", "\\{1,2\\}"),
    ("3, -3", "\\pm 3"),
    ("x=3 or x=-3", "x=-3, x=3"),
    ("yes", "Yes"),
    ("64 degrees", "64°"),
    ("315^\\circ", "315^\\circT"),
    ("347.4248\\pi", "Area $=347.4248 \\pi \\mathrm{cm}^{2}$"),
    ("1091.5", "Area $=347.4248 \\pi \\mathrm{cm}^{2}$"),
    ("\\sin 30^\\circ", "\\frac{1}{2}"),
    ("10\\sin 40°", "6.43"),
    ("\\log_2 8", "3"),
    ("5!", "120"),
    ("\\binom{5}{2}", "10"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x**2+1", "x^2+1"),
    ("x₁+x₂", "x_1+x_2"),
    ("\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("\\vec{b}+\\frac{\\vec{a}}{2}", "\\frac{1}{2}\\vec{a}+\\vec{b}"),
    ("4.4 metres", "4.4 m"),
    ("y-2x=1", "y=2x+1"),
    ("180^\\circ-\\alpha", "180-\\alpha"),
    ("2k\\pi", "2\\pi k"),
    ("AB = 5", "5"),
    ("sin(x)", "\\sin x"),
    ("\\frac12x", "x/2"),
    ("k=\\pm2", "k=2 or k=-2"),
    ("x\\in(-2,1]", "(-2,1]"),
    ("2sin(x)cos(x)", "\\sin 2x"),
    ("1:2:3", "1 : 2 : 3"),
    ("x = 2 + 3 = 5", "5"),
    ("5m", "5"),
    ("x_1=1, x_2=3", "3, 1"),
    ("(2)(3)", "6"),
    ("\\sin x", "\\sin(x)"),
    # Names tell values apart.
    ("AB=AC", "AC=AB"),
    ("AB=6, AC=5", "AC=5, BA=6"),
    ("2,3", "x=2,y=3"),
    ("y=3,x=2", "x=2,y=3"),
    ("-3, 3", "x=3, x=-3"),
    ("\\angle 1=\\angle 2", "∠2=∠1"),
    ("AD=DE", "AD=ED"),
    # Primes and repeating decimals.
    ("0.\\overline{3}", "1/3"),
    ("0.\\dot{3}", "1/3"),
    ("0.1\\overline{6}", "1/6"),
    ("0.\\dot{1}\\dot{2}", "12/99"),
    ("A^{\\prime}", "A'"),
    ("f'(x)=2x", "2x"),
    # Circled numbers.
    ("①、②、④", "①②④"),
    ("①, ②, ④", "①②④"),
    ("1,2,4", "①②④"),
    ("(1)(2)(4)", "①②④"),
    ("①④②", "①②④"),
    ("①②④", "1,2,4"),
    ("3", "③"),
    # A triangle's mark.
    ("\\triangle ABC", "ABC"),
    ("ABC", "\\triangle ABC"),
    # Capital and small letters.
    ("Yes", "yes"),
    ("NO", "No"),
    ("LH", "HL"),
    ("right trapezoid", "Right Trapezoid"),
    # Other dress.
    ("2\\sqrt{5} \\approx 4.47", "2\\sqrt{5}"),
    ("2\\sqrt{5}", "2\\sqrt{5} \\approx 4.47"),
    ("4.47", "2\\sqrt{5}≈4.47"),
    ("\\frac{2}{3}≈0.67", "2/3"),
    ("x=1,y=2", "\\begin{cases}x=1\\\\y=2\\end{cases}"),
    ("\\begin{cases}x=1\\\\ y=2\\end{cases}", "x=1,y=2"),
    ("\\left\\{\\begin{array}{l}x=1\\\\ y=2\\end{array}\\right.", "x=1,y=2"),
    ("10", "10m"),
    ("10m", "10"),
    ("\\pm 5", "5 or -5"),
    ("5 or -5", "\\pm 5"),
    ("5, -5", "x=\\pm 5"),
    ("1\\pm\\sqrt{2}", "1+\\sqrt{2}, 1-\\sqrt{2}"),
    ("AB:CD=2:3", "2:3"),
    ("2:3", "AB:CD=2:3"),
    ("4:6", "AB:CD=2:3"),
    ("x≤-1或x≥2", "x \\le -1 or x \\ge 2"),
    ("k>1且k≠2", "k>1 and k \\ne 2"),
    ("A(2,3)", "(2,3)"),
    ("(2,3)", "A(2,3)"),
    ("12元", "12"),
    ("12", "12元"),
    ("40度", "40°"),
    ("40°", "40度"),
    ("12平方厘米", "12 cm^2"),
    ("\\textcolor{red}{5}", "5"),
    ("\\textcolor{red}{\\frac{1}{2}}", "\\frac12"),
    ("{\\rm 5cm}", "5 cm"),
    ("5{\\rm cm}", "5 cm"),
    ("\\underline{5}", "5"),
    ("5\u200b", "5"),
    ("5", "5\u200b"),
    ("1", "\ufeff1"),
    ("1:2:3", "2:4:6"),
    ("1:\\sqrt{3}:2", "2:2\\sqrt{3}:4"),
    ("AB∥CD", "AB \\parallel CD"),
    ("B", "(B)"),
    ("b", "(B)"),
    ("B", "B. 2"),
    ("(B)", "B. 2"),
]
MATH_WRONG = [
    ("\\frac{x^2}{9}+\\frac{y^2}{81}=1", "\\frac{x^2}{81}+\\frac{y^2}{9}=1"),
    ("(3, 7)", "(7, 3)"),
    ("[-2,1)", "(-2,1]"),
    ("(-2,1)", "(-2,1]"),
    ("AD and BC", "A D and B E"),
    ("AD", "A D and B E"),
    ("ABDC", "ABCD"),
    ("CAB", "ABC"),
    ("2, 3, 6", "angles 2,3, 6, and 7"),
    ("10.5, 1", "1;10.5"),
    ("2n-1", "2n+1"),
    ("2n", "2n+1"),
    ("2", "2n+1"),
    ("2ab", "2"),
    ("x=5", "y=5"),
    ("\\overrightarrow{BA}", "\\overrightarrow{AB}"),
    ("x>3", "x<3"),
    ("x\\ge 3", "x>3"),
    ("8", "3 5"),
    ("x_1", "x_2"),
    ("\\beta", "\\alpha"),
    ("no", "Yes"),
    ("Yse", "Yes"),
    ("a^2", "2a"),
    ("x^{12}", "x^{1}2"),
    ("\\frac{1}{3}", "3"),
    ("\\frac{1}{23}", "\\frac{12}{3}"),
    ("3, 3", "3"),
    ("3, -3", "3"),
    ("5, 6", "5, 7"),
    ("5, 5", "5, 6"),
    ("\\{1,2,3\\}", "\\{1,2\\}"),
    ("x+1 foo bar 7", "7"),
    ("the length is 7 because 3+4", "7"),
    ("2\\sin (2x+\\frac{\\pi }{6})", "$2\\sin (2x-\\frac{\\pi }{6})$"),
    ("4-\\ln x", "$g(x)=\\ln x+4$"),
    ("3.14", "3"),
    ("", "x"),
    ("{}", "x"),
    ("$$", "5"),
    ("rectangle\nsquare", "square\nrectangle"),
    ("__import__('os').system('true')", "0"),
    # Names tell values apart.
    ("AB=6, AC=5", "AB=5, AC=6"),
    ("\\alpha=60^\\circ, \\beta=30^\\circ", "\\alpha=30^\\circ, \\beta=60^\\circ"),
    ("\\angle A=60°, \\angle B=30°", "\\angle A=30°, \\angle B=60°"),
    ("AC=DF", "AB=DF"),
    ("BC=EF", "AC=EF"),
    ("∠1=∠2", "∠1=∠3"),
    ("\\angle ABC=\\angle DEF", "\\angle BAC=\\angle DEF"),
    ("3,2", "x=2,y=3"),
    ("length=6, width=5", "length=5, width=6"),
    ("AB \\parallel CD", "AC \\parallel BD"),
    ("AB \\parallel CD", "AB \\perp CD"),
    # Primes and repeating decimals.
    ("A'", "A"),
    ("AB'", "AB"),
    ("A'B", "AB'"),
    ("\\triangle A'B'C'", "\\triangle ABC"),
    ("f'(x)", "f(x)"),
    ("y'=2x", "y=2x"),
    ("0.\\overline{3}", "0.3"),
    ("f^{\\prime}(x)=2x", "f(x)=2x"),
    # Circled numbers.
    ("124", "①②④"),
    ("8", "①②④"),
    ("①②", "①②④"),
    ("①②③", "①②④"),
    # Capital and small letters.
    ("AA", "Aa"),
    ("Aa", "aa"),
    ("X^AY", "X^aY"),
    ("Co", "CO"),
    ("x+1", "X+1"),
    ("m", "M"),
    ("on", "no"),
    # Other dress.
    ("A(2,3)", "B(2,3)"),
    ("A(2,3)", "(3,2)"),
    ("5 \\approx 7", "5"),
    ("AB:CD=2:3", "AB:CD=3:2"),
    ("AB:CD=2:3", "CD:AB=2:3"),
    ("1:2:3", "2:4:5"),
    ("\\pm 5", "5"),
    ("5 or -6", "\\pm 5"),
    ("A", "(B)"),
    ("A. 2", "B. 2"),
    ("x=2,y=1", "\\begin{cases}x=1\\\\y=2\\end{cases}"),
    ("12元", "13"),
    ("5 m^2", "5 m^3"),
    ("k>1", "k>1且k≠2"),
]
SHAPES = ["Square", "Rectangle", "Isosceles trapezoid", "Right trapezoid.", "No correct answer"]
SIZES = ["4 cm", "2 cm", "$\\frac{1}{2}$ cm", "No correct answer"]
CHOICES_RIGHT = [
    *[
        (answer, "B", SHAPES)
        for answer in ("B", "(B)", "B.", "B)", "[B]", "B. Rectangle", "(B) Rectangle", "B: Rectangle")
    ],
    *[
        (answer, "B", [])
        for answer in ("\\text{B}", "\\textbf{(B)}", "$B$", "Option B", "option (B)", "**B**", "b", "(b)")
    ],
    *[(answer, "B", []) for answer in ("Choice B", "\\mathrm{B}", "B. 30", "\\text{(B) } 30", "B) 30 cm", "**B.** 30")],
    ("Rectangle", "B", SHAPES),
    ("rectangle.", "B", SHAPES),
    ("a rectangle", "B", SHAPES),
    ("right trapezoid", "D", SHAPES),
    ("B", "Rectangle", SHAPES),
    ("rectangle", "Rectangle", SHAPES),
    ("0.5 cm", "C", SIZES),
    ("\\frac12", "C", SIZES),
    ("2", "B", SIZES),
    ("B. 4 cm", "B", SIZES),
    ("C", "0.5", SIZES),
    ("The answer is B", "B", []),
    ("the correct option: (B)", "B", []),
    ("B", "B", ["A", "B", "C"]),
    ("B", "B", ["C", "A", "B"]),
    ("b", "C", ["a", "c", "b"]),
    ("p(x)=(x+1)^2", "B", ["A:$p(x)=x$", "B:$p(x)=(x+1)^2$"]),
    ("x^2+2x+1", "B", ["A:$p(x)=x$", "B:$p(x)=(x+1)^2$"]),
    ("2, 3 and 4", "A", ["2, 3 and 4", "1, 2 and 3"]),
    ("①", "A", ["①", "②"]),
    *[
        (answer, "B", choices)
        for answer in ("B，6", "B、6", "选B", "故选B", "故选：B", "答案：B", "B. 6", "(B) 6")
        for choices in ([], ["5", "6", "7", "8"])
    ],
    ("B 6", "B", ["5", "6"]),
    ("Aa", "B", ["AA", "Aa", "aa"]),
    ("A. the point B: 5", "A", ["the point B: 5", "6"]),
]
CHOICES_WRONG = [
    *[
        (answer, "B", SHAPES)
        for answer in ("A", "(A)", "A. Rectangle", "Square", "AB", "A, B", "A and B", "B or C", "F")
    ],
    *[(answer, "B", []) for answer in ("(B) or (C)", "(B), (C)", "BB", "Because", "30", "not B", "", "?", "a bee")],
    ("A dog", "A", ["a cat", "a dog"]),
    ("3.14", "B", ["3.14", "3.1416"]),
    ("4", "B", SIZES),
    ("b", "B", ["a", "c", "b"]),
    ("Isosceles", "C", SHAPES),
    *[
        (answer, "A", choices)
        for answer in (
            "A. B. C. D.",
            "(A)(B)(C)(D)",
            "(A) 5 (B) 6 (C) 7 (D) 8",
            "A.B.C.D",
            "A:B:C",
            "A. 5 or B. 6",
            "A. B",
        )
        for choices in ([], ["5", "6", "7", "8"])
    ],
    ("B 5", "B", ["5", "6"]),
    ("AA", "B", ["AA", "Aa", "aa"]),
]
MULTI_RIGHT = [
    ("A, C", "A, C", []),
    ("AC", "A, C", []),
    ("C and A", "A, C", []),
    ("(A), (C)", "AC", []),
    ("C,A", "A and C", []),
    ("a, c", "A, C", []),
    ("A; C", "A, C", []),
    ("A, C.", "A, C", []),
    ("A and C", "AC", []),
    ("\\text{A, C}", "A, C", []),
    ("D", "D", []),
    ("(D)", "D", []),
    ("D. none", "D", []),
    ("true", "A", ["True", "False"]),
    ("A. one; C. three", "A, C", ["one", "two", "three"]),
    ("abc", "A, B, C", []),
    *[(answer, "A, C", []) for answer in ("(A)(C)", "Both A and C", "Options A and C", "ac", "A+C")],
]
MULTI_WRONG = [
    ("A", "A, C", []),
    ("A, B, C", "A, C", []),
    ("AD", "A, C", []),
    ("", "A, C", []),
    ("A cat", "A, C", []),
    *[(answer, "A, B", []) for answer in ("(A)(C)", "Both A and C", "Options A and C", "ac", "A+C")],
    ("ca", "A, C", []),
    ("ac", "A, C", ["x", "ac", "y"]),
]
LISTS_RIGHT = [
    ("1, 2, 3", "[1, 2, 3]"),
    ("1; 2; 3", "1, 2, 3"),
    ("6, 4.0", "6\n4"),
    ("x=1, y=2", "1, 2"),
    ("['square', 'circle']", "square, circle"),
    ("\\frac12 and 3", "0.5, 3"),
    ("2, 3", "x=2, y=3"),
]
LISTS_WRONG = [
    ("3, 2", "x=2, y=3"),
    ("AB=6, AC=5", "AB=5, AC=6"),
    ("3, 2, 1", "1, 2, 3"),
    ("1, 2", "1, 2, 3"),
    ("1, 2, 3, 4", "1, 2, 3"),
    ("", "1, 2"),
    ("2, 1", "1, 2"),
]
TEXTS_RIGHT = [
    ("the Right trapezoid.", "right  trapezoid"),
    ("\\text{Yes}", "yes"),
    ("counter-clockwise", "counter clockwise"),
    ("A", "a"),
    ("DE", "DE"),
    ("it's", "it’s"),
]
TEXTS_WRONG = [
    ("no", "yes"),
    ("right", "right trapezoid"),
    ("3.5", "35"),
    ("-5", "5"),
    ("x < 3", "x > 3"),
    ("?", "!"),
    ("", "yes"),
    ("the", "a"),
]


def cases():
    for kind, right, wrong in (
        ("number", NUMBERS_RIGHT, NUMBERS_WRONG),
        ("math", MATH_RIGHT, MATH_WRONG),
        ("choice", CHOICES_RIGHT, CHOICES_WRONG),
        ("multi_choice", MULTI_RIGHT, MULTI_WRONG),
        ("list", LISTS_RIGHT, LISTS_WRONG),
        ("text", TEXTS_RIGHT, TEXTS_WRONG),
    ):
        for verdict, pairs in ((True, right), (False, wrong)):
            for answer, truth, *choices in pairs:
                yield pytest.param(kind, answer, truth, *(choices or [[]]), verdict, id=f"{kind}-{answer}-{truth}")


@pytest.mark.parametrize(("kind", "answer", "truth", "choices", "verdict"), cases())
def test_traps(kind, answer, truth, choices, verdict):
    assert grade(kind, answer, truth, choices, 0.0) is verdict


def test_number_agreement_is_also_that_of_math():
    """Rows may call a number "math". The verdict must not depend on it."""
    for pairs, verdict in ((NUMBERS_RIGHT, True), (NUMBERS_WRONG, False)):
        for answer, truth in pairs:
            assert grade("math", answer, truth, [], 0.0) is verdict, (answer, truth)


def test_tolerance_is_absolute_and_replaces_the_default():
    info = {"answer_type": "number", "tolerance": 0.05}
    for answer, acc in (("0.46", 1.0), ("0.45", 1.0), ("0.44", 0.0)):
        assert compute_score("any", f"\\boxed{{{answer}}}", "0.5", info)["acc"] == acc
    assert compute_score("any", "\\boxed{2016.5}", "2016", {"answer_type": "number", "tolerance": 0.1})["acc"] == 0.0
    assert compute_score("any", "\\boxed{(1.04, 2)}", "(1, 2)", {"answer_type": "math", "tolerance": 0.05})["acc"] == 1


EXTRACTIONS = [
    ("\\boxed{5}", "5"),
    ("\\boxed {5}", "5"),
    ("\\fbox{5}", "5"),
    ("boxed{5}", "5"),
    ("\\boxed 5", "5"),
    ("\\boxed5.", "5."),
    ("\\boxed{4} so \\boxed{5}", "5"),
    ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\left\\{1 \\right.}", "\\left\\{1 \\right."),
    ("\\boxed{\\boxed{5}}", "\\boxed{5}"),
    ("} { \\boxed{5}", "5"),
    ("\\boxed{5} and \\boxed{6", "5"),
    ("\\boxed{5", None),
    ("the answer is \\boxed{5", None),
    ("<think>\\boxed{4}</think> \\boxed{5}", "5"),
    ("<think>\\boxed{4}</think> so it is", "so it is"),
    ("<think>\\boxed{4}</think>" + "so " * 100, None),
    ("</think>\\boxed{4}</think>5", "5"),
    ("<answer>4</answer> <answer> 5 </answer>", "5"),
    ("<answer>4</answer> \\boxed{5}", "5"),
    ("The answer is 4. No, the final answer is 5 cm. Done", "5 cm"),
    ("x " * 100 + "**Answer:** 5", "5"),
    ("x " * 100 + "Answer:\n5\nbye", "5"),
    ("x " * 100 + "the correct option is (B).", "(B)"),
    ("x " * 100 + "The answer to the question is 3.5.", "3.5"),
    ("x " * 100 + "the answer is <answer>5</answer>", "5"),
    ("5", "5"),
    ("x " * 100, None),
    ("", None),
]


@pytest.mark.parametrize(("response", "answer"), EXTRACTIONS)
def test_extraction(response, answer):
    assert answers_of(response)[:1] == ([] if answer is None else [answer])


PIECES = ["<think>", "</think>", "\\boxed{", "boxed{", "}", "{", "a", "\n", " ", "\\"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_format_is_that_of_verls_geo3k(response):
    assert float(well_formed(response)) == verl_geo3k.format_reward(response.lstrip())


@pytest.mark.parametrize("response", ["<think>a</think>\\boxed{5}", "<think>a</think>\\boxed{6}", "\\boxed{5}", "6"])
@pytest.mark.parametrize("format_score", [0.0, 0.1, 0.5])
def test_score_is_weighed_as_verls_geo3k_does(response, format_score):
    ours = compute_score("hiyouga/geometry3k", response, "5", format_score=format_score)
    assert ours["score"] == pytest.approx(verl_geo3k.compute_score(response, "5", format_score=format_score))
    assert list(ours) == ["score", "acc", "format"]
    assert all(type(value) is float for value in ours.values())


def test_verl_loads_it_and_calls_it_from_threads():
    hook = {
        "path": "pkg://verl_gndpo.rewards",
        "name": "compute_score",
        "reward_kwargs": {"format_score": 0.2},
    }
    loaded = get_custom_reward_fn(SimpleNamespace(reward={"custom_reward_function": hook}))
    assert not inspect.iscoroutinefunction(loaded)

    async def run():
        loop = asyncio.get_running_loop()
        call = {
            "data_source": "FanqingM/MMK12",
            "solution_str": "\\boxed{1+2n}",
            "ground_truth": "2n+1",
            "extra_info": {},
        }
        return await asyncio.gather(
            *(loop.run_in_executor(None, lambda: loaded(**call, reward_router_address=None)) for _ in range(8))
        )

    assert asyncio.run(run()) == [{"score": 0.8, "acc": 1.0, "format": 0.0}] * 8


def test_rows_written_without_the_newer_keys():
    for info in (
        None,
        {},
        {"answer_type": None, "choices": None, "tolerance": None},
        {"answer_type": "", "choices": []},
    ):
        assert compute_score("hiyouga/geometry3k", "\\boxed{5.0}", "5", info)["acc"] == 1.0


def test_choices_as_numpy_array():
    assert compute_score("MathLLMs/MathVision", "\\boxed{6}", "B", {"choices": np.array(["5", "6"])})["acc"] == 1.0


def test_single_capital_letter_of_a_math_set_is_a_choice():
    assert compute_score("FanqingM/MMK12", "\\boxed{\\text{(A)}}", "$$A$$")["acc"] == 1.0
    assert compute_score("FanqingM/MMK12", "\\boxed{B}", "$$A$$")["acc"] == 0.0


def test_choices_make_a_math_row_a_choice():
    info = {"choices": ["Yes", "No"]}
    assert compute_score("AI4Math/MathVista", "\\boxed{A}", "Yes", info)["acc"] == 1.0
    assert compute_score("AI4Math/MathVista", "\\boxed{No}", "Yes", info)["acc"] == 0.0


def test_the_rows_answer_type_beats_the_table():
    assert compute_score("lscpku/LogicVista", "\\boxed{5 cm}", "5", {"answer_type": "number"})["acc"] == 1.0


def test_configuration_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"data_source 'mine'.*extra_info\.answer_type"):
        compute_score("mine", "\\boxed{5}", "5")
    with pytest.raises(ValueError, match=r"answer_type 'float'.*number, math"):
        compute_score("mine", "\\boxed{5}", "5", {"answer_type": "float"})
    for truth, kind in (("", "math"), (" ", "math"), (None, "math"), (5, "")):
        with pytest.raises(ValueError, match=r"ground_truth.*non-empty string"):
            compute_score("hiyouga/geometry3k", "\\boxed{5}", truth, {"answer_type": kind})


def test_rows_without_answers_get_no_accuracy():
    for truth in ("", " ", None):
        assert compute_score("mine", "\\boxed{5}", truth) == {"score": 0.0}
    assert compute_score("mine", "\\boxed{5}", "5", {"answer_type": "none"}) == {"score": 0.0}


def test_every_answer_type_has_a_grader_and_every_source_an_answer_type():
    assert [*GRADERS, "none"] == list(ANSWER_TYPES)
    assert set(ANSWER_TYPE_OF_SOURCE.values()) <= set(ANSWER_TYPES)


HEAVY = {"torch", "verl", "ray", "vllm", "transformers", "pandas", "pyarrow"}
ALGEBRA = {"sympy", "math_verify", "numpy"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        # Converters and start-up checks import it.
        ("verl_gndpo.rewards.answer_types", HEAVY | ALGEBRA),
        # verl's reward workers import it.
        ("verl_gndpo.rewards", HEAVY | ALGEBRA),
        # The helper process imports it, and has a memory limit.
        ("verl_gndpo.rewards.algebra", HEAVY),
    ],
)
def test_modules_import_nothing_heavy(module, unwanted):
    printed = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"], capture_output=True, text=True, check=True
    ).stdout
    assert unwanted & set(printed.split()) == set()


SOURCES = {
    "dynamath": "DynaMath/DynaMath_Sample",
    "geometry3k": "hiyouga/geometry3k",
    "logicvista": "lscpku/LogicVista",
    "mathverse": "AI4Math/MathVerse",
    "mathvision": "MathLLMs/MathVision",
    "mmk12": "FanqingM/MMK12",
    "wemath": "We-Math/We-Math",
}


def real_rows(name: str) -> list[tuple[str, list[str]]]:
    rows = []
    for path in sorted((REAL / name).glob("*.parquet")):
        for row in pd.read_parquet(path).to_dict("records"):
            choices = row.get("options", row.get("choices", []))
            if "option" in row:
                choices = [re.sub(r"^[A-E]\.\s*", "", text.strip()) for text in row["option"].split(";")]
            rows.append((row.get("answer", row.get("ground_truth")), list(choices)))
    assert rows
    return rows


real_sets = pytest.mark.parametrize("name", SOURCES)
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real samples stand beside the repository, not in it")


@needs_data
@real_sets
def test_every_answer_of_the_real_sets_is_right(name):
    for answer, choices in real_rows(name):
        # Other spellings need more than string equality.
        bare = answer.replace("$", "")
        for spelling in (
            answer,
            f" ${bare}$ .",
            re.sub(r"(?<=[-+=,}]) *(?=\S)", "  ", bare).replace("\\frac", "\\dfrac"),
        ):
            for response in (f"\\boxed{{{spelling}}}", f"<think>Hm.</think> It is $\\boxed{{{spelling}}}$."):
                graded = compute_score(SOURCES[name], response, answer, {"choices": choices})
                assert graded["acc"] == 1.0, (spelling, answer)


@needs_data
@real_sets
def test_another_rows_answer_is_wrong(name):
    rows = real_rows(name)
    pairs = [
        (other, answer, choices)
        for index, (answer, choices) in enumerate(rows)
        for other in {rows[(index + step) % len(rows)][0] for step in range(1, 6)} - {answer}
    ]
    accepted = [
        (other, answer)
        for other, answer, choices in pairs
        if compute_score(SOURCES[name], f"\\boxed{{{other}}}", answer, {"choices": choices})["acc"]
    ]
    assert len(pairs) >= 50
    # "58" and "$h=58$" are two spellings of one answer.
    assert len(accepted) <= 0.01 * len(pairs), accepted


@needs_data
@real_sets
def test_choices_are_also_graded_by_their_text(name):
    for answer, choices in real_rows(name):
        if len(answer) == 1 and answer.isalpha() and choices:
            for index, text in enumerate(choices):
                acc = compute_score(SOURCES[name], f"\\boxed{{{text}}}", answer, {"choices": choices})["acc"]
                assert acc == float(index == ord(answer) - ord("A")), (text, answer, choices)
