# SPDX-License-Identifier: Apache-2.0
"""Find the answer in a response and check the response's form. Both take time linear in its length."""

import re

# Only this much of the end is searched: answers come last.
TAIL_CHARS = 100_000
PHRASE_CHARS = 4_000
# A response up to this length may be the bare answer.
SHORT_CHARS = 100

_BOX_TOKEN = re.compile(r"(?P<box>\\?(?:boxed|fbox)\s*\{)|\\[^a-zA-Z]|(?P<open>\{)|(?P<close>\})")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([^\s{}$\\]+)")
_PHRASE = re.compile(
    r"\b(?:answer\b[\w ]{0,40}?|(?:option|choice)\b)(?:\s(?:is|are|would be|must be)\b|\s?[:=])[:\s]{0,5}", re.I
)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n|。")


def well_formed(text: str) -> bool:
    """Return True if a response is `<think>...</think>...\\boxed{...}...`, as verl's geo3k reward checks it."""
    if not text.startswith("<think>"):
        return False
    end = text.find("</think>", len("<think>"))
    box = text.find(r"\boxed{", end)
    return end >= 0 and box >= 0 and text.find("}", box) >= 0


def answer_of(text: str) -> str | None:
    """Return the answer that a response gives, None if it gives none.

    Searches the text after the last `</think>`, or the whole response if there is none, in this order:

    1. the `\\boxed{...}` or `\\fbox{...}` that ends last, with balanced braces; a truncated box doesn't count;
    2. the word after the last `\\boxed` without braces;
    3. the last `<answer>...</answer>`;
    4. the text after the last "answer is", "answer:", "option is", ... up to the end of the sentence or line;
    5. the whole text, if it is short.
    """
    text = text.rpartition("</think>")[2][-TAIL_CHARS:]
    box = _last_box(text)
    if box is not None:
        return box
    bare = _BARE_BOX.findall(text)
    if bare:
        return bare[-1]
    _, tag, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
    found = answer if tag else _by_phrase(text)
    # An unclosed box is a truncated answer.
    return None if found is None or "boxed" in found or "fbox" in found else found.strip()


def _last_box(text: str) -> str | None:
    last = None
    # For each open brace, the start of its box's content; None if it doesn't open a box.
    unclosed: list[int | None] = []
    for token in _BOX_TOKEN.finditer(text):
        if token["box"]:
            unclosed.append(token.end())
        elif token["open"]:
            unclosed.append(None)
        elif token["close"] and unclosed:
            start = unclosed.pop()
            if start is not None:
                last = text[start : token.start()]
    return None if last is None else last.strip()


def _by_phrase(text: str) -> str | None:
    tail = text[-PHRASE_CHARS:].replace("**", "")
    phrases = list(_PHRASE.finditer(tail))
    if phrases:
        return _SENTENCE_END.split(tail[phrases[-1].end() :], maxsplit=1)[0]
    return text if 0 < len(text.strip()) <= SHORT_CHARS else None
