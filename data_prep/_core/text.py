# SPDX-License-Identifier: Apache-2.0
"""Questions and answers: placeholders, choices, and the wrappings that sources put around an answer."""

from __future__ import annotations

import math
import re

from .errors import DroppedRow, one_line

IMAGE_PLACEHOLDER = "<image>"
# verl splits a message at these too, and asserts when the row has no such column.
FOREIGN_PLACEHOLDERS = ("<video>", "<audio>")
NUMBERED_PLACEHOLDER = re.compile(r"<image[ _]?(\d{1,3})>")

WRAPPINGS = (
    re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL | re.IGNORECASE),
    re.compile(r"\$\$([^$]+)\$\$"),
    re.compile(r"\$([^$]+)\$"),
    re.compile(r"\\\(((?:(?!\\\().)+)\\\)", re.DOTALL),
    re.compile(r"\\\[((?:(?!\\\[).)+)\\\]", re.DOTALL),
)
LATEX_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# "(A) x (B) y", "A. x; B. y", "A) x B) y", or one a line as "A:40°": a marker follows white space or punctuation.
CHOICE_MARK = re.compile(
    r"(?:^|(?<=[\s;,.:?)\]】]))(?:\((?P<round>[A-J])\)|(?P<plain>[A-J])[.:、)](?!\d))\s*|^(?P<first>[A-J])[.:、)]\s*",
    re.MULTILINE,
)


def checked_text(value: object, what: str) -> str:
    """`value` when it is text that UTF-8 can carry and that is more than placeholders and white space.

    Raises:
        DroppedRow: it is not.
    """
    if value is None or (isinstance(value, str) and not value.replace(IMAGE_PLACEHOLDER, "").strip()):
        raise DroppedRow(f"no {what}")
    if not isinstance(value, str):
        raise DroppedRow(f"{what} is not text", f"{type(value).__name__} {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DroppedRow("text is not valid Unicode", one_line(error)) from error
    return value


def place_images(question: str, images: list, repairs: list[str], expected: bool = True) -> tuple[str, list]:
    """Brings the placeholders of a question and its images together, where there is one right way to do so.

    Numbered placeholders name the images in their order. Where they name several and the row has one picture, that
    picture shows all of them: it goes first, and the text keeps the names. Images that no placeholder stands for come
    before the question.

    Args:
        expected: whether the set's questions hold placeholders, so that a missing one is a repair worth counting.

    Returns:
        The question with one `<image>` for each image, and the images in the order of their placeholders.

    Raises:
        DroppedRow: there are more placeholders than images, a video or audio placeholder, or no image.
    """
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
    """An answer as bare text: numbers written out, `$$6$$`, `\\boxed{6}`, `<answer> 6 </answer>` and a final full stop
    taken off.

    Raises:
        DroppedRow: there is no answer, it is neither text nor a number, or its box is not closed.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        repairs.append("answer was a number")
        value = str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
    answer = checked_text(value, "answer").strip()
    bare = answer
    while (inner := _inside(bare).strip()) and inner != bare:
        bare = inner
    if bare != answer:
        repairs.append("answer unwrapped")
    return bare


def _inside(answer: str) -> str:
    """The answer without its outermost wrapping."""
    if boxes := list(LATEX_BOX.finditer(answer)):
        return _until_closed(answer, boxes[-1].end())
    for wrapping in WRAPPINGS:
        if match := wrapping.fullmatch(answer):
            return match[1]
    # "25°." ends a sentence; "..." is part of the answer.
    return answer[:-1] if answer.endswith(".") and not answer.endswith("..") else answer


def _until_closed(text: str, start: int) -> str:
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    raise DroppedRow("box of the answer is not closed", text[:40])


def tagged_answer(solution: object) -> object:
    """What a solution's last `<answer> </answer>` holds; a solution that is no text is returned as it is.

    Raises:
        DroppedRow: the solution has none.
    """
    if not isinstance(solution, str):
        return solution
    start = solution.rfind("<answer>")
    end = solution.find("</answer>", start)
    if start < 0 or end < 0:
        raise DroppedRow("solution has no <answer>", solution[:40])
    return solution[start + len("<answer>") : end]


def answer_type(answer: str) -> str:
    """How a bare answer is graded when its converter doesn't say."""
    return "choice" if re.fullmatch(r"[A-J]", answer) else "math"


def plain_choices(choices: tuple) -> tuple[str, ...]:
    """Texts of the choices without the letters that some sources repeat in them: "A. 5" and "(A) 5" become "5".

    Raises:
        DroppedRow: a choice is no text.
    """
    plain = []
    for number, choice in enumerate(choices):
        letter = chr(ord("A") + number)
        text = checked_text(choice, "choice").strip()
        plain.append(re.sub(rf"^(?:\({letter}\)|{letter}[.:、)])\s*(?=\S)", "", text))
    return tuple(plain)


def listed_choices(question: str, choices: tuple[str, ...]) -> str:
    """The question with its choices below it, one a line."""
    lines = [f"({chr(ord('A') + number)}) {choice}" for number, choice in enumerate(choices)]
    return "\n".join([question.rstrip(), "Choices:", *lines])


def split_choices(text: str) -> tuple[str, ...]:
    """Texts of the choices that a text lists as "(A) .. (B) ..", "A. ..; B. .." or the like; () when it has no list
    that starts at A and counts on from there."""
    marks = [(match.start(), match.end(), match[match.lastgroup]) for match in CHOICE_MARK.finditer(text)]
    letters = [letter for _, _, letter in marks]
    # A list that starts anew, as in "choose from A. B. (A) .. (B) ..", counts from its last A.
    start = len(letters) - 1 - letters[::-1].index("A") if "A" in letters else 0
    marks, letters = marks[start:], letters[start:]
    if len(letters) < 2 or letters != [chr(ord("A") + number) for number in range(len(letters))]:
        return ()
    ends = [begin for begin, _, _ in marks[1:]] + [len(text)]
    return tuple(text[begin:end].strip(" \t\r\n;,") for (_, begin, _), end in zip(marks, ends, strict=True))
