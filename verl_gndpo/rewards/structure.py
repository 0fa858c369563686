# SPDX-License-Identifier: Apache-2.0
"""Split an answer into its parts: blanks, solutions, and the elements of points, intervals and sets."""

import re
from typing import NamedTuple

_BLANKS = re.compile(r"\s*[;\n]\s*")
_SOLUTIONS = re.compile(r"\s*,?\s+(?:and|or)\s+|\s*\\(?:lor|vee)(?![a-zA-Z])\s*", re.I)
_COMMA = re.compile(r",")
# 1,234 is one number; 1, 234 and 12,3 are two.
_COMMA_OUTSIDE_NUMBERS = re.compile(r",(?!(?<=\d,)\d{3}(?!\d))")
_PLUS_MINUS = re.compile(r"(?P<operand>[\w)}°%]\s*)?\\pm(?![a-zA-Z])\s*")
_BRACKET = re.compile(r"\\[{}]|[()\[\]{}]")


# (1) 120 (2) 70, or one part per line. Capital letters label choices.
_PART = re.compile(
    r"(?:\b(?:part|blank)\s*(?=\())?"
    r"(?:\(\s*(?P<round>\d{1,2}|[a-h]|[ivx]{1,4})\s*\)|(?<![\w(])(?P<half>\d{1,2}|[a-h])\)|^\s*(?P<line>\d{1,2})\.\s"
    r"|\b(?:part|blank)\s+(?P<bare>\d{1,2}|[a-h])(?=\s*[:.]))"
    r"\s*[:.]?\s*",
    re.I | re.M,
)
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")
_CONTENT = re.compile(r"(?!(?:and|or|to)\b\W*$)(?=[^a-zA-Z\d]*[a-zA-Z\d])(?![-+*/=^<>,)])")
_ALTERNATIVE = re.compile(
    r"(?P<first>.*\S)\s*[(（]\s*(?:(?:or|also)\b|或者?)\s*(?:fill in|write|written as|equivalently|填|写成|[:,])?"
    r"\s*(?P<second>\S.*)[)）]"
    r"\s*[.$]*",
    re.S,
)


class Group(NamedTuple):
    """A point, an interval or a set: its opening and closing bracket, and its elements."""

    brackets: tuple[str, str]
    elements: list[str]


def bracket_depth(text: str) -> int:
    """Return how deeply brackets are nested."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(text):
        depth += _step(bracket)
        deepest = max(deepest, depth)
    return deepest


def split_blanks(text: str) -> list[str]:
    """Split the answers to the blanks of one question.

    They stand between semicolons, on lines of their own, or after the labels (1), (2), ... or (a), (b), ...
    """
    return _parts(text) or _split(text, _BLANKS)


def split_alternatives(text: str) -> list[str]:
    """Return the two forms of an answer such as `35/4 (or 8.75)`, else only the text itself."""
    alternative = _ALTERNATIVE.fullmatch(text)
    return [alternative["first"], alternative["second"]] if alternative else [text]


def _parts(text: str) -> list[str]:
    """Return what follows the labels of all parts, in order; empty if the text doesn't consist of labelled parts.

    A label (1) may stand alone: as a factor it changes nothing.
    """
    labels: list[re.Match[str]] = []
    for label in _PART.finditer(text):
        number = len(labels) + 1
        name = label[label.lastgroup or 0].lower()
        follows = labels or not text[: label.start()].strip()
        if follows and number <= len(_ROMAN) and name in (str(number), chr(ord("a") + number - 1), _ROMAN[number - 1]):
            labels.append(label)
    if not labels:
        return []
    ends = [label.start() for label in labels[1:]] + [len(text)]
    parts = [text[label.end() : end].strip(" ;,.\n") for label, end in zip(labels, ends, strict=True)]
    if not all(map(_CONTENT.match, parts)):
        return []
    alone = len(parts) == 1 and labels[0]["round"] == "1" and labels[0][0][-1].isspace()
    return parts if len(parts) > 1 or alone else []


def split_solutions(text: str) -> list[str]:
    """Split solutions at commas, "and" and "or"; `\\pm` makes two solutions."""
    pieces = [piece for part in _split(text, _SOLUTIONS) for piece in _split(part, _COMMA_OUTSIDE_NUMBERS)]
    return [solution for piece in pieces for solution in _both_signs(piece)]


def read_group(text: str) -> Group | None:
    """Read a point, interval or set. Return None for any other text, such as (a + b)(a - b)."""
    brackets = list(_BRACKET.finditer(text))
    if len(brackets) < 2 or brackets[0].start() != 0 or brackets[-1].end() != len(text):
        return None
    opening, closing = brackets[0][0], brackets[-1][0]
    if opening not in ("(", "[", r"\{") or closing not in (")", "]", r"\}"):
        return None
    depth = 0
    for bracket in brackets[:-1]:
        depth += _step(bracket)
        if depth == 0:
            return None
    elements = _split(text[len(opening) : -len(closing)], _COMMA)
    return Group((opening, closing), elements) if len(elements) > 1 else None


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Return the non-empty pieces between the separators that are outside brackets."""
    pieces, start, depth = [], 0, 0
    for token in re.finditer(f"(?P<separator>{separator.pattern})|{_BRACKET.pattern}", text, separator.flags):
        if token["separator"] is None:
            depth += _step(token)
        elif depth <= 0:
            pieces.append(text[start : token.start()])
            start = token.end()
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()]


def _step(bracket: re.Match[str]) -> int:
    return 1 if bracket[0][-1] in "([{" else -1


def _both_signs(text: str) -> list[str]:
    if len(_PLUS_MINUS.findall(text)) != 1 or r"\mp" in text:
        return [text]
    plus = _PLUS_MINUS.sub(lambda m: m["operand"] + "+" if m["operand"] else "", text)
    return [plus, _PLUS_MINUS.sub(lambda m: (m["operand"] or "") + "-", text)]
