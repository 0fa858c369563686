# SPDX-License-Identifier: Apache-2.0
"""Nothing that comes from a model or a data file is executed (docs/security.md)."""

import re

import pytest

NUMBER = re.compile(r"(Integer|Float|Rational) ?\('?[\d.]+'? ?\)")
PAYLOADS = [
    "__import__('os').system('touch {mark}')",
    "().__class__.__mro__[1].__subclasses__()",
    r"\text{{__import__('os').system('touch {mark}')}}",
    r"\operatorname{{exec}}(open('{mark}', 'w'))",
    "open('{mark}', 'w')",
    "exec('1')",
    "lambda: 1",
    "S.One.__class__",
    r"x_{{__import__('os')}} = 1",
    r"\frac{{open('{mark}','w')}}{{2}}",
    r"\begin{{matrix}} open('{mark}','w') \\ 1 \end{{matrix}}",
    r"\sum_{{i=1}}^{{3}} __import__('os')",
    r"\{{1, 2, open('{mark}', 'w')\}}",
    "x < open('{mark}','w') or x > 2",
    r"3 \text{{ or }} eval('1')",
]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("form", ["{}", "${}$", r"\boxed{{{}}}", "{} = 1", "(1, {})"])
def test_no_answer_reaches_eval(payload, form, tmp_path, monkeypatch):
    """sympy's own parser of text evaluates it as Python. math-verify may give it numbers, and nothing else."""
    import sympy.physics.units  # noqa: F401  evaluates names of its own when it is imported
    from sympy.parsing import sympy_parser

    from verl_gndpo.rewards import algebra

    evaluate, reached = sympy_parser.eval_expr, []

    def watched(code, *arguments):
        reached.append(code)
        return evaluate(code, *arguments)

    monkeypatch.setattr(sympy_parser, "eval_expr", watched)
    answer = form.format(payload.format(mark=tmp_path / "mark"))
    for pair in ((answer, "x^2+1"), ("x^2+1", answer), (answer, answer + "+0")):
        try:
            algebra.compare(*pair, 0.0)
        # The helper takes every error for a wrong answer.
        except Exception:
            continue
    assert not [code for code in reached if not NUMBER.fullmatch(code)]
    assert not (tmp_path / "mark").exists()
