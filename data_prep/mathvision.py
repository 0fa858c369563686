# SPDX-License-Identifier: Apache-2.0
"""MATH-Vision to verl's parquet: competition problems with and without choices."""

from __future__ import annotations

import sys
from string import ascii_uppercase
from typing import Any

from verl_gndpo.conversion import IN_THE_PICTURE, DroppedRow, Problem, Recipe, main, without_placeholders


def problem(row: dict[str, Any]) -> Problem:
    options = row["options"] or []
    if not isinstance(options, list):
        raise DroppedRow("options are not a list", repr(options)[:60])
    # If the picture shows the choices, each option is only its letter, or a placeholder for a part of the picture.
    labels = [without_placeholders(option).strip(" ().:").upper() for option in options]
    drawn = all(label in ("", letter) for label, letter in zip(labels, ascii_uppercase, strict=False))
    question = row["question"]
    if question and not without_placeholders(question).strip():
        question += IN_THE_PICTURE
    return Problem(
        question=question,
        answer=row["answer"],
        images=row["decoded_image"] or row["image"],
        choices=() if drawn else tuple(options),
        list_choices=True,
        meta={"subject": row["subject"], "level": row["level"]},
    )


RECIPE = Recipe(
    name="mathvision",
    hub_id="MathLLMs/MathVision",
    license="MIT",
    columns=("id", "question", "options", "answer"),
    optional=("decoded_image", "image", "subject", "level"),
    problem=problem,
    rows={"test": 3_040, "testmini": 304},
    download="64 MB",
    key=("id",),
    splits=("testmini", "test"),
    default_split="test",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
