# SPDX-License-Identifier: Apache-2.0
"""Grade an answer by its type. Each grader tries what is cheap and certain first and computer algebra last."""

import logging
import re
from collections.abc import Callable

from . import symbolic
from .choices import all_chosen, bare_letter, chosen, remove_labels, truth_label
from .expressions import same
from .quantity import agree, quantity
from .spelling import canonical, clean, lists_items, same_words
from .structure import bracket_depth, read_group, split_alternatives, split_blanks, split_solutions

logger = logging.getLogger(__name__)

# An answer that is longer or more deeply nested is wrong, unless it is the ground truth to the letter.
MAX_CHARS = 4_000
MAX_DEPTH = 30

_BETWEEN_BRACKETS = re.compile(r"[)）]\s*[(（]")

_OR = re.compile(r"(?<![a-z])or(?![a-z])")
_TIME = re.compile(r"(\d{1,2})\s*:\s*(\d{1,2})")
_LETTER_SET = re.compile(r"[A-Z](?:\s*,\s*[A-Z])+")

# Words and times of day are no mathematics.
_NO_MATHEMATICS = re.compile(r"(?<![\\a-zA-Z])(?!(?:and|or|sin|cos|tan|log)\b)[a-zA-Z]{4,}|\d:\d|^\W*$")

Grader = Callable[[str, str, list[str], float], bool]
"""Decides if an answer is right: (answer, truth, choices, tolerance), as for `grade`."""


def grade(answer_type: str, answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Return True if an answer is right.

    Args:
        answer_type: one of `answer_types.ANSWER_TYPES`.
        answer, truth: as the model and the data set wrote them.
        choices: texts of the choices A, B, C, ...; empty if there are none or they aren't known.
        tolerance: largest absolute error of a number; 0 for the default of `quantity.agree`.

    Raises:
        RuntimeError: from `symbolic.equal`.
    """
    answer, truth = answer.strip(), truth.strip()
    if answer == truth and not (answer_type == "choice" and choices):
        return True
    if not answer or len(answer) > MAX_CHARS or bracket_depth(answer) > MAX_DEPTH:
        return False
    return GRADERS[answer_type](answer, truth, choices, tolerance)


def _number(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Grade a real number, with or without a unit. Constant expressions count; computer algebra isn't used."""
    answer, truth = clean(answer), clean(truth)
    given, wanted = quantity(answer, glued_units=True), quantity(truth, glued_units=True)
    if given is None or wanted is None:
        return canonical(answer) == canonical(truth)
    return agree(given, wanted, tolerance)


def _math(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Grade expressions, equations, points, intervals, sets and lists of them, see `expressions.same`.

    A ground truth such as `35/4 (or 8.75)` accepts both forms. An answer with two forms must be right in both.
    """
    truths = split_alternatives(truth)
    if len(truths) == 1 and len(forms := _OR.split(truth)) == 2:
        # 5/2 or 2.5 is one value.
        first, second = (quantity(clean(form)) for form in forms)
        truths = forms if first and second and agree(first, second) else truths
    return all(any(_same(form, wanted, tolerance) for wanted in truths) for form in split_alternatives(answer))


def _same(answer: str, truth: str, tolerance: float) -> bool:
    if lists_items(truth):
        # (1)(2)(4) is no product if the ground truth is ①②④.
        answer, truth = (_BETWEEN_BRACKETS.sub("),(", text) for text in (answer, truth))
    label, letter = truth_label(clean(truth)), bare_letter(clean(answer))
    if label and letter:
        return letter == label
    try:
        return same(answer, truth, tolerance, _leave_undecided)
    except _Undecided:
        return not symbolic.is_hopeless(answer) and symbolic.equal(answer, truth, tolerance)


def _choice(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Grade the letter of a choice, or its text.

    A capital letter is always a label, even if the choices are letters themselves. A small letter is a label only if
    no choice reads like it. If letter and text contradict each other, the letter counts.
    """
    texts = remove_labels(choices)
    given, wanted = chosen(answer, texts), chosen(truth, texts)
    if texts and wanted is None:
        equal = (index for index, text in enumerate(texts) if _math(text, truth, [], tolerance))
        wanted = next(equal, None)
        if wanted is None:
            _warn_of_truth(truth, texts)
            return False
    if given is not None and wanted is not None:
        return given == wanted
    if wanted is not None:
        return wanted < len(texts) and _math(answer, texts[wanted], [], tolerance)
    return _math(answer, truth, [], tolerance)


def _multi_choice(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Grade a set of choices, named by letters in any order ("A, C", "AC", "C and A") or by their texts."""
    texts = remove_labels(choices)
    wanted = all_chosen(truth, texts)
    return wanted is not None and all_chosen(answer, texts) == wanted


def _list(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Grade the blanks of a question in order, separated by semicolons or line breaks, else by commas or "and"."""
    answers, truths = _in_order(answer), _in_order(truth)
    return len(answers) == len(truths) and _math(";".join(answers), ";".join(truths), [], tolerance)


def _text(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Grade words. Case, spacing, punctuation and articles don't count. Mathematics is graded as such."""
    answer, truth = clean(answer), clean(truth)
    if same_words(answer, truth):
        return True
    times = _TIME.fullmatch(answer), _TIME.fullmatch(truth)
    if times[0] and times[1]:
        # 5:0 is five o'clock.
        return [*map(int, times[0].groups())] == [*map(int, times[1].groups())]
    if _LETTER_SET.fullmatch(truth) and answer.isalpha() and answer.isupper():
        return sorted(answer) == sorted(re.findall("[A-Z]", truth))
    return not any(map(_NO_MATHEMATICS.search, (answer, truth))) and _math(answer, truth, choices, tolerance)


GRADERS: dict[str, Grader] = {
    "number": _number,
    "math": _math,
    "choice": _choice,
    "multi_choice": _multi_choice,
    "list": _list,
    "text": _text,
}


def _warn_of_truth(truth: str, texts: list[str]) -> None:
    if not _warned_of:
        logger.warning(
            "the ground truth %.80r is none of its row's choices %.200r, so that every answer is graded 0: fix the row "
            "where the parquet file is written. Logged once per process",
            truth,
            texts,
        )
    _warned_of.add(truth)


_warned_of: set[str] = set()


class _Undecided(Exception):
    """Only computer algebra can decide."""


def _leave_undecided(answer: str, truth: str, tolerance: float) -> bool:
    raise _Undecided


def _in_order(text: str) -> list[str]:
    text = clean(text)
    group = read_group(text)
    if group:
        elements = group.elements
    else:
        blanks = split_blanks(text)
        elements = blanks if len(blanks) > 1 else split_solutions(text)
    return [element.strip("'\" ") for element in elements]
