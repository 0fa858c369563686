# SPDX-License-Identifier: Apache-2.0
"""Grade each ground truth against natural forms of itself, so that none is written that no answer can match.

The forms are written by rules of their own, not by the graders' cleaning: a form that a grader cannot read must show.
A grader accepts any text that equals the truth, so a form only counts if a model could write it: broken LaTeX, commands
that don't exist, HTML and "see the solution" don't.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from pylatexenc import latex2text, latexwalker

from verl_gndpo.rewards.graders import grade

# A blank with a longer answer, or with more words, asks for an explanation. No model writes it in the same words.
NATURAL_CHARS = 100
NATURAL_WORDS = 6
MAX_BLANKS = 12

_PLAIN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\$", " "),
        (r"\{\s*\}|\\(?:left|right|displaystyle)(?![a-z])|\\[,;:!]", ""),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\?textdegree|\\degree(?![a-z])", "°"),
        (r"\\(?:text|textbf|mathrm|mathbf|number|rm)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)"),
        (r"\\sqrt\s*\{([^{}]*)\}", r"√(\1)"),
        (r"\\pi(?![a-z])", "π"),
        (r"\{([^{}]*)\}", r"\1"),
        (r"\((-?\w+)\)/\((\w+)\)", r"\1/\2"),
    )
]
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_VALUE = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")
_LABEL = re.compile(r"\(\d\)|[①-⑨]")
_ITEMS = re.compile(r"\s*\d(?:\s*\.\s*\d){2,}\s*\.?\s*")
_NO_ANSWER = re.compile(
    r"(?:the )?(?:answer |proof |solution |process )?(?:is )?(?:omitted|skipped)|略|答案略|证明略"
    r"|(?:please )?(?:see|refer to|as (?:shown|seen) in) (?:the )?"
    r"(?:solution|figure|analysis|explanation|answer|proof|diagram)s?.*",
    re.IGNORECASE | re.DOTALL,
)
_HTML = re.compile(r"&(?:[a-zA-Z]+|#\d+);|</?[a-z]+>|\ufffd")
_COMMAND = re.compile(r"(?<!\\)(?:\\\\)*\\([a-zA-Z]+)")
_KNOWN = [latexwalker.get_default_latex_context_db(), latex2text.get_default_latex_context_db()]
# Commands of AMS packages, and those that the parser reads by themselves.
_MORE_COMMANDS = re.compile(
    r"begin|end|left|right|[dtc]frac|binom|degree|triangle|overset|arc|ne|lg|cot|displaystyle|rm|bf|boldsymbol"
    r"|operatorname|lt|gt|textcircled"
)
_ALTERNATIVE = re.compile(r"(.+?)\s*\(\s*or\b.*\)", re.S)


def is_matchable(truth: str, answer_type: str, choices: list[str], tolerance: float = 0.0) -> bool:
    """Return True if the grader of an answer type accepts a ground truth in at least one natural form.

    Args:
        truth, answer_type, choices, tolerance: as for `rewards.graders.grade`.

    Raises:
        RuntimeError: from `grade`.
    """
    return any(
        _is_writable(form) and grade(answer_type, form, truth, choices, tolerance)
        for form in natural_forms(truth, choices)
    )


def _is_writable(form: str) -> bool:
    """Return True if a form is plain text, or LaTeX with closed braces and environments and with known commands."""
    if _HTML.search(form):
        return False
    try:
        latexwalker.LatexWalker(form, tolerant_parsing=False).get_latex_nodes()
    except latexwalker.LatexWalkerParseError:
        return False
    return all(
        _MORE_COMMANDS.fullmatch(name) or any(getattr(db.get_macro_spec(name), "macroname", "") for db in _KNOWN)
        for name in _COMMAND.findall(form)
    )


def natural_forms(truth: str, choices: list[str]) -> Iterator[str]:
    """Yield forms in which a model might write a ground truth; none for an explanation, or for "see the solution".

    They are plain text, LaTeX, a fraction as a decimal, the number without its unit, and parts or items with other
    separators. With choices, the letter of each choice that the truth names is one, too.
    """
    plain = html.unescape(truth)
    for pattern, replacement in _PLAIN:
        plain = pattern.sub(replacement, plain)
    plain = plain.strip(" .")
    blanks = [" ".join(blank.split()) for blank in re.split(r"[\n;]", plain) if blank.strip()]
    if any(len(blank) > NATURAL_CHARS or len(_WORD.findall(blank)) > NATURAL_WORDS for blank in blanks):
        return
    if len(blanks) > MAX_BLANKS or _NO_ANSWER.fullmatch(plain):
        return
    if len(blanks) > 1:
        yield "; ".join(blanks)
    plain = " ".join(plain.split())
    if choices:
        named = [index for index, text in enumerate(choices) if plain in (text.strip(), chr(ord("A") + index))]
        yield from (chr(ord("A") + index) for index in named)
    if _ITEMS.fullmatch(plain):
        yield "".join(chr(ord("①") + int(digit) - 1) for digit in re.findall(r"[1-9]", plain))
        return
    if alternative := _ALTERNATIVE.fullmatch(plain):
        yield alternative[1]
        return
    formulas = re.findall(r"\$\$?([^$]+)\$\$?", truth)
    if len(formulas) > 1:
        yield ", ".join(formulas)
        yield "; ".join(formulas)
    parts = [part.strip(" ;,") for part in _LABEL.split(plain) if part.strip(" ;,")]
    if len(parts) > 1:
        yield "; ".join(parts)
    value = _VALUE.match(plain)
    if value and not re.search(r"[\d,;:+*/^=<>-]", plain[value.end() :]):
        yield value[0]
        if "/" in value[0] and not value[0].endswith("/0"):
            numerator, denominator = value[0].split("/")
            yield f"{int(float(numerator)) / int(denominator):.6g}" if int(denominator) else value[0]
    yield plain
    yield truth.replace("$", "")
