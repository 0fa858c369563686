# SPDX-License-Identifier: Apache-2.0
"""Normalise questions and answers: placeholders, choices, and the wrappings that sources put around an answer."""

from __future__ import annotations

import re
from math import ceil, log10
from string import ascii_uppercase
from typing import TypeGuard, TypeVar

import numpy as np

from .errors import DroppedRow, one_line

T = TypeVar("T")

IMAGE_PLACEHOLDER = "<image>"
# verl splits a message at these, too, and asserts when the row has no such column.
FOREIGN_PLACEHOLDERS = ("<video>", "<audio>")
# In a text, tokenizers read these as special tokens, and processors count them as images.
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<IMG_CONTEXT>|</?img>|<(?:start|end)_of_image>")
NUMBERED_PLACEHOLDER = re.compile(r"<image[ _]?(\d{1,3})>")
IN_THE_PICTURE = "The problem is written in the picture. Solve it."
"""The question of a row whose picture holds all of it."""

WRAPPINGS = (
    re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL | re.IGNORECASE),
    re.compile(r"\$\$([^$]+)\$\$"),
    re.compile(r"\$([^$]+)\$"),
    re.compile(r"\\\(((?:(?!\\\().)+)\\\)", re.DOTALL),
    re.compile(r"\\\[((?:(?!\\\[).)+)\\\]", re.DOTALL),
)
CHOICES = "\nChoices:\n"
MAX_CHOICES = len(ascii_uppercase)
USUAL_LETTERS = 10
"""A capital letter up to J is taken for a label, a later one only if there are as many choices."""
LETTER = re.compile(r"\(?(?P<bare>[A-Z])\)?[.:]?|\\text\s*\{\s*(?P<text>[A-Z])\s*\}")
LETTER_AND_TEXT = re.compile(r"\(?(?P<bare>[A-Z])(?:\)|[.:])\s*\S.*|(?P<small>[a-z])", re.DOTALL)
LETTERS = re.compile(r"[A-Z](?:(?:\s*(?:[,;&]|\band\b)\s*|\s+)?[A-Z])+")
STATED_PRECISION = re.compile(
    r"\bdecimals\b|\bdecimal (?:place|point|digit)|\bsignificant (?:figure|digit)|\bround(?:ed|ing)?\b[^.?!]*\bto\b"
    r"|\bnearest (?:integer|whole|tenth|hundredth|thousandth|0?\.\d|1\b)",
    re.IGNORECASE,
)
# A word, or a time of day, which DynaMath writes as 5:0.
NO_FORMULA = re.compile(r"(?<![\\a-zA-Z])(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)[a-zA-Z]{2,}|\d\s*:\s*\d")
# The end of an explanation, after at least a sentence. What it states holds no words.
CONCLUSION = re.compile(
    r".{60,}[.;。∴\n]\s*(?:∴\s*)?(?:(?:therefore|thus|hence|so)\b,?\s*)?"
    r"(?:it is|the (?:final |correct )?(?:answer|option|statement|conclusion)s? (?:is|are)|故?答案[为是])\s*[:：]?\s*"
    r"(?P<answer>(?=[^\n]*[\dA-Z])(?:(?!(?<![\\a-zA-Z])[a-z]{4})[^\n;。]){1,40}?)[.。]?\s*",
    re.DOTALL | re.IGNORECASE,
)
LATEX_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# "(A) x (B) y", "A. x; B. y", "A) x B) y", or "A:40°" at the start of a line. White space or punctuation goes before.
CHOICE_MARK = re.compile(
    r"(?:^|(?<=[\s;,.:?)\]】]))(?:\((?P<round>[A-Z])\)|(?P<plain>[A-Z])[.:、)](?!\d))\s*|^(?P<first>[A-Z])[.:、)]\s*",
    re.MULTILINE,
)


def without_placeholders(text: str) -> str:
    """Return the text without `<image>`, `<image1>` and so on."""
    return NUMBERED_PLACEHOLDER.sub("", text).replace(IMAGE_PLACEHOLDER, "")


def checked_text(value: object, what: str) -> str:
    """Return `value` if it is valid Unicode text with more than placeholders and white space.

    Raises:
        DroppedRow: it is anything else.
    """
    bare = without_placeholders(value) if isinstance(value, str) else value
    if bare is None or (isinstance(bare, str) and not bare.strip()):
        raise DroppedRow(f"no {what}")
    if not isinstance(value, str):
        raise DroppedRow(f"{what} is not text", f"{type(value).__name__} {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DroppedRow("text is not valid Unicode", one_line(error)) from error
    return value


def place_images(question: str, images: list[T], repairs: list[str], expected: bool = True) -> tuple[str, list[T]]:
    """Match the placeholders of a question with its images, where there is exactly one right way to do so.

    Numbered placeholders name the images in their order. When they name several and the row has one picture, that
    picture shows all of them: it goes first, and the text keeps the names. Images without a placeholder go before the
    question.

    Args:
        question: question, with or without placeholders.
        images: images of the row.
        repairs: receives the kind of each repair.
        expected: True when the set's questions hold placeholders, so that adding a missing one counts as a repair.

    Returns:
        The question with one `<image>` for each image, and the images in the order of their placeholders.

    Raises:
        DroppedRow: there are more placeholders than images, a video or audio placeholder, a special token of some
            model, or no image.
    """
    if special := SPECIAL_TOKEN.search(question):
        raise DroppedRow("question holds a special token", special[0])
    if foreign := [mark for mark in FOREIGN_PLACEHOLDERS if mark in question]:
        raise DroppedRow("question has a video or audio placeholder", ", ".join(foreign))
    numbers = [int(number) for number in NUMBERED_PLACEHOLDER.findall(question)]
    plain = question.count(IMAGE_PLACEHOLDER)
    if numbers and not plain:
        if len(images) == 1 and len(numbers) > 1:
            repairs.append("several placeholders for one picture")
            question = IMAGE_PLACEHOLDER + NUMBERED_PLACEHOLDER.sub(lambda match: f"[image {match[1]}]", question)
            numbers = []
        elif len(images) == 1 or sorted(numbers) == list(range(1, len(images) + 1)):
            repairs.append("numbered placeholder")
            question = NUMBERED_PLACEHOLDER.sub(IMAGE_PLACEHOLDER, question)
            images = [images[number - 1] for number in numbers] if len(images) > 1 else images
            numbers = []
        plain = question.count(IMAGE_PLACEHOLDER)
    if numbers or plain > len(images):
        named = plain + len(numbers)
        raise DroppedRow("placeholders and images differ in number", f"{named} placeholders, {len(images)} images")
    if not images:
        raise DroppedRow("no image")
    if plain < len(images):
        question = IMAGE_PLACEHOLDER * (len(images) - plain) + question
        if expected:
            repairs.append("placeholder added")
    return question, images


def plain_answer(value: object, repairs: list[str]) -> str:
    """Return an answer as bare text.

    Numbers become text. `$$6$$`, `\\boxed{6}`, `<answer> 6 </answer>` and a final full stop are removed. An explanation
    that ends in "Therefore, the answer is 6." becomes 6.

    Args:
        value: the source's answer.
        repairs: receives the kind of each repair.

    Raises:
        DroppedRow: there is no answer, it is neither text nor a number, or its box is not closed.
    """
    if _is_number(value):
        repairs.append("answer was a number")
        value = _number_text(value)
    answer = checked_text(value, "answer").strip()
    bare = answer
    while (inner := _inside(bare).strip()) != bare:
        bare = inner
    if not bare.strip("$\\{}.;, "):
        raise DroppedRow("no answer", answer[:40])
    if bare != answer:
        repairs.append("answer unwrapped")
    if conclusion := CONCLUSION.fullmatch(bare):
        repairs.append("answer taken from the end of an explanation")
        bare = conclusion["answer"].strip()
    return bare


def _is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number that can be written as text."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _number_text(value: int | float) -> str:
    """Return a number as its source meant it: a column of 32-bit floats returns 1.100000023841858 for 1.1."""
    short = np.float32(value) if abs(value) < 1e30 and float(np.float32(value)) == value else value
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(short)


def _inside(answer: str) -> str:
    """Return the answer without its outermost wrapping."""
    if boxes := _boxes(answer):
        if len(boxes) == 1:
            return answer[boxes[0][1] : boxes[0][2] - 1]
        # Each part of the answer has a box of its own.
        for start, inner, end in reversed(boxes):
            answer = answer[:start] + answer[inner : end - 1] + answer[end:]
        return answer
    for wrapping in WRAPPINGS:
        if match := wrapping.fullmatch(answer):
            return match[1]
    # "25°." ends a sentence; "..." and "\\right." are part of the answer.
    ends = answer.endswith(".") and not answer.endswith(("..", "\\right.", "\\left."))
    return answer[:-1] if ends else answer


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Return for each outermost box its start, the start of its content, and its end."""
    boxes: list[tuple[int, int, int]] = []
    for box in LATEX_BOX.finditer(text):
        if boxes and box.start() < boxes[-1][2]:
            continue
        depth = 1
        for mark in re.finditer(r"\\.|[{}]", text[box.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            if depth == 0:
                boxes.append((box.start(), box.end(), box.end() + mark.end()))
                break
        else:
            raise DroppedRow("box of the answer is not closed", text[:40])
    return boxes


def tagged_answer(solution: object) -> object:
    """Return the content of the last `<answer> </answer>` of a solution; return a solution that is not text unchanged.

    Raises:
        DroppedRow: the solution is text without `<answer> </answer>`.
    """
    if not isinstance(solution, str):
        return solution
    start = solution.rfind("<answer>")
    end = solution.find("</answer>", start)
    if start < 0 or end < 0:
        raise DroppedRow("solution has no <answer>", solution[:40])
    return solution[start + len("<answer>") : end]


def is_formula(answer: object) -> bool:
    """Return True if an answer is text with a number in it and no words, such as `y = 4` or `(3.000, -1.000)`."""
    return isinstance(answer, str) and bool(re.search(r"\d", answer)) and not NO_FORMULA.search(answer)


def typed_answer(answer: str, choices: tuple[str, ...], kind: str | None) -> tuple[str, str]:
    """Return an answer in the form that its grader expects, and its answer type.

    Args:
        answer: bare answer, from `plain_answer`.
        choices: texts of the choices A, B, C, ...; empty when there are none, or when only the picture shows them.
        kind: answer type from the converter. None infers it: a letter such as "B" or "(B)" and the text of a choice
            are "choice", several letters are "multi_choice" when there are choices. Anything else is "math" without
            choices; with choices it stays "choice", which no answer can match if it equals none of them.

    Raises:
        DroppedRow: the answer is a letter beyond the choices.
    """
    if kind not in (None, "choice"):
        return answer, kind
    texts = [choice.casefold() for choice in choices]
    labels = ascii_uppercase[: max(USUAL_LETTERS, len(choices))]
    # A capital letter is a label, even if the texts of the choices are letters themselves.
    if (named := LETTER.fullmatch(answer)) and _matched(named) in labels:
        letter = _matched(named)
    elif texts.count(answer.casefold()) == 1:
        letter = chr(ord("A") + texts.index(answer.casefold()))
    elif choices and (named := LETTER_AND_TEXT.fullmatch(answer)) and _matched(named).upper() in labels:
        letter = _matched(named).upper()
    elif (
        choices
        and kind is None
        and LETTERS.fullmatch(answer)
        and set(letters := re.findall("[A-Z]", answer)) <= {*labels}
    ):
        return ", ".join(letters), "multi_choice"
    else:
        return answer, "choice" if choices else kind or "math"
    if choices and ord(letter) - ord("A") >= len(choices):
        raise DroppedRow("answer names no choice", f"{letter} of {len(choices)}")
    return letter, "choice"


def _matched(match: re.Match[str]) -> str:
    """Return the text of the one named group that took part in a match."""
    return next(text for text in match.groupdict().values() if text is not None)


def plain_choices(choices: tuple[object, ...]) -> tuple[str, ...]:
    """Return the texts of the choices without the letters that some sources repeat in them.

    "A. 5" and "(A) 5" become "5".

    Raises:
        DroppedRow: a choice is neither text nor a number, or there are more choices than letters.
    """
    if len(choices) > MAX_CHOICES:
        raise DroppedRow("more choices than letters", f"{len(choices)} choices")
    plain = []
    for letter, choice in zip(ascii_uppercase, choices, strict=False):
        text = checked_text(_number_text(choice) if _is_number(choice) else choice, "choice").strip()
        plain.append(re.sub(rf"^(?:\({letter}\)|{letter}[.:、)．：])\s*(?=\S)", "", text))
    return tuple(plain)


def listed_choices(question: str, choices: tuple[str, ...]) -> str:
    """Return the question with its choices below it, one per line."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return question.rstrip() + CHOICES + "\n".join(lines)


def split_choices(text: str) -> tuple[str, ...]:
    """Return the texts of the choices that a text lists as "(A) .. (B) .." or "A. ..; B. ..".

    The result is () when the text has no list with the letters A, B, C, ... in order.
    """
    marks = list(CHOICE_MARK.finditer(text))
    # A list that starts again, as in "choose from A. B. (A) .. (B) ..", counts from its last A.
    for start in reversed([place for place, mark in enumerate(marks) if _matched(mark) == "A"]):
        in_parentheses = marks[start]["round"] is not None
        # In "(A) from A. to C. (B) ..", only the marks that look like the first one begin a choice.
        alike = [mark for mark in marks[start:] if (mark["round"] is not None) == in_parentheses]
        if choices := _between(text, marks[start:]) or _between(text, alike):
            return choices
    return ()


def _between(text: str, marks: list[re.Match[str]]) -> tuple[str, ...]:
    """Return the texts that follow the marks A, B, C, ...; () if there is another order, or a text is empty."""
    taken: list[re.Match[str]] = []
    for mark in marks:
        letter, expected = _matched(mark), ascii_uppercase[len(taken) : len(taken) + 1]
        if letter == expected:
            taken.append(mark)
        elif letter in ascii_uppercase[:USUAL_LETTERS]:
            return ()
        # A later letter is more often the name of a point than a label.
    ends = [mark.start() for mark in taken[1:]] + [len(text)]
    choices = tuple(text[mark.end() : end].strip(" \t\r\n;,") for mark, end in zip(taken, ends, strict=True))
    return choices if len(choices) > 1 and all(choices) else ()


def with_decimals(question: str, tolerance: float) -> str:
    """Return the question with a request for as many decimals as an answer needs to be within a tolerance.

    A question that states a precision itself stays as it is.
    """
    if STATED_PRECISION.search(question):
        return question
    # Rounding to this many decimals changes a number by at most the tolerance. The margin is for inexact floats.
    decimals = max(0, ceil(-log10(2 * tolerance) - 1e-9))
    if decimals == 0:
        return f"{question}\nGive the answer as a whole number."
    places = f"{decimals} decimal place{'s' if decimals > 1 else ''}"
    return f"{question}\nIf the answer is not a whole number, give it to {places}."
