# SPDX-License-Identifier: Apache-2.0
"""MATH-Vision to verl's parquet: competition problems, with choices or without."""

from __future__ import annotations

import sys

if __package__:
    from data_prep._core import DroppedRow, Problem, Recipe, main
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import DroppedRow, Problem, Recipe, main


def problem(row: dict) -> Problem:
    options = row["options"] or []
    if not isinstance(options, list):
        raise DroppedRow("options are no list", repr(options)[:60])
    # Where the choices are drawn in the picture, the options are nothing but their letters.
    drawn = all(option.strip(" ().").upper() in tuple("ABCDEFGHIJ") for option in options)
    return Problem(
        question=row["question"],
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
    key=("id",),
    splits=("testmini", "test"),
    default_split="test",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
