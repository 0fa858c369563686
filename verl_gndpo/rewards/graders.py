# SPDX-License-Identifier: Apache-2.0
"""One grader for each `answer_type`: (answer, truth, choices, tolerance) -> is it right.

Each tries what is cheap and certain first; computer algebra (`symbolic`) is the last resort.
"""

import re
from collections.abc import Callable

from . import symbolic
from .spelling import CIRCLED, canonical, clean
from .quantity import agree, quantity, split_name

# What is longer, deeper or has more parts is no answer, unless it is the truth to the letter.
MAX_CHARS = 4_000
MAX_DEPTH = 30
MAX_ELEMENTS = 50
# What computer algebra is not asked about. Its limits would end it as well, but after seconds.
MAX_SYMBOLIC_CHARS = 1_000
_HOPELESS = re.compile(
    r"\d{60}|\d{4}\s*\}?\s*!|!\s*!|\^\s*[{(]?\s*[-+]?\s*\d{4}|\d\s*\}?\s*\^\s*[{(]?\s*\d+\s*\}?\s*\^\s*[{(]?\s*\d"
)

Leaf = Callable[[str, str, float], bool]
"""Decides what nothing else could: (answer, truth, tolerance), both cleaned."""

_LABEL_WORD = (
    r"(?:(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\b|:)?"
    r"|故?(?:应?选择?|答案[是为选]?)\s*:?)\s*)?"
)
_LETTER = re.compile(_LABEL_WORD + r"[(\[]?\s*([A-Z])\s*[)\]]?\s*[.:]?", re.I)
_LABEL = re.compile(
    _LABEL_WORD + r"(?:[(\[]\s*([A-Z])\s*[)\]]\s*[.:]?|([A-Z])\s*[.):])(?!\s*(?:and\b|or\b|[,;/&]))", re.I
)
_OTHER_LABEL = re.compile(r"(?<![a-zA-Z])(?:\(([A-Z])\)|([A-Z])\s*[.):])|^\s*([A-Z])$")
_LABEL_AND_TEXT = re.compile(_LABEL_WORD + r"([A-Z])(?:\s*,\s*|\s+)(?P<text>\S.*)", re.S)
# A truth of a math set that is a choice's.
_DRESSED = re.compile(r"\(([A-Z])\)|([A-Z])[.)]\s.*", re.S)
_BETWEEN_BRACKETS = re.compile(r"[)）]\s*[(（]")
_OWN_LABEL = re.compile(r"\s*\(?([A-Z])\s*[.:)]\s*(?=\S)")
# Small ones in their order only: "ac", no word.
_LETTERS = re.compile(r"[A-Z]{2,26}|(?=..)a?b?c?d?e?f?g?h?")
_BEFORE_LETTERS = re.compile(r"^(?:both|options|choices|answers)\b\s*:?\s*", re.I)
_BETWEEN_LETTERS = re.compile(r"\s*(?:[,;&/+]|\band\b)\s*|\s+|(?<=\))(?=\()", re.I)
_BETWEEN_CHOICES = re.compile(r"\s*[;\n]\s*")

_GEOMETRIC = re.compile(r"\\(?:angle|triangle)(?![a-zA-Z])|\bangles?\b|\\(?:overline|widehat)\s*(?=\{)")
_PRIMED = re.compile(r"([A-Za-z)}\]])\s*('+)(?![a-z])(?<![a-z]{2}')")
_POINT = re.compile(r"^([A-Z]'?)\s*(?=\([^(),]*,[^()]*\)$)")
# Two names of one kind that differ name two things. The first five (the number of an angle, a letter, a Greek one,
# a segment, an angle or triangle) are also values, the others (a function, a ratio) are no more than names.
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
        r"[^:]+:[^:]+",
    )
]
_VALUE_KINDS = 5
_POINTS_KINDS = (3, 4)
_INDEX = re.compile(r"_?\{?\d+\}?$")
_CAPITAL = re.compile(r"[A-Z]'*")
_LETTER_RUN = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]+")
_CASELESS = re.compile(r"[a-zA-Z]*[a-z]{3}[a-zA-Z]*|(?i:no)")
_UNIT_TAIL = re.compile(r"\s+(?:(?:square|cubic)\s+)?(?:units?|[cmk]m|inch(?:es)?|feet)(?:\s*\^\s*\{?\s*[23]\s*\}?)?$")
_BLANKS = re.compile(r"\s*[;\n]\s*")
_SOLUTIONS = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*\\(?:lor|vee)(?![a-zA-Z])\s*", re.I)
_PLUS_MINUS = re.compile(r"(?P<operand>[\w)}°%]\s*)?\\pm(?![a-zA-Z])\s*")
# What may stand for several solutions without a comma.
_SEVERAL = re.compile(r"\\(?:pm|mp|cup|le|ge|\{)(?![a-zA-Z])|[<>]")
_BRACKET = re.compile(r"\\[{}]|[()\[\]{}]")
_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?<!begin\{)(?<!end\{)"
    r"(?!(?:sinh|cosh|tanh|arcsin|arccos|arctan|sqrt)(?![a-z]))[a-zA-Z]{4}"
)
_TWO_NUMBERS = re.compile(r"(?<![_\d])\d+\s+\d")
_LETTERS_ONLY = re.compile(r"[^\W\d_]{2,}")
_PUNCTUATION = re.compile(r"[\"'“”‘’()\[\]{}!?;:*\\]|[.,](?!\d)|(?<!\d)[.,]|(?<=[^\W\d])-(?=[^\W\d])")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b(?=\s+\S)")


def grade(answer_type: str, answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Whether an answer is right.

    Args:
        answer_type: a key of `GRADERS`.
        answer, truth: as the model and the data set wrote them.
        choices: texts of the choices A, B, C, ...; empty if there are none or they aren't known.
        tolerance: absolute, for numbers; 0 for the default of `quantity.agree`.
    """
    answer, truth = answer.strip(), truth.strip()
    if answer == truth:
        return True
    if not answer or len(answer) > MAX_CHARS or _depth(answer) > MAX_DEPTH:
        return False
    return GRADERS[answer_type](answer, truth, choices, tolerance)


def _number(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """A real number, with or without a unit; constant expressions count, computer algebra doesn't."""
    answer, truth = clean(answer), clean(truth)
    given, wanted = quantity(answer, glued_units=True), quantity(truth, glued_units=True)
    if given is None or wanted is None:
        return canonical(answer) == canonical(truth)
    return agree(given, wanted, tolerance)


def _math(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Expressions, equations, points, intervals, sets and lists of them, see `same`."""
    if CIRCLED.search(truth):
        # (1)(2)(4) is no product where ①②④ is asked for.
        answer = _BETWEEN_BRACKETS.sub("),(", answer)
    dressed, letter = _DRESSED.fullmatch(clean(truth)), _LETTER.fullmatch(clean(answer))
    if dressed and letter:
        return letter[1].upper() in dressed.groups()
    try:
        return same(answer, truth, tolerance, _leave_undecided)
    except _Undecided:
        return not _hopeless(answer) and symbolic.equal(answer, truth, tolerance)


def _choice(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """The letter of a choice, or its text.

    A capital letter is always a label, even where the choices are letters themselves; a small letter only if no choice
    reads like that. Where letter and text contradict each other, the letter counts.
    """
    texts = _unlabelled(choices)
    given, wanted = _chosen(answer, texts), _chosen(truth, texts)
    if given is not None and wanted is not None:
        return given == wanted
    if given is not None:
        return given < len(texts) and _math(texts[given], truth, [], tolerance)
    if wanted is not None:
        return wanted < len(texts) and _math(answer, texts[wanted], [], tolerance)
    return _math(answer, truth, [], tolerance)


def _multi_choice(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """A set of choices, by their letters in any order ("A, C", "AC", "C and A") or by their texts."""
    texts = _unlabelled(choices)
    wanted = _all_chosen(truth, texts)
    return wanted is not None and _all_chosen(answer, texts) == wanted


def _list(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """The blanks of a question in their order, separated by semicolons or lines, else by commas or "and"."""
    answers, truths = _in_order(answer), _in_order(truth)
    return len(answers) == len(truths) and _math(";".join(answers), ";".join(truths), [], tolerance)


def _text(answer: str, truth: str, choices: list[str], tolerance: float) -> bool:
    """Words: case, spacing, punctuation and articles don't count."""
    return _same_words(clean(answer), clean(truth))


GRADERS = {
    "number": _number,
    "math": _math,
    "choice": _choice,
    "multi_choice": _multi_choice,
    "list": _list,
    "text": _text,
}


class _Undecided(Exception):
    pass


def _leave_undecided(answer: str, truth: str, tolerance: float) -> bool:
    raise _Undecided


def same(answer: str, truth: str, tolerance: float, leaf: Leaf) -> bool:
    """Whether two pieces of mathematics are the same.

    Semicolons and lines separate the blanks of a question: their order counts. Commas, "and" and "or" separate
    solutions: it doesn't. In points and intervals order and brackets count, in sets order doesn't.

    Args:
        leaf: asked about what neither spelling, numbers nor structure decides.
    """
    answer, truth = clean(answer), clean(truth)
    equated, equated_truth = _equated_names(answer), _equated_names(truth)
    if equated and equated_truth:
        return equated == equated_truth
    answer, truth = (_POINT.sub(r"\1=", _GEOMETRIC.sub(" ", text).strip()) for text in (answer, truth))
    if canonical(answer) == canonical(truth):
        return bool(truth)
    given, wanted = quantity(answer), quantity(truth)
    if given is not None and wanted is not None:
        return not _other_name(answer, truth) and agree(given, wanted, tolerance)

    blanks = _split(truth, _BLANKS)
    truths = blanks if len(blanks) > 1 else _solutions(truth)
    answers = _split(answer, _BLANKS)
    if len(answers) == 1 or truths is not blanks:
        answers = [solution for blank in answers for solution in _solutions(blank)]
    if len(answers) > 1 and len(truths) > 1:
        return _same_elements(answers, truths, truths is blanks, tolerance, leaf)
    if len(answers) != len(truths) and not _SEVERAL.search(answer + truth):
        return False
    ratios = answer.split(":"), truth.split(":")
    if max(map(len, ratios)) > 2:
        scaled = ([f"{term}:{terms[0]}" for term in terms[1:]] for terms in ratios)
        return len(ratios[0]) == len(ratios[1]) and (
            _same_elements(*ratios, True, tolerance, leaf) or _same_elements(*scaled, True, tolerance, leaf)
        )
    bracketed, bracketed_truth = _bracketed(answer), _bracketed(truth)
    if bracketed and bracketed_truth:
        (brackets, answers), (brackets_truth, truths) = bracketed, bracketed_truth
        ordered = brackets != (r"\{", r"\}")
        return brackets == brackets_truth and _same_elements(answers, truths, ordered, tolerance, leaf)

    (name, value), (name_truth, value_truth) = split_name(answer), split_name(truth)
    if name and name_truth:
        return not _other_name(answer, truth) and same(value, value_truth, tolerance, leaf)
    if name and "=" not in truth:
        return same(value, truth, tolerance, leaf)
    if name_truth and "=" not in answer:
        return same(answer, value_truth, tolerance, leaf)
    if _other_letters(answer, truth):
        return False
    answer, truth = _UNIT_TAIL.sub("", answer), _UNIT_TAIL.sub("", truth)
    keys = canonical(answer), canonical(truth)
    if all(map(_LETTERS_ONLY.fullmatch, keys)) or any(map(_WORD.search, (answer, truth))):
        points = _one_name(answer)
        return _same_words(answer, truth) or bool(points and points[0] in _POINTS_KINDS and points == _one_name(truth))
    if any(map(_TWO_NUMBERS.search, (answer, truth))):
        # Parsers take the space for a product or a sum.
        return False
    return leaf(answer, truth, tolerance)


def _other_name(answer: str, truth: str) -> bool:
    # x = 5 isn't y = 5, but "h = 5" and "height = 5" may well be the same.
    names = [_one_name(split_name(side)[0]) for side in (answer, truth)]
    return None not in names and names[0][0] == names[1][0] and names[0] != names[1]


def _one_name(text: str) -> tuple[int, str] | None:
    """Kind and normal form of a name, None if it is of no kind that tells. A segment or angle has two names."""
    name = canonical(_GEOMETRIC.sub(" ", text)).replace("{", "").replace("}", "")
    for kind, pattern in enumerate(_NAME_KINDS):
        if pattern.fullmatch(name):
            backwards = "".join(reversed(_CAPITAL.findall(name)))
            return kind, min(name, backwards) if kind in _POINTS_KINDS else name
    return None


def _equated_names(cleaned: str) -> list[tuple[int, str]] | None:
    """The sides of AB = CD in a fixed order; None where anything but a name is a side."""
    sides = cleaned.split("=")
    if not 1 < len(sides) <= MAX_ELEMENTS or any(side.strip().isdigit() for side in sides):
        return None
    names = [_one_name(side) for side in sides]
    return sorted(names) if all(name and name[0] < _VALUE_KINDS for name in names) else None


def _other_letters(answer: str, truth: str) -> bool:
    """Whether letters differ in their primes, or in nothing but case where they aren't words."""
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
    if len(answers) != len(truths) or len(truths) > MAX_ELEMENTS:
        return False
    # Which root is x_1 and which x_2 is nobody's concern.
    names, names_truth = (
        [_INDEX.sub("", canonical(split_name(side)[0])) for side in sides] for sides in (answers, truths)
    )
    if not ordered and any(all(some) and len(set(some)) == len(truths) for some in (names, names_truth)):
        # x = 2, y = 3 is to be compared by names, or in order with 2, 3.
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


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.finditer(text):
        depth += 1 if bracket[0][-1] in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def _split(text: str, separator: re.Pattern) -> list[str]:
    """The non-empty pieces between the separators that stand in no bracket."""
    pieces, start, depth = [], 0, 0
    for token in re.finditer(f"(?P<separator>{separator.pattern})|{_BRACKET.pattern}", text, separator.flags):
        if token["separator"] is None:
            depth += 1 if token[0][-1] in "([{" else -1
        elif depth <= 0:
            pieces.append(text[start : token.start()])
            start = token.end()
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()]


_COMMA = re.compile(r",")
# 1,234 is a number, 1, 234 and 12,3 are two.
_COMMA_OUTSIDE_NUMBERS = re.compile(r",(?!(?<=\d,)\d{3}(?!\d))")


def _solutions(text: str) -> list[str]:
    pieces = [piece for part in _split(text, _SOLUTIONS) for piece in _split(part, _COMMA_OUTSIDE_NUMBERS)]
    return [solution for piece in pieces for solution in _both_signs(piece)]


def _both_signs(text: str) -> list[str]:
    if len(_PLUS_MINUS.findall(text)) != 1 or r"\mp" in text:
        return [text]
    plus = _PLUS_MINUS.sub(lambda m: m["operand"] + "+" if m["operand"] else "", text)
    return [plus, _PLUS_MINUS.sub(lambda m: (m["operand"] or "") + "-", text)]


def _bracketed(text: str) -> tuple[tuple[str, str], list[str]] | None:
    """Brackets and elements of a point, interval or set; None for anything else, such as (a + b)(a - b)."""
    brackets = list(_BRACKET.finditer(text))
    if len(brackets) < 2 or brackets[0].start() != 0 or brackets[-1].end() != len(text):
        return None
    opening, closing = brackets[0][0], brackets[-1][0]
    if opening not in ("(", "[", r"\{") or closing not in (")", "]", r"\}"):
        return None
    depth = 0
    for bracket in brackets[:-1]:
        depth += 1 if bracket[0][-1] in "([{" else -1
        if depth == 0:
            return None
    elements = _split(text[len(opening) : -len(closing)], _COMMA)
    return ((opening, closing), elements) if len(elements) > 1 else None


def _hopeless(answer: str) -> bool:
    return len(answer) > MAX_SYMBOLIC_CHARS or _HOPELESS.search(clean(answer)) is not None


def _unlabelled(choices: list[str]) -> list[str]:
    """The texts of the choices, without the letters that some data sets write before them."""
    texts = []
    for index, choice in enumerate(choices):
        label = _OWN_LABEL.match(choice)
        texts.append(choice[label.end() :] if label and ord(label[1]) - ord("A") == index else choice)
    return texts


def _chosen(text: str, texts: list[str]) -> int | None:
    """The index of the choice that a text names."""
    text = clean(text)
    letter = _LETTER.fullmatch(text)
    label = letter or _LABEL.match(text)
    named = next(filter(None, label.groups()), None) if label else None
    if named and not letter and _lists_others(text[label.end() :], named, texts):
        named = None
    with_text = _LABEL_AND_TEXT.fullmatch(text)
    if not label and with_text and _is_text_of(with_text["text"], with_text[1], texts):
        named = with_text[1]
    if named and texts and _index(named) >= len(texts):
        named = None
    if named and named.isupper():
        return _index(named)
    cleaned = [clean(choice) for choice in texts]
    if text in cleaned:
        return cleaned.index(text)
    for index, choice in enumerate(cleaned):
        if _same_words(text, choice):
            return index
    return _index(named) if named else None


def _lists_others(rest: str, named: str, texts: list[str]) -> bool:
    """Whether what follows a label names other choices as well, as in "(A) 5 (B) 6"."""
    others = {next(filter(None, label)) for label in _OTHER_LABEL.findall(rest)} - {named.upper()}
    if texts:
        others = {other for other in others if _index(other) < len(texts)}
    return bool(others) and not (texts and _is_text_of(rest, named, texts))


def _is_text_of(rest: str, named: str, texts: list[str]) -> bool:
    if not texts:
        # "B, 6"; "A cat" may be words.
        return rest[0].isdigit()
    return _index(named) < len(texts) and _same_words(rest, clean(texts[_index(named)]))


def _index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _all_chosen(text: str, texts: list[str]) -> frozenset[int] | None:
    text = _BEFORE_LETTERS.sub("", clean(text), count=1)
    if _LETTERS.fullmatch(text) and (text.isupper() or _chosen(text, texts) is None):
        return frozenset(map(_index, text))
    parts = [part for part in _BETWEEN_LETTERS.split(text) if part]
    if parts and all(map(_LETTER.fullmatch, parts)):
        return frozenset(_index(_LETTER.fullmatch(part)[1]) for part in parts)
    chosen = [_chosen(part, texts) for part in _BETWEEN_CHOICES.split(text)]
    return None if None in chosen else frozenset(chosen)


def _in_order(text: str) -> list[str]:
    text = clean(text)
    bracketed = _bracketed(text)
    if bracketed:
        elements = bracketed[1]
    else:
        blanks = _split(text, _BLANKS)
        elements = blanks if len(blanks) > 1 else _solutions(text)
    return [element.strip("'\" ") for element in elements]


def _same_words(answer: str, truth: str) -> bool:
    plain, plain_truth = _plain(answer), _plain(truth)
    return plain == plain_truth if plain_truth else canonical(answer) == canonical(truth)


def _plain(cleaned: str) -> str:
    words = " ".join(_PUNCTUATION.sub(" ", cleaned.casefold()).split())
    return _ARTICLE.sub("", words).replace("  ", " ").strip()
