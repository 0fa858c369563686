# SPDX-License-Identifier: Apache-2.0
"""Compare expressions with math-verify, in `symbolic`'s helper process only: it may take long or fill memory."""

import re

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, Float, MatrixExpr, Set, Union

from .expressions import same
from .quantity import Quantity, agree, quantity

_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*°")
# `quantity` handles units. math-verify's own rule for units would remove letters that are variables.
_EXTRACTION = [LatexExtractionConfig(normalization_config=NormalizationConfig(boxed="none"))]
_OR = re.compile(r"\s+or\s+")


def compare(answer: str, truth: str, tolerance: float) -> bool:
    """Return `expressions.same` with computer algebra for what it leaves undecided."""
    return same(answer, truth, tolerance, _equal)


def _equal(answer: str, truth: str, tolerance: float) -> bool:
    given, wanted = _parse(answer), _parse(truth)
    if given is None or wanted is None:
        return False
    if isinstance(wanted, Eq) and not isinstance(given, Eq | Set):
        # x + y = 1 isn't its right side. `same` has split off names such as x = 1 before.
        return False
    number, number_truth = quantity(answer) or _constant(given), quantity(truth) or _constant(wanted)
    if number is not None and number_truth is not None:
        return agree(number, number_truth, tolerance)
    return verify(wanted, given, timeout_seconds=None, allow_set_relation_comp=True)


def _parse(text: str) -> Basic | None:
    alternatives = _OR.split(text)
    if len(alternatives) > 1:
        # x < 1 or x > 2 is a union of intervals.
        return Union(*map(_solve, alternatives))
    # Degrees count only under a function; elsewhere they are a unit.
    text = _DEGREES.sub(r"(\\frac{\1 \\pi}{180})" if _TRIGONOMETRIC.search(text) else r"\1", text)
    found = parse(f"${text}$", _EXTRACTION, fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        return None
    # A product of matrices.
    return found[0].doit() if isinstance(found[0], MatrixExpr) else found[0]


def _solve(text: str) -> Set:
    expression = _parse(text)
    if expression is None:
        raise ValueError(f"{text!r} is not mathematics")
    return expression.as_set()


def _constant(expression: Basic) -> Quantity | None:
    if not getattr(expression, "is_number", False):
        return None
    value = expression.evalf(20)
    if not (value.is_real and value.is_finite):
        return None
    return Quantity(float(value), not expression.has(Float))
