# SPDX-License-Identifier: Apache-2.0
"""Put a question into the messages that the model receives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from .errors import ConversionError, one_line
from .text import FOREIGN_PLACEHOLDERS, IMAGE_PLACEHOLDER, SPECIAL_TOKEN

QUESTION = "{question}"
# The instruction is a paragraph of its own, because a question may end with a list of choices or without a full stop.
STYLES = {
    # The published recipe's form, think first and box the answer, which verl's Geometry3K reward scores.
    "think_boxed": (
        "{question}\n\nWork through the problem inside <think> </think> tags first. "
        "After the closing tag, state only the final answer, written as \\boxed{answer}."
    ),
    "boxed": "{question}\n\nReason step by step, and write the final answer as \\boxed{answer}.",
    "plain": "{question}",
}


@dataclass(frozen=True)
class Prompt:
    """A prompt template.

    Args:
        name: the style's name, or the template's file name.
        user: user message, with `{question}` in place of the question.
        system: system message; "" for none.
    """

    name: str
    user: str
    system: str = ""

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return the messages for one question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user.replace(QUESTION, question)}]


def load_prompt(style: str) -> Prompt:
    """Load a prompt template.

    Args:
        style: name of a style, a text file with the user message, or a YAML file with `user` and `system`. A user
            message without `{question}` follows the question.

    Raises:
        ConversionError: there is no such style or file, or verl's reader would not keep the template as it is.
    """
    if style in STYLES:
        return Prompt(style, STYLES[style])
    path = Path(style).expanduser()
    if not path.is_file():
        raise ConversionError(f"--prompt_style {style}: neither one of {', '.join(STYLES)} nor a file.")
    try:
        text = path.read_text(encoding="utf-8")
        fields = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else {"user": text.strip()}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConversionError(f"--prompt_style {style} is not a readable file ({one_line(error)}).") from error
    if not isinstance(fields, dict) or not set(fields) <= {"user", "system"}:
        found = ", ".join(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
        raise ConversionError(f"--prompt_style {style}: expected the keys user and system, found {found}.")
    user, system = fields.get("user") or QUESTION, fields.get("system") or ""
    if not (isinstance(user, str) and isinstance(system, str)) or user.count(QUESTION) > 1:
        raise ConversionError(f"--prompt_style {style}: user and system have to be text, with {QUESTION} once in user.")
    prompt = Prompt(path.name, user if QUESTION in user else f"{QUESTION}\n{user}", system)
    texts = prompt.user + prompt.system
    if marks := [mark for mark in (IMAGE_PLACEHOLDER, *FOREIGN_PLACEHOLDERS) if mark in texts]:
        raise ConversionError(f"--prompt_style {style}: {', '.join(marks)} would be read as a placeholder.")
    if special := SPECIAL_TOKEN.search(texts):
        raise ConversionError(f"--prompt_style {style}: {special[0]} is a special token; the chat template adds those.")
    return prompt
