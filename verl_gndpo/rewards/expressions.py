# SPDX-License-Identifier: Apache-2.0
"""Compare mathematics by spelling, numbers and structure, as far as these can decide."""

import re
from collections.abc import Callable

from .quantity import EQUALS, agree, quantity, split_name
from .spelling import canonical, clean, same_words
from .structure import read_group, split_blanks, split_solutions

# A list with more elements than this is no answer.
MAX_ELEMENTS = 50

Leaf = Callable[[str, str, float], bool]
"""Decides what nothing else could: (answer, truth, tolerance), both cleaned."""

_GEOMETRIC = re.compile(r"\\(?:angle|triangle)(?![a-zA-Z])|\bangles?\b|\\(?:overline|widehat)\s*(?=\{)")
# The name of a value, unlike in a list of angles.
_NUMBERED_ANGLE = re.compile(r"(?:^|(?<=[,;\s]))\\angle\s*(\d{1,2})(?=\s*=\s*(?!\\angle)[^=\s])")
_PRIMED = re.compile(r"([A-Za-z\d)}\]])\s*('+)(?![a-z])(?<![a-z]{2}')")
_POINT = re.compile(r"^([A-Z]'?)\s*(?=\([^(),]*,[^()]*\)$)")
# Two different names of one kind name two different things. The first five kinds can also be values: the number of an
# angle, a letter, a Greek letter, a segment, an angle or triangle. The others, functions and ratios, are only names.
_NAME_KINDS = [
    re.compile(kind)
    for kind in (
        r"\d",
        r"[A-Za-z]'*",
        r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|tau|(?:var)?phi|psi|omega)'*",
        r"(?:[A-Z]'*){2}",
        r"(?:[A-Z]'*){3}",
        r"\\[a-zA-Z]+'*",
        r"[a-zA-Z]'*\([^()]+\)",
        r"[a-zA-Z]'*_(?:[a-zA-Z]|[A-Z]{2,4})",
        r"[^:]+:[^:]+",
        r"angle\d+",
    )
]
_VALUE_KINDS = 5
_LETTER_KIND = 1
_POINTS_KINDS = (3, 4)
_AREA_KIND, _RATIO_KIND = 7, 8
_EQUATED_KINDS = (_LETTER_KIND, *_POINTS_KINDS, _AREA_KIND, _RATIO_KIND)
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_VARIABLE = re.compile(r"\s*([a-zA-Z])\s*\(\s*([nxyzt])\s*\)\s*")
_INDEX = re.compile(r"_?\{?\d+\}?$")
_CAPITAL = re.compile(r"[A-Z]'*")
_LETTER_RUN = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]+")
_CASELESS = re.compile(r"[a-zA-Z]*[a-z]{3}[a-zA-Z]*|(?i:no)")
_UNIT_TAIL = re.compile(r"\s+(?:(?:square|cubic)\s+)?(?:units?|[cmk]m|inch(?:es)?|feet)(?:\s*\^\s*\{?\s*[23]\s*\}?)?$")
# These may stand for several solutions without a comma.
_SEVERAL = re.compile(r"\\(?:pm|mp|cup|le|ge|\{)(?![a-zA-Z])|[<>]")
_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?<!begin\{)(?<!end\{)"
    r"(?!(?:sinh|cosh|tanh|arcsin|arccos|arctan|sqrt)(?![a-z]))[a-zA-Z]{4}"
)
_TWO_NUMBERS = re.compile(r"(?<![_\d])\d+\)?\s+\d")
# Three digits after the comma would be thousands, except after a zero.
_DECIMAL_COMMA = re.compile(r"-?(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))(?:\s*[€£¥%°]|\s+[a-zA-Z]{1,12})?")
# 1,22 may be a list, but an answer with a decimal point says that it isn't. Truths such as 1,2 stay lists.
_SURE_DECIMAL_COMMA = re.compile(r"-?(?:0,\d+|[1-9]\d*,(?:\d{2}|\d{4,}))")
_MEMBER = re.compile(r"([a-zA-Z])\s*\\in\s*(?=[(\[])")
_COMPLEX = re.compile(r"(-?\d+(?:\.\d+)?\s*[-+]\s*(?:\d+(?:\.\d+)?)?\s*)j")
_LETTERS_ONLY = re.compile(r"[^\W\d_]{2,}")


def same(answer: str, truth: str, tolerance: float, leaf: Leaf) -> bool:
    """Return True if an answer and a ground truth are the same mathematics.

    Semicolons and line breaks separate the blanks of a question, whose order counts. Commas, "and" and "or" separate
    solutions, whose order doesn't. Order and brackets count in points and intervals; order doesn't in sets.

    Args:
        answer, truth: as the model and the data set wrote them.
        tolerance: as for `quantity.agree`.
        leaf: decides the pairs that spelling, numbers and structure leave undecided.
    """
    answer, truth = _imaginary(clean(answer)), _imaginary(clean(truth))
    answer, truth = _without_member(answer, truth), _without_member(truth, answer)
    equated, equated_truth = _equated_names(answer), _equated_names(truth)
    if equated and equated_truth:
        return equated == equated_truth
    if equated_truth and not equated and all(kind in _EQUATED_KINDS for kind, _ in equated_truth):
        # CD alone doesn't say AB = CD.
        return False
    answer, truth = _name_first(answer), _name_first(truth)
    if _is_false(answer):
        return False
    answer, truth = (_NUMBERED_ANGLE.sub(r"angle\1", text) for text in (answer, truth))
    answer, truth = (_POINT.sub(r"\1=", _GEOMETRIC.sub(" ", text).strip()) for text in (answer, truth))
    if canonical(answer) == canonical(truth):
        return bool(truth)
    given, wanted = quantity(answer), quantity(truth)
    if given is not None and wanted is not None:
        return not _other_name(answer, truth) and agree(given, wanted, tolerance)

    if given is None and wanted is not None and wanted.decimals and _DECIMAL_COMMA.fullmatch(answer):
        return same(answer.replace(",", "."), truth, tolerance, leaf)
    if given is not None and given.decimals and wanted is None and _SURE_DECIMAL_COMMA.fullmatch(truth):
        return same(answer, truth.replace(",", "."), tolerance, leaf)

    blanks = split_blanks(truth)
    truths = blanks if len(blanks) > 1 else split_solutions(truth)
    answers = split_blanks(answer)
    if len(answers) == 1 or truths is not blanks:
        answers = [solution for blank in answers for solution in split_solutions(blank)]
    if len(answers) == len(truths) == 1 and (answers[0], truths[0]) != (answer, truth):
        # The label of the only part is gone.
        return same(answers[0], truths[0], tolerance, leaf)
    if len(answers) > 1 and len(truths) > 1:
        return _same_elements(answers, truths, truths is blanks, tolerance, leaf)
    for one, several in ((answers, truths), (truths, answers)):
        # The point (3, 5) is x = 3, y = 5.
        chain = _chain(one[0], several) if len(one) == 1 else []
        if chain:
            pair = (chain, several) if one is answers else (several, chain)
            return _same_elements(*pair, False, tolerance, leaf)
        point = read_group(one[0]) if len(one) == 1 else None
        coordinates = sorted(map(split_name, several))
        if (
            point
            and point.brackets == ("(", ")")
            and len(dict(coordinates)) == len(several) > 1
            and all(dict(coordinates))
        ):
            values = [value for _, value in coordinates]
            pair = (point.elements, values) if one is answers else (values, point.elements)
            return _same_elements(*pair, True, tolerance, leaf)
    if len(answers) != len(truths) and not _SEVERAL.search(answer + truth):
        return False
    terms, terms_truth = answer.split(":"), truth.split(":")
    if max(len(terms), len(terms_truth)) > 2:
        return len(terms) == len(terms_truth) and (
            _same_elements(terms, terms_truth, True, tolerance, leaf)
            or _same_elements(_over_first(terms), _over_first(terms_truth), True, tolerance, leaf)
        )
    group, group_truth = read_group(answer), read_group(truth)
    if group and group_truth:
        ordered = group.brackets != (r"\{", r"\}")
        return group.brackets == group_truth.brackets and _same_elements(
            group.elements, group_truth.elements, ordered, tolerance, leaf
        )

    (name, value), (name_truth, value_truth) = split_name(answer), split_name(truth)
    if name and name_truth:
        argument, argument_truth = _VARIABLE.fullmatch(name), _VARIABLE.fullmatch(name_truth)
        if argument and argument_truth and argument[1] == argument_truth[1]:
            # f(n) = 2n is f(x) = 2x.
            renamed = re.sub(rf"(?<![\\a-zA-Z]){argument[2]}(?![a-zA-Z])", argument_truth[2], value)
            return same(renamed, value_truth, tolerance, leaf)
        if name in value_truth and name_truth in value:
            # y = 2x is x = y/2.
            return leaf(answer, truth, tolerance)
        return not _other_name(answer, truth) and same(value, value_truth, tolerance, leaf)
    if name and not EQUALS.search(truth):
        return same(value, truth, tolerance, leaf)
    if name_truth and not EQUALS.search(answer):
        return same(answer, value_truth, tolerance, leaf)
    if _other_letters(answer, truth):
        return False
    answer, truth = _UNIT_TAIL.sub("", answer), _UNIT_TAIL.sub("", truth)
    keys = canonical(answer), canonical(truth)
    if all(map(_LETTERS_ONLY.fullmatch, keys)) or any(map(_WORD.search, (answer, truth))):
        points = _read_name(answer)
        return same_words(answer, truth) or bool(points and points[0] in _POINTS_KINDS and points == _read_name(truth))
    if any(map(_TWO_NUMBERS.search, (answer, truth))):
        # Parsers read the space as a product or a sum.
        return False
    return leaf(answer, truth, tolerance)


def _name_first(cleaned: str) -> str:
    """Write x = 3 for 3 = x."""
    value, equals, name = cleaned.partition("=")
    if not equals or "=" in name or not name.strip() or quantity(value, glued_units=True) is None:
        return cleaned
    kind = _read_name(name)
    return f"{name.strip()} = {value.strip()}" if kind and 0 < kind[0] < _VALUE_KINDS else cleaned


def _is_false(cleaned: str) -> bool:
    """Return True for 6 = 5, whose sides are different numbers."""
    sides = [quantity(side) for side in EQUALS.split(cleaned)]
    numbers = [side for side in sides if side is not None]
    return len(numbers) == len(sides) == 2 and not agree(numbers[0], numbers[1])


def _chain(text: str, several: list[str]) -> list[str]:
    """Return the equations of x = y = 2 or (p, q) = (3, 2), if several equations are compared with them; else []."""
    *names, value = (side.strip() for side in text.split("="))
    if not all(split_name(side)[0] for side in several):
        return []
    if len(names) == 1:
        groups = read_group(names[0]), read_group(value)
        if groups[0] and groups[1] and len(groups[0].elements) == len(groups[1].elements) == len(several):
            return [f"{name} = {one}" for name, one in zip(groups[0].elements, groups[1].elements, strict=True)]
        return []
    return [f"{name} = {value}" for name in names] if len(names) == len(several) else []


def _without_member(text: str, other: str) -> str:
    """Remove "x in" before an interval if the other side is a relation of x or says nothing of the kind."""
    member = _MEMBER.match(text)
    if member is None or _MEMBER.match(other) or not re.search(rf"(?<![\\a-zA-Z]){member[1]}(?![a-zA-Z])", other):
        return text
    return text[member.end() :]


def _imaginary(cleaned: str) -> str:
    """Write i for the j of a complex number such as 1-2j. Without a real part, j may be a vector."""
    return _COMPLEX.sub(r"\1i", cleaned) if _COMPLEX.fullmatch(cleaned) else cleaned


def _other_name(answer: str, truth: str) -> bool:
    """Return True if x = 5 is compared with y = 5. "h = 5" and "height = 5" may be the same."""
    name, name_truth = (_read_name(split_name(side)[0]) for side in (answer, truth))
    if name is None or name_truth is None or name == name_truth:
        return False
    return name[0] == name_truth[0] or _RATIO_KIND in (name[0], name_truth[0])


def _read_name(text: str) -> tuple[int, str] | None:
    """Return the kind and the normal form of a name, None if it is of no known kind.

    A segment, angle or triangle can be named in two directions, which have one normal form.
    """
    text = _FRACTION.sub(r"\1:\2", _GEOMETRIC.sub(" ", text))
    name = re.sub(r"/|\\div", ":", canonical(text)).replace("{", "").replace("}", "")
    for kind, pattern in enumerate(_NAME_KINDS):
        if pattern.fullmatch(name):
            if kind == _RATIO_KIND:
                terms = (_read_name(term) or (0, term) for term in name.split(":"))
                return kind, ":".join(term[1] for term in terms)
            if variable := _VARIABLE.fullmatch(name):
                return kind, f"{variable[1]}(x)"
            if kind == _AREA_KIND:
                # The area of ABC is that of BAC.
                return kind, name[: name.index("_")] + "".join(sorted(name[name.index("_") :]))
            backwards = "".join(reversed(_CAPITAL.findall(name)))
            return kind, min(name, backwards) if kind in _POINTS_KINDS else name
    return None


def _equated_names(cleaned: str) -> list[tuple[int, str]] | None:
    """Return the sides of AB = CD in a fixed order, None if a side is anything but a name."""
    sides = cleaned.split("=")
    if not 1 < len(sides) <= MAX_ELEMENTS or any(side.strip().isdigit() for side in sides):
        return None
    names = []
    for side in sides:
        name = _read_name(side)
        if name is None or (name[0] >= _VALUE_KINDS and name[0] != _AREA_KIND and not _is_ratio_of_names(name)):
            return None
        names.append(name)
    return sorted(names)


def _is_ratio_of_names(name: tuple[int, str]) -> bool:
    """Return True for AB:CD, but not for 2:3."""
    return name[0] == _RATIO_KIND and all((_read_name(term) or (0,))[0] for term in name[1].split(":"))


def _other_letters(answer: str, truth: str) -> bool:
    """Return True if letters differ in their primes, or only in case and aren't words."""
    if set(_PRIMED.findall(answer)) != set(_PRIMED.findall(truth)):
        return True
    runs, runs_truth = _LETTER_RUN.findall(answer), _LETTER_RUN.findall(truth)
    letters, letters_truth = "".join(runs), "".join(runs_truth)
    return (
        set(letters) != set(letters_truth)
        and set(letters.lower()) == set(letters_truth.lower())
        and not any(map(_CASELESS.fullmatch, runs + runs_truth))
    )


def _same_elements(answers: list[str], truths: list[str], ordered: bool, tolerance: float, leaf: Leaf) -> bool:
    if not ordered and len(answers) > len(truths) > 2:
        # A solution that is written twice is one solution.
        answers = list({canonical(answer): answer for answer in answers}.values())
    if len(answers) != len(truths) or len(truths) > MAX_ELEMENTS:
        return False
    # It doesn't matter which root is called x_1 and which x_2.
    names, names_truth = (
        [_INDEX.sub("", canonical(split_name(side)[0])) for side in sides] for sides in (answers, truths)
    )
    if not ordered and any(all(some) and len(set(some)) == len(truths) for some in (names, names_truth)):
        # Compare x = 2, y = 3 by names, or in order if the other side is 2, 3.
        if set(names) == set(names_truth):
            answers = [answers[names.index(name)] for name in names_truth]
        ordered = set(names) == set(names_truth) or not any(names) or not any(names_truth)
    if ordered:
        return all(same(answer, truth, tolerance, leaf) for answer, truth in zip(answers, truths, strict=True))
    left = list(answers)
    for truth in truths:
        match = next((answer for answer in left if same(answer, truth, tolerance, leaf)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _over_first(terms: list[str]) -> list[str]:
    """Return the ratio of each later term to the first: 1:2:3 and 2:4:6 have the same."""
    return [f"{term}:{terms[0]}" for term in terms[1:]]
