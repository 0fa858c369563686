# SPDX-License-Identifier: Apache-2.0
"""Questions and answers: placeholders, choices, and the wrappings that sources put around an answer."""

from __future__ import annotations

import re

import numpy as np

from .errors import DroppedRow, one_line

IMAGE_PLACEHOLDER = "<image>"
# verl splits a message at these too, and asserts when the row has no such column.
FOREIGN_PLACEHOLDERS = ("<video>", "<audio>")
# Tokenizers read these in a text as their special tokens, and processors count them as images.
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<IMG_CONTEXT>|</?img>|<(?:start|end)_of_image>")
NUMBERED_PLACEHOLDER = re.compile(r"<image[ _]?(\d{1,3})>")

WRAPPINGS = (
    re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL | re.IGNORECASE),
    re.compile(r"\$\$([^$]+)\$\$"),
    re.compile(r"\$([^$]+)\$"),
    re.compile(r"\\\(((?:(?!\\\().)+)\\\)", re.DOTALL),
    re.compile(r"\\\[((?:(?!\\\[).)+)\\\]", re.DOTALL),
)
CHOICES = "\nChoices:\n"
LETTER = re.compile(r"\(?(?P<bare>[A-J])\)?[.:]?|\\text\s*\{\s*(?P<text>[A-J])\s*\}")
LETTER_AND_TEXT = re.compile(r"\(?(?P<bare>[A-J])(?:\)|[.:])\s*\S.*|(?P<small>[a-j])", re.DOTALL)
LETTERS = re.compile(r"[A-J](?:(?:\s*(?:[,;&]|\band\b)\s*|\s+)?[A-J])+")
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
    bare = NUMBERED_PLACEHOLDER.sub("", value).replace(IMAGE_PLACEHOLDER, "") if isinstance(value, str) else value
    if bare is None or (isinstance(bare, str) and not bare.strip()):
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
    """An answer as bare text: numbers written out, `$$6$$`, `\\boxed{6}`, `<answer> 6 </answer>` and a final full stop
    taken off.

    Raises:
        DroppedRow: there is no answer, it is neither text nor a number, or its box is not closed.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100:
        repairs.append("answer was a number")
        # A float column of 32 bits hands out 1.100000023841858 for 1.1.
        short = np.float32(value) if abs(value) < 1e30 and float(np.float32(value)) == value else value
        value = str(int(value)) if value == int(value) and abs(value) < 1e15 else str(short)
    answer = checked_text(value, "answer").strip()
    bare = answer
    while (inner := _inside(bare).strip()) != bare:
        bare = inner
    if not bare.strip("$\\{}.;, "):
        raise DroppedRow("no answer", answer[:40])
    if bare != answer:
        repairs.append("answer unwrapped")
    return bare


def _inside(answer: str) -> str:
    """The answer without its outermost wrapping."""
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
    """Of each outermost box: where it starts, where its content does, and where it ends."""
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


def typed_answer(answer: str, choices: tuple[str, ...], kind: str | None) -> tuple[str, str]:
    """A bare answer as its grader wants it, and how it is graded.

    Args:
        choices: texts of the choices A, B, C, ...; empty when there are none, or when they are drawn.
        kind: what the converter says; None leaves it to the answer: a letter, dressed or not, and anything where there
            are choices, is a choice; letters are several; all else is math.

    Raises:
        DroppedRow: the answer is a letter beyond the choices.
    """
    if kind not in (None, "choice"):
        return answer, kind
    texts = [choice.casefold() for choice in choices]
    # A capital letter is a label, even where the texts of the choices are letters themselves.
    if named := LETTER.fullmatch(answer):
        letter = named[named.lastgroup]
    elif texts.count(answer.casefold()) == 1:
        letter = chr(ord("A") + texts.index(answer.casefold()))
    elif choices and (named := LETTER_AND_TEXT.fullmatch(answer)):
        letter = named[named.lastgroup].upper()
    elif choices and kind is None and LETTERS.fullmatch(answer):
        return ", ".join(re.findall("[A-J]", answer)), "multi_choice"
    else:
        return answer, kind or "math"
    if choices and ord(letter) - ord("A") >= len(choices):
        raise DroppedRow("answer names no choice", f"{letter} of {len(choices)}")
    return letter, "choice"


def plain_choices(choices: tuple) -> tuple[str, ...]:
    """Texts of the choices without the letters that some sources repeat in them: "A. 5" and "(A) 5" become "5".

    Raises:
        DroppedRow: a choice is no text.
    """
    plain = []
    for number, choice in enumerate(choices):
        letter = chr(ord("A") + number)
        text = checked_text(choice, "choice").strip()
        plain.append(re.sub(rf"^(?:\({letter}\)|{letter}[.:、)．：])\s*(?=\S)", "", text))
    return tuple(plain)


def listed_choices(question: str, choices: tuple[str, ...]) -> str:
    """The question with its choices below it, one a line."""
    lines = [f"({chr(ord('A') + number)}) {choice}" for number, choice in enumerate(choices)]
    return question.rstrip() + CHOICES + "\n".join(lines)


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
    choices = tuple(text[begin:end].strip(" \t\r\n;,") for (_, begin, _), end in zip(marks, ends, strict=True))
    return choices if all(choices) else ()
