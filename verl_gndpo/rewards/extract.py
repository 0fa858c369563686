# SPDX-License-Identifier: Apache-2.0
"""Find the answer in a response and check the response's form. Both take time linear in its length."""

import json
import re

from .prose import final_value, join_formulas, join_sentence, readings, stated

# Only this much of the end is searched: answers come last.
TAIL_CHARS = 100_000

_BOX_TOKEN = re.compile(r"(?P<box>\\?(?:boxed|fbox)\s*\{)|\\[^a-zA-Z]|(?P<open>\{)|(?P<close>\})")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([^\s{}$\\]+)")
_JSON = re.compile(
    r'["\'](?:(?:final|correct)[ _]?)?(?:answer|choice|option|答案)["\']\s*:\s*'
    r'(?P<value>"(?:[^"\\\n]|\\.){1,200}"|\'[^\'\n]{1,200}\'|-?\d[\d.]{0,30}|\[[^\[\]\n]{1,200}\])',
    re.I,
)
# A model that doesn't stop writes the next turn, too.
_NEXT_TURN = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end)\|>")
_OPEN_THINK = re.compile(r"<think>\s*$")
_BACKSLASH = re.compile(r'\\(?!["\\])')


def response_prefix(prompt: str) -> str:
    """Return `<think>` if a prompt ends with it, so that it belongs to the response, else ""."""
    return "<think>" if _OPEN_THINK.search(prompt) else ""


def well_formed(text: str) -> bool:
    """Return True if a response is `<think>...</think>...\\boxed{...}...`, as verl's geo3k reward checks it.

    White space before it doesn't count: some models begin with a line break.
    """
    text = text.lstrip()
    if not text.startswith("<think>"):
        return False
    end = text.find("</think>", len("<think>"))
    box = text.find(r"\boxed{", end)
    return end >= 0 and box >= 0 and text.find("}", box) >= 0


def answers_of(text: str) -> list[str]:
    """Return the answer that a response gives, in all its readings; empty if it gives none.

    The first reading is the most literal. Searches the text after the last `</think>`, or the whole response if it has
    no such tags, in this order:

    1. the `\\boxed{...}` or `\\fbox{...}` that ends last, with balanced braces; a truncated box doesn't count. Several
       boxes of one statement, such as `x=\\boxed{3}` or `x=\\boxed{5}`, are joined by semicolons. A value after "the
       final answer is" that comes later counts instead. All boxes of the last sentence are one more reading;
    2. the word after the last `\\boxed` without braces;
    3. the last "answer" of a JSON object;
    4. the last `<answer>...</answer>`;
    5. what the prose states, see `prose.stated`.

    A response that never closes its `<think>` gives no answer.
    """
    _, _, text = text.rpartition("</think>")
    if "<think>" in text:
        return []
    text = _NEXT_TURN.split(text[-TAIL_CHARS:], maxsplit=1)[0]
    boxes = _boxes(text)
    if boxes:
        corrected = final_value(text[boxes[-1][3] :])
        of_boxes = readings(corrected or join_formulas(text, boxes))
        together = join_sentence(text, boxes)
        return of_boxes if corrected or ";" not in together or together in of_boxes else [*of_boxes, together]
    bare = _BARE_BOX.findall(text)
    if bare:
        return [bare[-1]]
    found = _from_json(text)
    if found is None:
        _, tag, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
        found = readings(answer) if tag else stated(text)
    # An unclosed box is a truncated answer.
    return [reading for reading in found if "boxed" not in reading and "fbox" not in reading]


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
    """Return for each outermost closed box its start, the start and end of its content, and its end."""
    boxes: list[tuple[int, int, int, int]] = []
    # For each open brace, the match that opened a box; None if it doesn't open a box.
    unclosed: list[re.Match[str] | None] = []
    for token in _BOX_TOKEN.finditer(text):
        if token["box"]:
            unclosed.append(token)
        elif token["open"]:
            unclosed.append(None)
        elif token["close"] and unclosed:
            box = unclosed.pop()
            if box is not None:
                while boxes and boxes[-1][0] > box.start():
                    boxes.pop()
                boxes.append((box.start(), box.end(), token.start(), token.end()))
    return boxes


def _from_json(text: str) -> list[str] | None:
    found = None
    for found in _JSON.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    if found["value"].startswith("'"):
        return [found["value"].strip("'")]
    try:
        # Models forget to double the backslashes of LaTeX.
        value = json.loads(_BACKSLASH.sub(r"\\\\", found["value"]))
    except ValueError:
        return None
    return ["; ".join(map(str, value)) if isinstance(value, list) else str(value)]
