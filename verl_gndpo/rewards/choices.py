# SPDX-License-Identifier: Apache-2.0
"""Find which of a question's choices an answer names, by letter or by text."""

import re
from collections.abc import Sequence

from .spelling import clean, same_words

_LABEL_WORD = (
    r"(?:(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\b|:)?"
    r"|故?(?:应?选择?|答案[是为选]?)\s*:?)\s*)?"
)
_LETTER = re.compile(_LABEL_WORD + r"[(\[]?\s*([A-Z])\s*[)\]]?\s*[.:]?", re.I)
_LABEL = re.compile(
    _LABEL_WORD + r"(?:[(\[]\s*([A-Z])\s*[)\]]\s*[.:]?|([A-Z])\s*[.):])(?!\s*(?:and\b|or\b|[,;/&]))", re.I
)
_OTHER_LABEL = re.compile(r"(?<![a-zA-Z])(?:\(([A-Z])\)|([A-Z])\s*[.):])|^\s*([A-Z])$")
_LABEL_AND_TEXT = re.compile(
    _LABEL_WORD + r"(?:[(\[]\s*([A-Z])\s*[)\]]|([A-Z])[.:]?)(?:\s*,\s*|\s+(?:-\s+)?)(?P<text>\S.*)", re.S
)
_OPERATORS = {
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    "plus": "+",
    "minus": "-",
    "times": "*",
    "divided by": "/",
} | {
    "addition": "+",
    "subtraction": "-",
    "multiplication": "*",
    "division": "/",
}
_OWN_LABEL = re.compile(r"\s*\(?([A-Z])\s*[.:)]\s*(?=\S)")
_LABELLED_TRUTH = re.compile(r"\(([A-Z])\)|([A-Z])[.)]\s.*", re.S)
# Small letters only in alphabetical order: "ac" names two choices, "cab" is a word.
_LETTERS = re.compile(r"[A-Z]{2,26}|(?=..)a?b?c?d?e?f?g?h?")
_BEFORE_LETTERS = re.compile(r"^(?:both|options|choices|answers)\b\s*:?\s*", re.I)
_BOTH = re.compile(r"^both\s+", re.I)
_BETWEEN_LETTERS = re.compile(r"\s*(?:[,;&/+]|\band\b)\s*|\s+|(?<=\))(?=\()", re.I)
_BETWEEN_CHOICES = re.compile(r"\s*[;\n]\s*")


def remove_labels(choices: list[str]) -> list[str]:
    """Return the texts of the choices without the letters that some data sets write before them."""
    texts = []
    for index, choice in enumerate(choices):
        label = _OWN_LABEL.match(choice)
        texts.append(choice[label.end() :] if label and ord(label[1]) - ord("A") == index else choice)
    return texts


def chosen(text: str, texts: list[str]) -> int | None:
    """Return the index of the choice that `text` names, None if it names none or several.

    Args:
        texts: the choices, from `remove_labels`; empty if they aren't known.
    """
    text = _read(text)
    letter = _LETTER.fullmatch(text)
    cleaned = [_read(choice) for choice in texts]
    if text in cleaned and not letter:
        # "B and C" is the text of D.
        return cleaned.index(text)
    label = letter or _LABEL.match(text)
    named = _first(label.groups()) if label else None
    if label and named and not letter and _names_others(text[label.end() :], named, texts):
        named = None
    with_text = _LABEL_AND_TEXT.fullmatch(text)
    if not label and with_text:
        letter_before = with_text[1] or with_text[2]
        named = letter_before if _is_text_of(with_text["text"], letter_before, texts) else None
    if named and texts and _index(named) >= len(texts):
        named = None
    if named and named.isupper():
        return _index(named)
    if text in cleaned:
        return cleaned.index(text)
    for index, choice in enumerate(cleaned):
        if same_words(text, choice):
            return index
    without_both = [index for index, choice in enumerate(cleaned) if same_words(text, _BOTH.sub("", choice))]
    if len(without_both) == 1:
        return without_both[0]
    return _index(named) if named else None


def all_chosen(text: str, texts: list[str]) -> frozenset[int] | None:
    """Return the indices of the choices that `text` names, None if a part of it names none.

    Args:
        texts: as for `chosen`.
    """
    text = _BEFORE_LETTERS.sub("", clean(text), count=1)
    if _LETTERS.fullmatch(text) and (text.isupper() or chosen(text, texts) is None):
        return frozenset(map(_index, text))
    letters = [bare_letter(part) for part in _BETWEEN_LETTERS.split(text) if part]
    if letters and None not in letters:
        return frozenset(_index(letter) for letter in letters if letter)
    indices = [chosen(part, texts) for part in _BETWEEN_CHOICES.split(text)]
    return None if None in indices else frozenset(index for index in indices if index is not None)


def bare_letter(cleaned: str) -> str | None:
    """Return the capital letter of a text that is only a label, such as "b", "(B)" or "Option B", else None."""
    letter = _LETTER.fullmatch(cleaned)
    return letter[1].upper() if letter else None


def truth_label(cleaned: str) -> str | None:
    """Return the letter of a ground truth written as "(B)" or "B. its text", else None.

    Math sets write the answers of their multiple-choice questions in this way.
    """
    labelled = _LABELLED_TRUTH.fullmatch(cleaned)
    return _first(labelled.groups()) if labelled else None


def _read(text: str) -> str:
    text = re.sub(r"\s*\\?&\s*", " and ", clean(text))
    return _OPERATORS.get(text.lower(), text)


def _names_others(rest: str, named: str, texts: list[str]) -> bool:
    """Return True if the text after a label names other choices as well, as in "(A) 5 (B) 6"."""
    others = {_first(label) for label in _OTHER_LABEL.findall(rest)} - {named.upper()}
    if texts:
        others = {other for other in others if other and _index(other) < len(texts)}
    return bool(others) and not (texts and _is_text_of(rest, named, texts))


def _is_text_of(rest: str, named: str, texts: list[str]) -> bool:
    """Return True if `rest` is the text of the choice `named`. Unknown texts are taken for numbers."""
    if not texts:
        # In "B, 6", B is a label; "A cat" may be words.
        return rest[0].isdigit()
    return _index(named) < len(texts) and same_words(rest, clean(texts[_index(named)]))


def _first(groups: Sequence[str | None]) -> str | None:
    """Return the only group that matched."""
    return next(filter(None, groups), None)


def _index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")
