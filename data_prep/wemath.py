# SPDX-License-Identifier: Apache-2.0
"""We-Math to verl's parquet: multiple-choice problems, and the steps of each as problems of their own."""

from __future__ import annotations

import re
import sys
from typing import Any

from verl_gndpo.conversion import DroppedRow, Problem, Recipe, main

# In "A. a; b;B. c" only the semicolon before a letter is a separator.
SEPARATOR = re.compile(r"\s*[;；]\s*(?=[A-J][.:、．：])")


def problem(row: dict[str, Any]) -> Problem:
    options = tuple(SEPARATOR.split(row["option"].strip()))
    if len(options) < 2 or [text[:1] for text in options] != list("ABCDEFGHIJ"[: len(options)]):
        raise DroppedRow("options cannot be separated", row["option"][:60])
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
