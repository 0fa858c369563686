# SPDX-License-Identifier: Apache-2.0
"""We-Math to verl's parquet: multiple-choice problems, and the steps of each as problems of their own."""

from __future__ import annotations

import re
import sys
from string import ascii_uppercase
from typing import Any

from verl_gndpo.conversion import DroppedRow, Problem, Recipe, main

# In "A. a; b;B. c", a label follows a separator and precedes a text. Some options lack the semicolon.
LABEL = r"{before}{letter}[.:、．：]\s*(?=[^\s;；])"
SEPARATORS = (r"[;；]\s*", r"\s+")
# "around point ;O." and "angle AB;E." hold separators that some program put before every label-like end of a sentence.
STRAY = re.compile(r"[;；](?=[A-Z]\.$)")
NONE_OF_THEM = "No correct answer"


def separated(text: str) -> list[str]:
    """Return the texts of the options in "A. 45° B. 60° ;C. point ;O.;D. none", in order.

    Each label is the first one with the next letter, after a semicolon if possible. The last option, that no other is
    correct, may have a later letter.

    Raises:
        DroppedRow: there are fewer than two options, an empty one, or a label out of order.
    """
    rest = ";" + text.strip()
    options: list[str] = []
    for letter in ascii_uppercase:
        found = [re.search(LABEL.format(before=before, letter=letter), rest) for before in SEPARATORS]
        label = found[0] or found[1]
        if label is None or (not options and label.start() > 0):
            break
        options.append(rest[: label.start()])
        rest = rest[label.end() :]
    last, *beyond = re.split(LABEL.format(before=SEPARATORS[0], letter="[A-J]"), rest)
    options = [STRAY.sub("", option.strip(" ;；\n")) for option in [*options[1:], last, *beyond]]
    if len(options) < 2 or not all(options) or beyond not in ([], [NONE_OF_THEM]):
        raise DroppedRow("options cannot be separated", text[:60])
    return options


def problem(row: dict[str, Any]) -> Problem:
    options = tuple(separated(row["option"]))
    return Problem(
        question=row["question"],
        answer=row["answer"],
        images=row["image_path"],
        choices=options,
        list_choices=True,
        answer_type="choice",
        meta={"key": row["key"], "concept": row["knowledge concept"]},
    )


RECIPE = Recipe(
    name="wemath",
    hub_id="We-Math/We-Math",
    license="CC BY-NC 4.0",
    columns=("ID", "key", "question", "option", "answer", "image_path"),
    optional=("knowledge concept",),
    problem=problem,
    answer_types=("choice",),
    rows={"testmini": 1_740},
    download="23 MB",
    placeholders=False,
    # The steps of one problem share its ID.
    key=("ID", "key"),
    splits=("testmini",),
    default_split="testmini",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
